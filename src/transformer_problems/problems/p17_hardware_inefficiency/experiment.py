"""How near one attention layer comes to what the machine can do, and what keeps it from there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.roofline import measure_roofline
from transformer_problems.lab.results import Results
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.fused_attention import FusedSelfAttention
from transformer_problems.solutions.attention.kernel_softmax import KernelSoftmaxAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.xformers_attention import XFormersAttention

_WIDTH, _HEADS = 256, 4
_OPS = {
    "eager": DenseAttention,
    "flash": FlashAttention,
    "xformers": XFormersAttention,
    "kernel": KernelSoftmaxAttention,
}


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    lengths: tuple[int, ...]  # tokens, doubling
    repeats: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(tuple(64 << i for i in range(4)), repeats=5, seeds=1),
    "standard": _Size(tuple(64 << i for i in range(6)), repeats=9, seeds=1),
    "full": _Size(tuple(64 << i for i in range(8)), repeats=15, seeds=3),
}


def build_layer(arm: str, device: torch.device | str = "cpu") -> nn.Module:
    """The attention layer of an arm; all hold the same weights where they were seeded alike."""
    if arm == "fused":
        return FusedSelfAttention.from_layer(SelfAttention(_WIDTH, _HEADS, device=device))
    return SelfAttention(_WIDTH, _HEADS, op=_OPS[arm](), device=device)


def least_work(length: int) -> tuple[int, int]:
    """FLOPs and bytes that no layer can do without, forward and backward, at so many tokens.

    Forward the four projections, and scores and sums over the pairs that causality leaves, backward two products for
    each; x, the output and their gradients once each, x once more, weights twice and their gradients once, in float32.
    """
    forward = 8 * length * _WIDTH**2 + 2 * _WIDTH * length * (length + 1)
    numbers = 5 * length * _WIDTH + 3 * 4 * _WIDTH**2
    return 3 * forward, 4 * numbers


class HardwareInefficiency:
    """One causal attention layer in float32, projections and all, forward and backward, at doubling lengths."""

    problem = 17
    arms = (
        Arm("eager", "separate operations"),
        Arm("flash", "FlashAttention", "flash-attention", lead=True),
        Arm("fused", "Fused layer", "fused-mha-kernels", lead=True),
        Arm("xformers", "xFormers' call", "xformers", lead=True),
        Arm("kernel", "Own softmax kernel", "custom-cuda-kernels", lead=True),
    )
    chart = Chart(
        metric="share",
        problem_title="What attention makes of the machine",
        solutions_title="The same with each solution",
        x_label="sequence length, tokens",
        y_label="share of the machine's ceiling",
        better="higher",
        x_log=True,
        y_from=0.0,
    )
    columns = (
        Column("seconds", "seconds at longest", at="last", better="lower"),
        Column("share", "share of the ceiling", at="last", better="higher"),
        Column("own_share", "share, by its own bytes", at="last", better="higher"),
        Column("flops", "FLOPs", at="last"),
        Column("bytes_moved", "bytes moved", at="last", better="lower"),
        Column("kernels", "kernels", at="last", better="lower"),
        Column("seconds", "seconds at 64 tokens", at=64.0, better="lower"),
        Column("share", "share at 64 tokens", at=64.0, better="higher"),
    )
    gains = (
        Effect("seconds", "ratio", ("less time", "more time"), "last", "at {x:,.0f} tokens"),
        Effect("bytes_moved", "ratio", ("fewer bytes moved", "more bytes moved"), "last"),
        Effect("kernels", "ratio", ("fewer kernels", "more kernels"), "last"),
    )
    costs = (
        Effect("seconds", "ratio", ("less time", "more time"), 64.0, "at 64 tokens"),
        Effect("flops", "ratio", ("less arithmetic", "more arithmetic"), "last"),
        Effect("difference", "difference", ("less rounding error", "more rounding error"), "last"),
    )
    shared_examples: frozenset[str] = frozenset()

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        machine = measure_roofline(bench.device, torch.float32)
        yield Measurement("peak_flops_per_s", "FLOP/s", machine.flops_per_s)
        yield Measurement("peak_bytes_per_s", "B/s", machine.bytes_per_s)
        with seeded(bench.cell.seed):
            layer = build_layer(bench.cell.arm).to(bench.device)
        for i, length in enumerate(size.lengths):
            x = torch.randn(1, length, _WIDTH, generator=generator(bench.cell.seed, "x", length)).to(bench.device)
            yield from _costs(layer, x, bench.device, size.repeats)
            bench.progress((i + 1) / len(size.lengths))
        yield from _answering(layer, x)

    def finding(self, results: Results) -> str:
        lengths = results.xs("eager", "share")
        shares = [f"{results.mean('eager', 'share', x):.0%} at {x:,.0f} tokens" for x in (lengths[0], lengths[-1])]
        flops, moved, kernels = (results.mean("eager", m, lengths[-1]) for m in ("flops", "bytes_moved", "kernels"))
        ridge = results.mean("eager", "peak_flops_per_s") / results.mean("eager", "peak_bytes_per_s")
        return (
            f"Attention written as separate operations, {kernels:.0f} of them forward and backward, does "
            f"{flops / moved:.1f} FLOPs for each byte that it moves at {lengths[-1]:,.0f} tokens, where this machine "
            f"needs {ridge:.0f} to be limited by arithmetic. It reaches {shares[0]} and {shares[1]} of the ceiling."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        notes = [
            f"One causal layer of width {_WIDTH} with {_HEADS} heads and without biases, batch 1, float32, the same "
            "weights in every arm; gradients of the input and of all weights. FLOPs are those of matrix products; of "
            "fused operators causal attention counts in whole, whether they skip what is masked or not. FLOPs for each "
            "byte are those of a whole step: even where they are more than the machine needs, the operations between "
            "two products, run alone, do none of these FLOPs and wait for memory.",
            "Kernels and bytes are those of operators, ours and PyTorch's, each tensor read and written once, with no "
            "cache; what an operator does inside is not seen.",
            "The ceiling is that of the work itself, the same for every arm: the products of forward and backward pass "
            "once, over pairs that causality leaves, and what goes in and out once. By its own bytes an arm is "
            "measured against all that it counts, so a slow one that moves much may come near its ceiling.",
        ]
        arms = [arm for arm in ("eager", *_OPS, "fused") if results.samples(arm, "peak_flops_per_s") is not None]
        if arms:
            peak, traffic = (results.mean(arms[0], m) for m in ("peak_flops_per_s", "peak_bytes_per_s"))
            notes.append(
                f"Measured here: {peak / 1e9:,.0f} GFLOP/s in a large product of float32 matrices, and "
                f"{traffic / 1e9:,.1f} GB/s in a large copy, read and written."
            )
        if results.largest("xformers", "by_own_path"):
            notes.append(
                "xFormers' operator needs CUDA and the package, and did not run: its call was answered by "
                "MemoryEfficientAttention, of which its figures and verdict tell."
            )
        elif results.largest("xformers", "by_own_path") is not None:
            notes.append("xFormers' operator answered its call.")
        slower = [arm for arm in ("fused", "kernel") if results.largest(arm, "by_own_path")]
        if slower:
            notes.append(f"PyTorch's operators answered in place of the kernels of: {', '.join(slower)}.")
        return tuple(notes)


def _costs(layer: nn.Module, x: Tensor, device: torch.device, repeats: int) -> Iterator[Measurement]:
    """What a step takes, in arithmetic, traffic, launches and seconds, and how exact its output is."""
    length = x.shape[1]
    x.requires_grad_()
    grad = torch.ones_like(x)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    def told(metric: str, unit: str, value: float, repeat: int = 0) -> Measurement:
        return Measurement(metric, unit, value, x=length, x_unit="tokens", repeat=repeat)

    flops, counted, least = count_flops(step), count_kernels(step), least_work(length)
    yield told("flops", "FLOP", flops)
    yield told("bytes_moved", "B", counted.bytes_moved)
    yield told("kernels", "1", counted.kernels)
    yield told("difference", "1", _difference(layer, x.detach()))
    machine = measure_roofline(device, torch.float32)
    for repeat, seconds in enumerate(measure_latency(step, device=device, repeats=repeats).times_s):
        yield told("seconds", "s", seconds, repeat)
        yield told("share", "1", machine.share(seconds, *least), repeat)
        yield told("own_share", "1", machine.share(seconds, flops, counted.bytes_moved), repeat)


@torch.no_grad()
def _difference(layer: nn.Module, x: Tensor) -> float:
    """Of the output from dense attention with the same weights in float64, relative to its largest number."""
    wide = SelfAttention(_WIDTH, _HEADS, op=DenseAttention(), device=x.device, dtype=torch.float64)
    weights: dict[str, Tensor] = dict(layer.named_parameters())
    if isinstance(layer, FusedSelfAttention):
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        weights |= dict(zip(names, weights.pop("qkv_proj.weight").chunk(3), strict=True))
    wide.load_state_dict(weights)
    expected = wide(x.double())
    return float((layer(x) - expected).abs().max() / expected.abs().max())


def _answering(layer: nn.Module, x: Tensor) -> Iterator[Measurement]:
    """Whether something other than the arm's own kernel answered."""
    if isinstance(layer, FusedSelfAttention):
        yield Measurement("by_own_path", "1", int(layer.backend_for(x) == "torch"))
    elif isinstance(op := getattr(layer, "op", None), XFormersAttention):
        yield Measurement("by_own_path", "1", int(op.last_run == "own"))
    elif isinstance(op, KernelSoftmaxAttention):
        yield Measurement("by_own_path", "1", int(op.backend_for(x) == "torch"))


EXPERIMENT = HardwareInefficiency()
