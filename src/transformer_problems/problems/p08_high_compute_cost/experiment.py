"""What 1,000 tokens cost, in arithmetic, traffic, seconds and energy, and what is still known at that price."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.kernels.int8_product import Int8Backend
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.energy import Energy, counted_energy, estimate_energy
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import count_compiled_kernels, count_kernels
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.results import Results
from transformer_problems.problems.p08_high_compute_cost.text_models import (
    WINDOW,
    TextPlan,
    cheap_model,
    masked_bits,
    thousand_tokens,
)
from transformer_problems.solutions.compression.int8 import Int8Linear
from transformer_problems.solutions.deployment.compiled import CompiledModel

_TOKENS = 1_000
_ALIKE_BITS = 0.05  # what a model may lose by the criterion
_INT8_BACKENDS: tuple[Int8Backend, ...] = ("cpp", "int_mm", "float")


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    widths: tuple[int, ...]
    plan: TextPlan
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((64, 128), TextPlan(2, 30, 15, batch_size=8, num_tested=40), seeds=1),
    "standard": _Size((128, 256), TextPlan(4, 300, 100, batch_size=8, num_tested=200), seeds=3),
    "full": _Size((256, 512, 1024), TextPlan(8, 4_000, 2_000, batch_size=64, num_tested=800), seeds=5),
}


class HighComputeCost:
    """Encoders that fill in masked bytes of text: as they are, made cheaper, or cheap from the start."""

    problem = 8
    arms = (
        Arm("float32", "float32, eager"),
        Arm("int8", "int8", "quantization", lead=True),
        Arm("smooth_int8", "SmoothQuant, int8", "quantization"),
        Arm("int4", "int4, rounded", "quantization"),
        Arm("gptq", "int4, GPTQ", "quantization"),
        Arm("mobilebert", "MobileBERT", "lightweight-transformers", lead=True),
        Arm("lite", "Lite Transformer", "lightweight-transformers"),
        Arm("fused", "Fused operators", "operator-fusion", lead=True),
        Arm("compiled", "Compiled graph", "operator-fusion"),
        Arm("structured", "Half the heads and neurons", "pruning", lead=True),
        Arm("magnitude", "half the weights, by magnitude", "pruning"),
        Arm("wanda", "half the weights, Wanda", "pruning"),
        Arm("movement", "half the weights, by movement", "pruning"),
    )
    chart = Chart(
        metric="bits",
        problem_title="A plain encoder, narrow and wide",
        solutions_title="The same with each solution",
        x_label="seconds for 1,000 tokens",
        y_label="bits per masked byte",
        better="lower",
        x_log=True,
        draws=("float32", "int8", "int4", "mobilebert", "lite", "fused", "structured"),
        x_metric="seconds",
    )
    columns = (
        Column("seconds", "seconds for 1,000 tokens, widest", at="last", better="lower"),
        Column("flops", "FLOPs", at="last", better="lower"),
        Column("bytes_moved", "bytes moved", at="last", better="lower"),
        Column("kernels", "kernels", at="last", better="lower"),
        Column("energy_j", "joules", at="last", better="lower"),
        Column("weight_bytes", "bytes of weights", at="last", better="lower"),
        Column("bits", "bits per masked byte", at="last", better="lower"),
    )
    gains = (Effect("seconds", "ratio", ("faster", "slower"), "last", "at width {x:,.0f}"),)
    costs = (
        Effect("bits", "difference", ("bits fewer per byte", "bits more per byte"), "last"),
        Effect("energy_j", "ratio", ("less energy", "more energy"), "last"),
        Effect("weight_bytes", "ratio", ("fewer bytes of weights", "more bytes of weights"), "last"),
        Effect("kernels", "ratio", ("fewer kernels", "more kernels"), "last"),
    )
    shared_examples = frozenset({"bits"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        for i, width in enumerate(size.widths):
            model = cheap_model(bench, width, size.plan)
            bench.progress((i + 0.7) / len(size.widths))
            for repeat, bits in enumerate(masked_bits(model, size.plan.num_tested, bench.device)):
                yield Measurement("bits", "bit", bits, x=width, x_unit="channels", repeat=repeat)
            for repeat, (metric, unit, value) in _bill(model, bench.device):
                yield Measurement(metric, unit, value, x=width, x_unit="channels", repeat=repeat)
            bench.progress((i + 1) / len(size.widths))

    def finding(self, results: Results) -> str:
        width = max(results.xs("float32", "seconds"))
        seconds, flops, moved, kernels, energy = (
            results.mean("float32", metric, width)
            for metric in ("seconds", "flops", "bytes_moved", "kernels", "energy_j")
        )
        return (
            f"For 1,000 tokens an encoder of width {width:.0f} does {flops / 1e9:.1f} GFLOP, moves {moved / 1e6:,.0f} "
            f"MB in and out of {kernels:.0f} kernels, which takes {seconds * 1e3:.0f} ms and "
            f"{_energy_words(results, energy)}."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES[results.scale]
        plan = size.plan
        notes = [
            f"Models are {plan.num_layers} layers deep, of widths {', '.join(map(str, size.widths))}, and fill in 15% "
            f"of the bytes of real text, in windows of {WINDOW}. Each takes {plan.steps + plan.finishing_steps} steps "
            f"of {plan.batch_size} windows with AdamW at a peak rate of 0.002. Half the weights, or heads and neurons, "
            f"are pruned {plan.finishing_steps} steps before the end, by Wanda after it. MobileBERT has no teacher "
            "here, on which its paper relies, layer norms in place of its NoNorm, and sinusoids where the others turn "
            "queries and keys by RoPE.",
            "Kernels and bytes are those of PyTorch's operators, each tensor read and written once, with no cache; of "
            "the compiled graph only its kernels are counted.",
            "Weights at zero are stored and multiplied as any others, and save neither memory nor time; int4 weights "
            "are made float again before each product, and save memory alone.",
        ]
        bits = [results.mean("float32", "bits", x) for x in results.xs("float32", "bits")]
        if len(bits) > 1 and bits[-1] > bits[0] - _ALIKE_BITS:
            notes.append(
                f"After so few steps the wider plain encoder is no better than the narrow one ({bits[-1]:.2f} and "
                f"{bits[0]:.2f} bits per masked byte): what width is worth takes longer training to show."
            )
        if (counted := results.largest("float32", "energy_is_counted")) is not None and not counted:
            notes.append(
                "Joules are an estimate from counts of arithmetic and bytes at 45 nm (Horowitz 2014, "
                "doi:10.1109/ISSCC.2014.6757323), not what this machine drew: it has no counters that may be read."
            )
        ran = [
            f"{name} ({count:.0f})"
            for name in _INT8_BACKENDS
            if (count := results.largest("int8", f"layers_on_{name}"))
        ]
        if ran:
            notes.append(f"Back ends that won the race for int8 products, by layers: {', '.join(ran)}.")
        return tuple(notes)


@torch.no_grad()
def _bill(model: nn.Module, device: torch.device) -> Iterator[tuple[int, tuple[str, str, float]]]:
    """What 1,000 tokens cost: repeat, (metric, unit, value)."""
    tokens = thousand_tokens(device)
    plain = model.model if isinstance(model, CompiledModel) else model
    flops = count_flops(lambda: plain(tokens))
    yield 0, ("flops", "FLOP", flops)
    yield 0, ("weight_bytes", "B", stored_bytes(plain))
    for repeat, seconds in enumerate(measure_latency(lambda: model(tokens), device=device, repeats=9).times_s):
        yield repeat, ("seconds", "s", seconds)
    energy = counted_energy(lambda: model(tokens)) if device.type == "cpu" else None
    if isinstance(model, CompiledModel):
        yield 0, ("kernels", "1", count_compiled_kernels(lambda: model(tokens)))
    else:
        counted = count_kernels(lambda: model(tokens))
        yield 0, ("kernels", "1", counted.kernels)
        yield 0, ("bytes_moved", "B", counted.bytes_moved)
        energy = energy or _estimated(model, flops, counted.bytes_moved)
    if energy is not None:
        yield 0, ("energy_j", "J", energy.energy_j)
        yield 0, ("energy_is_counted", "1", int(energy.source == "counter"))
    for name, num in _int8_backends(model).items():
        yield 0, (f"layers_on_{name}", "1", num)


def _estimated(model: nn.Module, flops: int, bytes_moved: int) -> Energy:
    """An estimate in which the products of int8 layers are int8."""
    layers = [part for part in model.modules() if isinstance(part, Int8Linear)]
    in_int8 = sum(2 * _TOKENS * layer.in_features * layer.out_features for layer in layers)
    narrow = estimate_energy(flops=in_int8, bytes_moved=0, precision="int8")
    wide = estimate_energy(flops=flops - in_int8, bytes_moved=bytes_moved)
    return Energy(narrow.energy_j + wide.energy_j, "estimate")


def _int8_backends(model: nn.Module) -> dict[Int8Backend, int]:
    """How many layers each back end answers."""
    answering = [part.backend_for(_TOKENS) for part in model.modules() if isinstance(part, Int8Linear)]
    return {name: answering.count(name) for name in answering}


def _energy_words(results: Results, energy_j: float) -> str:
    source = "by the processor's counters" if results.largest("float32", "energy_is_counted") else "by estimate"
    return f"{energy_j * 1e3:.0f} mJ {source}"


EXPERIMENT = HighComputeCost()
