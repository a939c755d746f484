"""What the next token of a stream costs as its history grows, and what is still predicted far beyond training."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, train
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.stack import StackState
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.continual import ContinualAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.recurrence.delta_rule import DeltaRule
from transformer_problems.solutions.recurrence.memory_bank import MemoryBankAttention
from transformer_problems.solutions.recurrence.transformer_xl import TransformerXL

_HEADS = 4
_TRAINED_LEN = 128
_WINDOW = 32  # what every streaming method sees in full: its window, segment or chunks
_SPAN = 32  # tokens timed together, a whole number of segments, so that what falls due once a segment counts
_CHUNK = 64  # tokens read at once where only the state or the loss is wanted
_COLLAPSE = 0.05  # bits per byte lost without sinks; less is no difference between two models, as in problem 9
_BEGIN_TOKEN = 256  # every sequence starts with it, in training and in the stream
_VOCAB_SIZE = _BEGIN_TOKEN + 1
_ONE_MODEL = {"recompute", "kv_cache", "window_only", "attention_sinks"}  # trained with full attention, read four ways


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    histories: tuple[int, ...]  # tokens, doubling from the chunk that the loss is read by
    repeats: int
    width: int
    layers: int
    steps: int
    batch_size: int
    num_windows: int  # held-out texts, each as long as the longest history
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(tuple(64 << i for i in range(5)), 2, 64, 2, steps=30, batch_size=16, num_windows=4, seeds=1),
    "standard": _Size(tuple(64 << i for i in range(7)), 5, 64, 2, steps=200, batch_size=16, num_windows=16, seeds=3),
    "full": _Size(tuple(64 << i for i in range(9)), 9, 256, 6, steps=10_000, batch_size=64, num_windows=64, seeds=5),
}


def build_model(arm: str, width: int, layers: int) -> Decoder:
    """The same small decoder with the arm's layers.

    Distances are told by T5's buckets, whose last one holds all that is far: a model trained on short text has then
    met every distance that a long stream brings, and the arms differ only in what they keep.
    """

    def position() -> PositionEncoding:
        return T5RelativeBias(_HEADS, max_distance=_TRAINED_LEN // 2)

    def attention(op: nn.Module | None) -> nn.Module:
        return SelfAttention(width, _HEADS, op=op, position=position())

    def transformer_xl() -> nn.Module:
        return TransformerXL(width, _HEADS, segment_len=_WINDOW, memory_len=_WINDOW, position=position())

    def memory_bank() -> nn.Module:
        segment = _WINDOW // 2
        bank = _TRAINED_LEN // segment - 2  # as many summaries as training can fill
        return MemoryBankAttention(
            width, _HEADS, segment_len=segment, left_context=segment, num_memories=bank, position=position()
        )

    def chunked() -> nn.Module:
        return ChunkedAttention(
            width, _HEADS, chunk_size=_WINDOW // 2, left_chunks=2, look_ahead=False, position=position()
        )

    makers: dict[str, Callable[[], nn.Module]] = {
        "recompute": lambda: attention(None),
        "kv_cache": lambda: attention(None),
        "window_only": lambda: attention(SlidingWindow(_WINDOW)),
        "attention_sinks": lambda: attention(AttentionSinks(_WINDOW)),
        "transformer_xl": transformer_xl,
        "chunked": chunked,
        "memory_bank": memory_bank,
        "delta_rule": lambda: DeltaRule(width, _HEADS, chunk_size=_WINDOW),
        "continual": lambda: ContinualAttention(width, _HEADS, window_len=_WINDOW, position=position()),
    }
    return Decoder(_VOCAB_SIZE, width, layers, cast("Callable[[], SelfAttention]", makers[arm]))


class NoRecurrence:
    """A byte-level model trained on 128 tokens of real text, then fed a stream: what each further token costs."""

    problem = 12
    arms = (
        Arm("recompute", "the whole prefix again"),
        Arm("kv_cache", "full KV cache"),
        Arm("window_only", "window alone, same model"),
        Arm("transformer_xl", "Transformer-XL", "transformer-xl", lead=True),
        Arm("chunked", "Chunked attention", "chunk-based-attention", lead=True),
        Arm("attention_sinks", "Window + sinks, same model", "streaming-transformers", lead=True),
        Arm("memory_bank", "Memory bank", "streaming-transformers"),
        Arm("delta_rule", "Delta rule", "delta-attention", lead=True),
        Arm("continual", "Continual attention", "delta-attention"),
    )
    chart = Chart(
        metric="latency_s",
        problem_title="The next token, computed from the whole prefix",
        solutions_title="The same with each solution",
        x_label="tokens seen before",
        y_label="seconds a token",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("recompute", "kv_cache", "transformer_xl", "chunked", "attention_sinks", "delta_rule"),
    )
    columns = (
        Column("latency_s", "seconds a token at longest", at="last", better="lower"),
        Column("flops", "FLOPs a token at longest", at="last", better="lower"),
        Column("flops", "exponent of FLOPs", better="lower", digits=2, statistic="exponent"),
        Column("state_bytes", "state bytes at longest", at="last", better="lower"),
        Column("look_ahead", "look-ahead, tokens", better="lower"),
        Column("streamed_difference", "streamed against whole", better="lower", digits=2),
        Column("bits_per_byte", "bits/byte at 1x", at=float(_TRAINED_LEN), better="lower"),
        Column("bits_per_byte", "bits/byte at longest", at="last", better="lower"),
    )
    gains = (
        Effect("latency_s", "ratio", ("less time", "more time"), "last", "a token after {x:,.0f}"),
        Effect("latency_s", "ratio", ("less", "more"), "last", against="kv_cache"),
    )
    costs = (
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), "last", "after {x:,.0f} tokens"),
        Effect("bits_per_byte", "difference", ("less", "more"), float(_TRAINED_LEN), "after {x:,.0f}"),
        Effect("state_bytes", "ratio", ("fewer bytes kept", "more bytes kept"), "last", against="kv_cache"),
    )
    shared_examples = frozenset({"bits_per_byte"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        text = load_text()
        model = _model_of(bench, size, text)
        yield Measurement("look_ahead", "tokens", _look_ahead(model))
        yield Measurement("streamed_difference", "1", streamed_difference(arm, model, _stream(text, 1, 512, bench)))
        yield from _loss(model, size, text, bench)
        bench.progress(0.7)
        if bench.cell.seed == 0:  # what a token costs does not depend on the weights
            yield from _costs(bench, model, size, text)

    def finding(self, results: Results) -> str:
        xs = results.xs("recompute", "latency_s")
        first, last = (results.samples("recompute", "latency_s", x) for x in (xs[0], xs[-1]))
        assert first is not None
        assert last is not None
        work = _growth(results, "flops", xs[0], xs[-1])
        return (
            f"After {xs[-1]:,.0f} tokens the next one takes {last.mean() / first.mean():,.0f} times as long as after "
            f"{xs[0]:,.0f} and {work:,.0f} times the arithmetic, since the whole prefix runs again."
            f"{_cache_told(results, xs)}{_sinks_told(results, xs[-1])}"
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES[results.scale]
        return (
            "How much less time a method takes than the whole prefix again depends on how that is computed. Here "
            "every layer adds the bias of distances as a whole matrix of N x N and attention is not fused, so that "
            f"memory is moved that the arithmetic does not count.{_last_octave_told(results)} Gains against a full "
            "key/value cache do not rest on it.",
            f"Every model is trained here, in {size.steps:,} steps of {size.batch_size} windows of {_TRAINED_LEN} "
            "bytes. To compare with: on the texts of the standard scale a table of pairs of bytes, counted over the "
            "training text, has 3.76 bits per byte at 1x and 3.37 at the longest history, one of single bytes 4.66 "
            "and 4.43 (scripts/reference_lines.py, Python 3.11.7); the bundled draft of 2 layers has 1.70 by its "
            "model card. Models near a table of pairs say little of what better ones make of a long history, or lose "
            "without sinks.",
        )


def _growth(results: Results, metric: str, before: float, after: float) -> float:
    """How many times as much of a metric the baseline takes after a longer history."""
    smaller, larger = (results.samples("recompute", metric, x) for x in (before, after))
    assert smaller is not None
    assert larger is not None
    return float(larger.mean() / smaller.mean())


def _last_octave_told(results: Results) -> str:
    """What the baseline's time at the longest history holds beside arithmetic; empty where it was not measured."""
    xs = results.xs("recompute", "latency_s")
    seconds = results.samples("recompute", "latency_s", xs[-1]) if len(xs) > 1 else None
    if seconds is None:
        return ""
    work, time = (_growth(results, metric, xs[-2], xs[-1]) for metric in ("flops", "latency_s"))
    return (
        f" From {xs[-2]:,.0f} to {xs[-1]:,.0f} tokens arithmetic grows {work:.1f} times and time {time:.1f} times, "
        f"and the {seconds.size} repeats at {xs[-1]:,.0f} take {seconds.min():.1f} to {seconds.max():.1f} s."
    )


def _cache_told(results: Results, xs: list[float]) -> str:
    """A sentence on what a cache makes of the growth; empty where it was not measured."""
    first, last = (results.samples("kv_cache", "latency_s", x) for x in (xs[0], xs[-1]))
    state = results.samples("kv_cache", "state_bytes", xs[-1])
    if first is None or last is None or state is None:
        return ""
    return (
        f" With a full KV cache it takes {last.mean() / first.mean():.1f} times as long, and "
        f"{state.mean() / 2**20:,.0f} MiB are kept."
    )


def _sinks_told(results: Results, x: float) -> str:
    """A sentence on whether a window without sinks collapses; empty where one of its readings is missing."""
    losses = [results.samples(arm, "bits_per_byte", x) for arm in ("recompute", "window_only", "attention_sinks")]
    if any(loss is None for loss in losses):
        return ""
    whole, window, sinks = (loss.mean() for loss in losses if loss is not None)
    outcome = (
        f"without sinks the window loses {window - sinks:.2f}"
        if window - sinks > _COLLAPSE
        else "the collapse that StreamingLLM reports of a window without sinks was not reproduced"
    )
    return (
        f" At that length the model, trained on {_TRAINED_LEN} tokens, needs {whole:.2f} bits per byte, through a "
        f"window alone {window:.2f}, with sinks kept {sinks:.2f}: {outcome}."
    )


def _model_of(bench: Bench, size: _Size, text: TextSplits) -> Decoder:
    """The arm's trained model; arms that only read differently share one."""
    arm, seed = bench.cell.arm, bench.cell.seed
    trained_as = "recompute" if arm in _ONE_MODEL else arm
    recipe = {"problem": 12, "arm": trained_as, "seed": seed, "text": text.source, **asdict(size)}

    def build() -> nn.Module:
        with seeded(seed, "model"):
            return build_model(trained_as, size.width, size.layers).to(bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "batch", step)
        windows = sample_windows(text.train, num=size.batch_size, length=_TRAINED_LEN, generator=draws)
        windows = windows.to(bench.device)
        return bits_per_byte(model(_begun(windows)[:, :-1]), windows).mean()

    def train_short(model: nn.Module, checkpoint: Path) -> None:
        plan = TrainingPlan(steps=size.steps)
        train(model, batch_loss, plan, progress=lambda done: bench.progress(0.5 * done), checkpoint=checkpoint)

    trained = bench.models.get(recipe, build, train_short)
    model = build_model(arm, size.width, size.layers).to(bench.device)
    model.load_state_dict(trained.state_dict())
    return model.eval()


def _begun(windows: Tensor) -> Tensor:
    """Windows behind the beginning token, [B, N] -> [B, N + 1]."""
    return nn.functional.pad(windows, (1, 0), value=_BEGIN_TOKEN)


def _stream(text: TextSplits, num: int, length: int, bench: Bench) -> Tensor:
    """Held-out text as it is streamed, [num, length], the beginning token included."""
    return _begun(held_out_windows(text.test, num=num, length=length - 1)).to(bench.device)


def _look_ahead(model: nn.Module) -> int:
    """Later tokens that a token may have to wait for."""
    return max(getattr(module, "max_delay", 0) for module in model.modules())


def streamed_difference(arm: str, model: Decoder, tokens: Tensor) -> float:
    """Largest difference between streamed and whole-sequence logits, over the largest logit.

    tokens: [B, N], N a multiple of 128.

    A stream is fed pieces of very different sizes; recomputing is held to what it promises too, that a prefix alone
    gives what it gives within the whole.
    """
    sizes = [1, 7, 64, 56]
    with torch.no_grad():
        whole = model(tokens)
        if arm == "recompute":
            ends = torch.tensor(sizes).cumsum(0).tolist()
            streamed = torch.cat([_next_logits(model, tokens[:, :end]) for end in ends], dim=1)
            whole = whole[:, [end - 1 for end in ends]]
        else:
            pieces, state = [], model.initial_state(len(tokens))
            for piece in tokens.split(sizes * (tokens.shape[1] // sum(sizes)), dim=1):
                logits, state = model.stream(piece, state)
                pieces.append(logits)
            streamed = torch.cat(pieces, dim=1)
    return float((streamed - whole).abs().max() / whole.abs().max())


def _next_logits(model: Decoder, prefix: Tensor) -> Tensor:
    """The logits after a prefix, from nothing but its tokens; the head runs on the last one only. [B, 1, V]."""
    with torch.no_grad():
        return nn.functional.linear(model.body(prefix)[:, -1:], model.body.embedding.weight)


def _read(model: Decoder, tokens: Tensor, state: StackState, at_once: int) -> StackState:
    """The state after more tokens, `at_once` in each call."""
    with torch.no_grad():
        for piece in tokens.split(at_once, dim=1):
            _, state = model.stream(piece, state)
    return state


def _loss(model: Decoder, size: _Size, text: TextSplits, bench: Bench) -> Iterator[Measurement]:
    """Bits per byte of the second half of each history, text by text, as the stream goes by.

    Recomputing gives what the cache of the same model gives, so its loss is read through that cache.
    """
    tokens = _stream(text, size.num_windows, size.histories[-1] + 1, bench)
    state, chunks = model.initial_state(len(tokens)), []
    with torch.no_grad():
        for start in range(0, size.histories[-1], _CHUNK):
            piece = tokens[:, start : start + _CHUNK + 1]
            logits, state = model.stream(piece[:, :-1], state)
            chunks.append(bits_per_byte(logits, piece[:, 1:]))
    bits = torch.stack(chunks, dim=1)  # [B, chunks]
    for history in size.histories:
        second_half = slice(history // (2 * _CHUNK), history // _CHUNK)
        for repeat, value in enumerate(bits[:, second_half].mean(1).tolist()):
            yield Measurement("bits_per_byte", "bit", value, x=history, x_unit="tokens", repeat=repeat)


def _costs(bench: Bench, model: Decoder, size: _Size, text: TextSplits) -> Iterator[Measurement]:
    """Seconds, FLOPs and state of the next token at each history: the mean of `_SPAN` tokens taken one by one."""
    tokens = _stream(text, 1, size.histories[-1] + _SPAN, bench)
    state, seen = None if bench.cell.arm == "recompute" else model.initial_state(1), 0
    for i, history in enumerate(size.histories):
        step: Callable[[], object]
        if state is None:
            step, num_tokens = partial(_next_logits, model, tokens[:, :history]), 1
            state_bytes = history * tokens.element_size()
        else:
            state, seen = _read(model, tokens[:, seen:history], state, _CHUNK), history
            step, num_tokens = partial(_read, model, tokens[:, history : history + _SPAN], state, 1), _SPAN
            state_bytes = state.num_bytes

        def record(metric: str, unit: str, value: float, repeat: int = 0, x: int = history) -> Measurement:
            return Measurement(metric, unit, value, x=x, x_unit="tokens", repeat=repeat)

        sample = measure_latency(step, device=bench.device, repeats=size.repeats, warmup=1)
        for repeat, seconds in enumerate(sample.times_s):
            yield record("latency_s", "s", seconds / num_tokens, repeat)
        yield record("flops", "FLOP", count_flops(step) / num_tokens)
        yield record("state_bytes", "bytes", state_bytes)
        bench.progress(0.7 + 0.3 * (i + 1) / len(size.histories))


EXPERIMENT = NoRecurrence()
