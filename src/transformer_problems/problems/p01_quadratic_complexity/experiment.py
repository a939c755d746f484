"""How the cost of one attention layer grows with length, and what each cheaper layer does to quality."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import mask_bytes, masked_bits_per_byte
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.longformer import LongformerAttention
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sparse import SparseAttention
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.recurrence.transformer_xl import TransformerXL
from transformer_problems.solutions.training.warmup import Warmup

_WIDTH, _HEADS, _LAYERS = 64, 2, 2
_WINDOW = 64  # what every local method sees: its window, segment, memory or projected length

_ENCODERS = {"dense_encoder", "linformer"}
_SHORT = {"dense", "dense_encoder", "flash_tiled"}


def build_mixer(arm: str, max_seq_len: int) -> nn.Module:
    """The attention layer of an arm, for sequences up to `max_seq_len`."""
    stride = round(math.sqrt(max_seq_len))

    def attention(op: nn.Module) -> SelfAttention:
        return SelfAttention(_WIDTH, _HEADS, op=op, is_causal=arm not in _ENCODERS)

    def transformer_xl() -> nn.Module:
        position = TransformerXLRelative(_WIDTH, _HEADS)
        return TransformerXL(_WIDTH, _HEADS, segment_len=_WINDOW, memory_len=_WINDOW, position=position)

    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: attention(DenseAttention()),
        "dense_encoder": lambda: attention(DenseAttention()),
        "sparse_strided": lambda: attention(SparseAttention(stride)),
        "sparse_fixed": lambda: attention(SparseAttention(stride, pattern="fixed")),
        "longformer": lambda: LongformerAttention(_WIDTH, _HEADS, window_size=_WINDOW, is_causal=True),
        "linformer": lambda: attention(Linformer(max_seq_len, _WINDOW)),
        "performer": lambda: attention(Performer(_WIDTH // _HEADS)),
        "flash": lambda: attention(FlashAttention()),
        "flash_tiled": lambda: attention(FlashAttention(backend="tiled")),
        "transformer_xl": transformer_xl,
    }
    return makers[arm]()


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    lengths: tuple[int, ...]  # tokens, doubling
    further: tuple[int, ...]  # lengths that only arms without an N x N matrix, or its tiles in Python, are taken to
    repeats: int
    text_len: int
    batch_size: int
    steps: int
    train_s: float  # seconds of the comparison at equal seconds
    num_held_out: int
    seeds: int


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << i for i in range((last // first).bit_length()))


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(_doubling(64, 4096), _doubling(8192, 8192), 2, 512, 4, 30, 1.0, 16, 1),
    "standard": _Size(_doubling(128, 8192), _doubling(16_384, 32_768), 5, 512, 8, 150, 10.0, 48, 3),
    "full": _Size(_doubling(512, 32_768), _doubling(65_536, 131_072), 9, 2048, 16, 4000, 600.0, 256, 5),
}


class QuadraticComplexity:
    """The attention of one layer, forward and backward, at doubling lengths; then a small model with each kind."""

    problem = 1
    arms = (
        Arm("dense", "dense attention"),
        Arm("dense_encoder", "dense attention, encoder"),
        Arm("sparse_strided", "Sparse, strided", "sparse-attention", lead=True),
        Arm("sparse_fixed", "Sparse, fixed", "sparse-attention"),
        Arm("longformer", "Longformer", "longformer", lead=True),
        Arm("linformer", "Linformer (encoder)", "linformer", lead=True, baseline="dense_encoder"),
        Arm("performer", "Performer", "performer", lead=True),
        Arm("flash", "FlashAttention (PyTorch)", "flash-attention", lead=True),
        Arm("flash_tiled", "FlashAttention (tiles)", "flash-attention"),
        Arm("transformer_xl", "Transformer-XL", "transformer-xl", lead=True),
    )
    chart = Chart(
        metric="latency_s",
        problem_title="Dense attention in one layer, forward and backward",
        solutions_title="The same with each solution",
        x_label="sequence length, tokens",
        y_label="seconds",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("dense", "sparse_strided", "longformer", "linformer", "performer", "flash", "transformer_xl"),
    )
    columns = (
        Column("latency_s", "seconds at dense's longest", at="last", better="lower"),
        Column("latency_s", "exponent of time", better="lower", statistic="exponent"),
        Column("peak_memory_bytes", "peak bytes there", at="last", better="lower"),
        Column("peak_memory_bytes", "exponent of memory", better="lower", statistic="exponent"),
        Column("flops", "FLOPs there", at="last", better="lower"),
        Column("flops", "exponent of FLOPs", better="lower", statistic="exponent"),
        Column("bits_per_byte", "bits/byte, equal steps", better="lower"),
        Column("bits_per_byte_equal_time", "bits/byte, equal seconds", better="lower"),
    )
    gains = (
        Effect("latency_s", "ratio", ("less time", "more time"), "last", "at {x:,.0f} tokens"),
        Effect("peak_memory_bytes", "ratio", ("less memory", "more memory"), "last", "at {x:,.0f} tokens"),
    )
    costs = (
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), where="after equal steps"),
        Effect("bits_per_byte_equal_time", "difference", ("less", "more"), where="after equal seconds"),
    )
    shared_examples = frozenset({"bits_per_byte", "bits_per_byte_equal_time"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        if bench.cell.seed == 0:  # what a layer costs does not depend on its weights
            lengths = size.lengths if bench.cell.arm in _SHORT else size.lengths + size.further
            for i, length in enumerate(lengths):
                yield from _attention_costs(bench, length, size.repeats)
                bench.progress(0.5 * (i + 1) / len(lengths))
        yield from _quality(bench, size)

    def finding(self, results: Results) -> str:
        last = max(results.xs("dense", "latency_s"))
        seconds = [results.samples("dense", "latency_s", x) for x in (last / 2, last)]
        memory = [results.samples("dense", "peak_memory_bytes", x) for x in (last / 2, last)]
        slower, larger = (float((b.mean(1) / a.mean(1)).mean()) for a, b in (seconds, memory))  # type: ignore[union-attr]
        return (
            f"From {last / 2:,.0f} to {last:,.0f} tokens, twice as many, dense attention takes "
            f"{slower:.1f} times as long and {larger:.1f} times the memory."
        )


def _attention_costs(bench: Bench, length: int, repeats: int) -> Iterator[Measurement]:
    """What the layer costs without its projections, which are the same for all and grow linearly."""
    with seeded(bench.cell.seed, "layer"):
        mixer = _without_projections(build_mixer(bench.cell.arm, length)).to(bench.device)
    x = torch.randn(1, length, _WIDTH, generator=generator(bench.cell.seed, "layer")).to(bench.device).requires_grad_()

    def step() -> None:
        mixer.zero_grad(set_to_none=True)
        x.grad = None
        mixer(x).square().mean().backward()

    def record(metric: str, unit: str, value: float, repeat: int = 0) -> Measurement:
        return Measurement(metric, unit, value, x=length, x_unit="tokens", repeat=repeat)

    sample = measure_latency(step, device=bench.device, repeats=repeats)
    for repeat, seconds in enumerate(sample.times_s):
        yield record("latency_s", "s", seconds, repeat)
    yield record("peak_memory_bytes", "bytes", peak_memory_bytes(step, device=bench.device))
    yield record("flops", "FLOP", count_flops(step))


def _without_projections(mixer: nn.Module) -> nn.Module:
    for name, child in list(mixer.named_children()):
        if isinstance(child, nn.Linear):
            setattr(mixer, name, nn.Identity())
    return mixer


def _quality(bench: Bench, size: _Size) -> Iterator[Measurement]:
    """Held-out bits per byte after equal steps, and of the same run after equal seconds."""
    arm, seed = bench.cell.arm, bench.cell.seed
    text = load_text()
    held_out = held_out_windows(text.test, num=size.num_held_out, length=size.text_len)
    with seeded(seed, "model"):
        model = _build_model(arm, size.text_len).to(bench.device)
    objective: Literal["masked", "causal"] = "masked" if arm in _ENCODERS else "causal"

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "batch", step)
        batch = sample_windows(text.train, num=size.batch_size, length=size.text_len, generator=draws)
        return _bits(model, batch.to(bench.device), objective, draws).mean()

    after: dict[str, Tensor] = {}

    def evaluate(metric: str) -> None:
        after[metric] = _evaluate(model, held_out, bench.device, objective)

    plan = TrainingPlan(size.steps, plain_recipe(schedule=Warmup(20, "constant")), min_train_s=size.train_s)
    train(
        model,
        batch_loss,
        plan,
        at_steps=lambda: evaluate("bits_per_byte"),
        at_seconds=lambda: evaluate("bits_per_byte_equal_time"),
        progress=lambda fraction: bench.progress(0.5 + 0.5 * fraction),
    )
    for metric, bits in after.items():
        for repeat, value in enumerate(bits.tolist()):
            yield Measurement(metric, "bit", value, repeat=repeat)


def _build_model(arm: str, length: int) -> nn.Module:
    """A small byte-level model with the arm's layers; 256 is the mask token of the masked objective."""

    def mixer() -> nn.Module:
        return build_mixer(arm, length)

    position = None if arm == "transformer_xl" else SinusoidalEncoding(_WIDTH)  # the former brings its own
    model = Encoder if arm in _ENCODERS else Decoder
    return model(257, _WIDTH, _LAYERS, cast("Callable[[], SelfAttention]", mixer), position=position)


def _bits(model: nn.Module, batch: Tensor, objective: Literal["masked", "causal"], draws: torch.Generator) -> Tensor:
    """Bits per predicted byte, one value a window."""
    if objective == "masked":
        corrupted, chosen = mask_bytes(batch, draws)
        return masked_bits_per_byte(model(corrupted), batch, chosen)
    return bits_per_byte(model(batch[:, :-1]), batch[:, 1:])


def _evaluate(
    model: nn.Module, windows: Tensor, device: torch.device, objective: Literal["masked", "causal"]
) -> Tensor:
    with torch.no_grad():
        parts = [
            _bits(model, part.to(device), objective, generator(0, "held out", i))
            for i, part in enumerate(torch.split(windows, 8))
        ]
    return torch.cat(parts)


EXPERIMENT = QuadraticComplexity()
