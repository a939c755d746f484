"""What decoding a text takes with each kind of cache, and what the cache costs in quality."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import load_bundled
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.slots import AttentionOp, CacheFactory
from transformer_problems.lab.data.text import TextSplits, held_out_windows, sample_windows
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.footprint import DecoderSize, predict_cache_bytes, predict_rounded_cache_bytes
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.training import TrainingPlan, train
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.stack import StackState
from transformer_problems.problems.p07_high_memory_footprint.bill import Bill
from transformer_problems.problems.p07_high_memory_footprint.training_step import NUM_HEADS, VOCAB_SIZE
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.paged_cache import PagedKVCache, PagePool
from transformer_problems.solutions.attention.quantized_cache import QuantizedKVCache
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding

_WINDOW, _NUM_SINKS = 64, 4
_PAGE = 16
_CHUNK = 64  # tokens read at once, where not one by one
_TIMED = 32  # tokens timed together
_MEASURED = 8  # last tokens of the text, whose decoding is measured; the last of them completes a group to round
_BEGIN_TOKEN = VOCAB_SIZE - 1
_KV_HEADS = {"kv_gqa": 2, "kv_mqa": 1}
_TREATS_ANY_MODEL = {"kv_plain", "kv_int8", "kv_int4", "kv_sinks", "kv_paged"}  # without training it anew


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The decoder whose cache is treated, and how its quality is measured.

    Args:
        steps: Training steps on `batch_size` windows of `text_len` tokens.
        num_windows: Held-out windows.
    """

    width: int
    layers: int
    steps: int
    batch_size: int
    text_len: int
    num_windows: int


class _Streams(Protocol):
    """A language model that reads in chunks."""

    def initial_state(self, batch_size: int) -> Any: ...

    def stream(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]: ...


def build_model(arm: str, plan: CachePlan, max_tokens: int, device: torch.device) -> Decoder:
    """The same small decoder with the arm's heads, op and cache.

    Args:
        max_tokens: Tokens of all sequences together that pages are reserved for.
    """
    head_dim, num_kv_heads = plan.width // NUM_HEADS, _KV_HEADS.get(arm, NUM_HEADS)
    cache = _cache(arm, plan.layers, num_kv_heads, head_dim, max_tokens, device)

    def mixer() -> SelfAttention:
        position = RotaryEmbedding(head_dim)
        return SelfAttention(
            plan.width, NUM_HEADS, num_kv_heads=num_kv_heads, op=_op(arm), position=position, cache=cache
        )

    return Decoder(VOCAB_SIZE, plan.width, plan.layers, mixer).to(device)


def _op(arm: str) -> AttentionOp:
    return AttentionSinks(_WINDOW, num_sinks=_NUM_SINKS) if arm == "kv_sinks" else FlashAttention()


def _cache(
    arm: str, layers: int, num_kv_heads: int, head_dim: int, max_tokens: int, device: torch.device
) -> CacheFactory | None:
    """The cache of all layers; None for the plain one, which keeps what the op looks back on."""
    if arm == "kv_paged":
        num_pages = layers * -(-max_tokens // _PAGE)
        pool = PagePool(num_pages, page_size=_PAGE, num_kv_heads=num_kv_heads, head_dim=head_dim, device=device)
        return lambda batch_size: PagedKVCache.empty(batch_size, pool=pool)
    makers: dict[str, CacheFactory] = {
        "kv_int8": lambda batch_size: QuantizedKVCache.empty(batch_size, bits=8),
        "kv_int4": lambda batch_size: QuantizedKVCache.empty(batch_size, bits=4),
    }
    return makers.get(arm)


def decoding_bill(arm: str, plan: CachePlan, length: int, text: TextSplits, device: torch.device) -> Bill:
    """Bytes of decoding the last tokens of one text.

    The state before them is copied within the measured call, so that the allocator counts all of its memory. Pages are
    never copied: what their pool reserved is added.
    """
    model = build_model(arm, plan, length, device)
    tokens = _texts(text, 1, length, device)
    before = _read_first(arm, model, tokens, length - _MEASURED)
    held = 0

    def decode() -> None:
        nonlocal held
        state = copy.deepcopy(before)
        for token in tokens[:, -_MEASURED:].split(1, dim=1):
            _, state = model.stream(token, state)
        held = state.num_bytes

    with torch.no_grad():
        peak = peak_memory_bytes(decode, device=device) + _reserved_bytes(before)
    weights = sum(p.nbytes for p in model.parameters())
    size = DecoderSize(
        plan.layers, plan.width, NUM_HEADS, VOCAB_SIZE, num_kv_heads=_KV_HEADS.get(arm, NUM_HEADS), rotary=True
    )
    return Bill(
        measured={"weight": weights, "cache": held, "activation": peak - held},
        predicted={"weight": size.num_parameters * 4, "cache": _predicted_cache(arm, size, length)},
    )


def _reserved_bytes(state: StackState) -> int:
    """What the pools that a state's pages come from hold, in use or not."""
    pools = {id(cache.pool): cache.pool for cache in state.layers if isinstance(cache, PagedKVCache)}
    return sum(pool.num_bytes for pool in pools.values())


def _predicted_cache(arm: str, size: DecoderSize, length: int) -> int:
    if arm == "kv_int8":
        return predict_rounded_cache_bytes(size, batch_size=1, num_tokens=length, bits=8)
    if arm == "kv_int4":
        return predict_rounded_cache_bytes(size, batch_size=1, num_tokens=length, bits=4)
    lookback, num_sinks = (_WINDOW, _NUM_SINKS) if arm == "kv_sinks" else (None, 0)
    return predict_cache_bytes(size, batch_size=1, num_tokens=length, lookback=lookback, num_sinks=num_sinks)


def token_seconds(
    arm: str, plan: CachePlan, length: int, text: TextSplits, device: torch.device, repeats: int
) -> list[float]:
    """Seconds of a token near the end of one text, the mean of several taken one by one; one figure a repeat."""
    model = build_model(arm, plan, length, device)
    tokens = _texts(text, 1, length, device)
    before = _read_first(arm, model, tokens, length - _TIMED)
    sample = measure_latency(
        lambda: _read(model, tokens[:, -_TIMED:], before, 1), device=device, repeats=repeats, warmup=1
    )
    return [seconds / _TIMED for seconds in sample.times_s]


def bits_per_byte_of(bench: Bench, plan: CachePlan, text: TextSplits) -> list[float]:
    """Held-out bits per byte of the arm's model trained here, read through the arm's cache; one figure a window."""
    arm, seed = bench.cell.arm, bench.cell.seed
    max_tokens = plan.num_windows * plan.text_len
    model = build_model(arm, plan, max_tokens, bench.device)
    model.load_state_dict(_trained(bench, plan, text, seed).state_dict())
    return _streamed_bits(model, _texts(text, plan.num_windows, plan.text_len + 1, bench.device))


def bundled_bits_per_byte(arm: str, plan: CachePlan, text: TextSplits, device: torch.device) -> list[float]:
    """The same of the bundled model, for caches that a model takes as it is; nothing for the others."""
    if arm not in _TREATS_ANY_MODEL:
        return []
    model = load_bundled("base", dtype=torch.float32, device=device)
    config, windows = model.config, _texts(text, plan.num_windows, plan.text_len + 1, device)
    num_kv_heads, head_dim = config.num_kv_heads or config.num_heads, config.embed_dim // config.num_heads
    cache = _cache(arm, config.num_layers, num_kv_heads, head_dim, windows[:, 1:].numel(), device)
    for block in model.blocks:
        mixer = cast("SelfAttention", block.mixer)
        mixer.op, mixer.cache = _op(arm), cache
    return _streamed_bits(model, windows)


def _trained(bench: Bench, plan: CachePlan, text: TextSplits, seed: int) -> nn.Module:
    """The model with the arm's heads; arms that keep their cache differently share one."""
    heads = bench.cell.arm if bench.cell.arm in _KV_HEADS else "kv_plain"
    recipe = {"problem": 7, "heads": heads, "seed": seed, "text": text.source, **asdict(plan)}

    def build() -> nn.Module:
        with seeded(seed, "model"):
            return build_model(heads, plan, 0, bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "batch", step)
        windows = sample_windows(text.train, num=plan.batch_size, length=plan.text_len, generator=draws)
        windows = _begun(windows.to(bench.device))
        return bits_per_byte(model(windows[:, :-1]), windows[:, 1:]).mean()

    def train_small(model: nn.Module, checkpoint: Path) -> None:
        schedule = TrainingPlan(steps=plan.steps)
        train(model, batch_loss, schedule, progress=lambda done: bench.progress(0.5 * done), checkpoint=checkpoint)

    return bench.models.get(recipe, build, train_small)


def _streamed_bits(model: _Streams, tokens: Tensor) -> list[float]:
    """Bits per byte of each text, [B, N + 1], read in chunks through the model's cache."""
    pieces, state = [], model.initial_state(len(tokens))
    with torch.no_grad():
        for piece in tokens[:, :-1].split(_CHUNK, dim=1):
            logits, state = model.stream(piece, state)
            pieces.append(logits)
    return [float(bits) for bits in bits_per_byte(torch.cat(pieces, dim=1), tokens[:, 1:])]


def _texts(text: TextSplits, num: int, length: int, device: torch.device) -> Tensor:
    """Held-out texts, [num, length], each behind the token that begins it."""
    return _begun(held_out_windows(text.test, num=num, length=length - 1).to(device))


def _begun(windows: Tensor) -> Tensor:
    return nn.functional.pad(windows, (1, 0), value=_BEGIN_TOKEN)


def _read_first(arm: str, model: _Streams, tokens: Tensor, num: int) -> Any:
    """The state after the first tokens, [1, N].

    The first half comes at once: the plain cache then makes room for twice as much, which is the whole text and no
    more. A cache that forgets would keep that room, so it reads in chunks from the start.
    """
    half = tokens.shape[1] // 2
    state = _read(model, tokens[:, :half], model.initial_state(1), _CHUNK if arm == "kv_sinks" else half)
    return _read(model, tokens[:, half:num], state, _CHUNK)


def _read(model: _Streams, tokens: Tensor, state: Any, at_once: int) -> Any:
    with torch.no_grad():
        for piece in tokens.split(at_once, dim=1):
            _, state = model.stream(piece, state)
    return state
