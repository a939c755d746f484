"""Where the bytes of training and of decoding go, and what each solution takes off them at which cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.results import Results
from transformer_problems.problems.p07_high_memory_footprint.bill import Bill, measurements_of
from transformer_problems.problems.p07_high_memory_footprint.decoding import (
    CachePlan,
    bits_per_byte_of,
    bundled_bits_per_byte,
    decoding_bill,
    token_seconds,
)
from transformer_problems.problems.p07_high_memory_footprint.training_step import (
    TRAINING,
    gradient_difference,
    step_seconds,
    training_bill,
)


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here.

    Args:
        lengths: Tokens in a training step, doubling.
        texts: Tokens decoded, doubling.
        budget: Bytes that a training step may take.
        text_budget: Bytes that decoding may take.
    """

    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    budget: int
    text_budget: int
    repeats: int
    plan: CachePlan
    seeds: int


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << i for i in range((last // first).bit_length()))


_MIB = 2**20
_SIZES: dict[Scale, _Size] = {
    "quick": _Size(
        _doubling(256, 1024), _doubling(512, 2048), 32 * _MIB, 8 * _MIB, 2, CachePlan(64, 8, 12, 2, 256, 4), seeds=1
    ),
    "standard": _Size(
        _doubling(128, 2048), _doubling(512, 8192), 32 * _MIB, 8 * _MIB, 5, CachePlan(64, 8, 150, 4, 256, 32), seeds=3
    ),
    "full": _Size(
        _doubling(512, 8192),
        _doubling(4096, 65_536),
        4096 * _MIB,
        256 * _MIB,
        9,
        CachePlan(256, 16, 5000, 32, 512, 128),
        seeds=5,
    ),
}


class HighMemoryFootprint:
    """A small decoder's training step, and decoding with it: peak bytes by what they are for, at doubling lengths.

    Both are measured by the allocator. Training keeps its gradients between steps and runs AdamW; decoding takes the
    last tokens of a text one by one, after the plain cache's growing buffer has come to hold exactly that text, which
    is its best case.
    """

    problem = 7
    arms = (
        Arm("dense", "training, dense attention"),
        Arm("flash", "FlashAttention (PyTorch)", "flash-attention", lead=True),
        Arm("flash_tiled", "FlashAttention (tiles)", "flash-attention"),
        Arm("checkpoint_sqrt", "Checkpoints, sqrt(L) layers", "gradient-checkpointing", lead=True),
        Arm("checkpoint_each", "Checkpoints, every layer", "gradient-checkpointing"),
        Arm("memory_efficient", "Memory-efficient attention", "memory-efficient-attention", lead=True),
        Arm("kv_plain", "decoding, plain cache"),
        Arm("kv_int8", "Cache in 8 bits", "kv-cache-optimization", lead=True, baseline="kv_plain"),
        Arm("kv_int4", "Cache in 4 bits", "kv-cache-optimization", baseline="kv_plain"),
        Arm("kv_gqa", "Cache of 2 heads for 4 (GQA)", "kv-cache-optimization", baseline="kv_plain"),
        Arm("kv_mqa", "Cache of 1 head for 4 (MQA)", "kv-cache-optimization", baseline="kv_plain"),
        Arm("kv_sinks", "Cache of a window + sinks", "kv-cache-optimization", baseline="kv_plain"),
        Arm("kv_paged", "Cache in pages", "kv-cache-optimization", baseline="kv_plain"),
    )
    chart = Chart(
        metric="peak_memory_bytes",
        problem_title="A training step that keeps all scores and activations",
        solutions_title="The same with each solution, and decoding",
        x_label="tokens",
        y_label="peak bytes",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("dense", "flash", "checkpoint_sqrt", "memory_efficient", "kv_plain", "kv_int8"),
    )
    columns = (
        Column("longest_peak_bytes", "peak bytes at longest", better="lower"),
        Column("peak_memory_bytes", "exponent of peak", better="lower", digits=2, statistic="exponent"),
        Column("weight_bytes", "of which weights"),
        Column("gradient_bytes", "gradients"),
        Column("optimizer_bytes", "optimizer state"),
        Column("cache_bytes", "key/value cache", better="lower"),
        Column("activation_bytes", "activations, scratch", better="lower"),
        Column("activation_ratio", "activations: predicted / measured"),
        Column("state_ratio", "the rest: predicted / measured"),
        Column("longest_fit", "tokens in the budget", better="higher"),
        Column("step_s", "seconds a training step", better="lower"),
        Column("token_s", "seconds a decoded token", better="lower"),
        Column("gradient_difference", "gradients against dense", better="lower", digits=2),
        Column("bits_per_byte", "bits/byte, trained here", better="lower"),
        Column("bundled_bits_per_byte", "bits/byte, bundled model", better="lower", digits=4),
    )
    gains = (Effect("peak_memory_bytes", "ratio", ("less memory", "more memory"), "last", "at {x:,.0f} tokens"),)
    costs = (
        Effect("step_s", "ratio", ("less time", "more time"), where="a training step"),
        Effect(
            "bundled_bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), where="in the bundled model"
        ),
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), where="in one trained here"),
        Effect("token_s", "ratio", ("less time", "more time"), where="a token"),
    )
    shared_examples = frozenset({"bits_per_byte", "bundled_bits_per_byte"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        if bench.cell.arm in TRAINING:
            yield from _training(bench, size)
        else:
            yield from _decoding(bench, size)

    def finding(self, results: Results) -> str:
        last = max(results.xs("dense", "peak_memory_bytes"))
        peak, activations, budget, fit = (
            results.samples("dense", metric)
            for metric in ("longest_peak_bytes", "activation_bytes", "budget_bytes", "longest_fit")
        )
        assert peak is not None
        assert activations is not None
        assert budget is not None
        text = (
            f"A training step on {last:,.0f} tokens takes {peak.mean() / _MIB:,.0f} MiB, "
            f"{activations.mean() / peak.mean():.0%} of it activations and attention scores"
        )
        if fit is not None:
            text += f"; {budget.mean() / _MIB:,.0f} MiB hold a step on {fit.mean():,.0f}"
        decoding, cache = (results.samples("kv_plain", metric) for metric in ("longest_peak_bytes", "cache_bytes"))
        if decoding is not None and cache is not None:
            texts = results.xs("kv_plain", "peak_memory_bytes")
            text += (
                f". Decoding a text of {max(texts):,.0f} tokens takes {decoding.mean() / _MIB:,.0f} MiB in the plain "
                f"cache's best case, {cache.mean() / decoding.mean():.0%} of it keys and values"
            )
        return f"{text}.{_checkpoints_told(results)}"

    def notes(self, results: Results) -> tuple[str, ...]:
        plan = _SIZES[results.scale].plan
        loss = results.samples("kv_plain", "bits_per_byte")
        plain = "" if loss is None else f", which end at {loss.mean():.2f} bits per byte with the plain cache"
        return (
            "Decoding is measured on a text whose first half is read at once: the plain cache's buffer, which "
            "doubles, then ends exactly full. That is its best case, and the verdict on pages turns on it: after short "
            "prompts, or some whose doublings end just beyond the text, a plain cache peaks higher, pages take less. "
            "scripts/reference_lines.py measures such schedules.",
            "What shared heads (GQA, MQA) cost in quality was measured on models trained here alone, in "
            f"{plan.steps:,} steps of {plan.batch_size} windows of {plan.text_len} bytes{plain}. To compare with: on "
            "the windows of the standard scale a table of pairs of bytes, counted over the training text, has 3.56 "
            "(scripts/reference_lines.py, Python 3.11.7), and the bundled draft of 2 layers has 1.70 by its model "
            "card. No change between models near a table of pairs says little of better ones. The other caches were "
            "read through a bundled model too.",
        )


def _checkpoints_told(results: Results) -> str:
    """A sentence on which checkpoints save more in the training step; empty where one of them is missing."""
    peaks = [results.samples(f"checkpoint_{every}", "longest_peak_bytes") for every in ("sqrt", "each")]
    if any(peak is None for peak in peaks):
        return ""
    sqrt, each = (peak.mean() / _MIB for peak in peaks if peak is not None)
    return (
        f" Checkpoints every sqrt(L) layers bring the step to {sqrt:,.0f} MiB, checkpoints at every layer to "
        f"{each:,.0f}: sqrt(L) {'loses' if sqrt > each else 'wins'} here."
    )


def _training(bench: Bench, size: _Size) -> Iterator[Measurement]:
    """Bytes and seconds of a step, which do not depend on the weights, and gradients, which do."""
    arm, seed, text, plan = bench.cell.arm, bench.cell.seed, load_text(), size.plan
    difference = gradient_difference(arm, plan.width, plan.layers, text, seed, bench.device)
    yield Measurement("gradient_difference", "1", difference)
    if seed > 0:
        return
    bills: dict[int, Bill] = {}
    for i, length in enumerate(size.lengths):
        bills[length] = training_bill(arm, plan.width, plan.layers, length, text, bench.device)
        bench.progress(0.6 * (i + 1) / len(size.lengths))
    yield from measurements_of(bills, size.budget)
    seconds = step_seconds(arm, plan.width, plan.layers, size.lengths[-1], text, bench.device, size.repeats)
    for repeat, value in enumerate(seconds):
        yield Measurement("step_s", "s", value, repeat=repeat)


def _decoding(bench: Bench, size: _Size) -> Iterator[Measurement]:
    """Held-out loss with the arm's cache, then bytes and seconds of decoding, which do not depend on the weights."""
    arm, seed, text, plan = bench.cell.arm, bench.cell.seed, load_text(), size.plan
    for repeat, value in enumerate(bits_per_byte_of(bench, plan, text)):
        yield Measurement("bits_per_byte", "bit", value, repeat=repeat)
    if seed > 0:
        return
    for repeat, value in enumerate(bundled_bits_per_byte(arm, plan, text, bench.device)):
        yield Measurement("bundled_bits_per_byte", "bit", value, repeat=repeat)
    bills: dict[int, Bill] = {}
    for i, length in enumerate(size.texts):
        bills[length] = decoding_bill(arm, plan, length, text, bench.device)
        bench.progress(0.6 + 0.3 * (i + 1) / len(size.texts))
    yield from measurements_of(bills, size.text_budget)
    for repeat, value in enumerate(token_seconds(arm, plan, size.texts[-1], text, bench.device, size.repeats)):
        yield Measurement("token_s", "s", value, repeat=repeat)


EXPERIMENT = HighMemoryFootprint()
