"""Does it make use of the machine?"""

from collections.abc import Mapping

import torch

from transformer_problems.checkpoints.checkup import Visit, estimate, exactly
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import KernelCount, count_kernels
from transformer_problems.lab.meters.latency import measure_latency

_LENGTH = 64
_FEWEST, _MOST = 8, 64  # inputs of a pass
_BUSY_S = 0.02  # at the machine's peak: a shorter pass would mostly measure how long a launch takes
_LEAST_KERNELS = 8  # of a layer: up to seven products with weights, and one kernel for attention


class UseOfTheMachine:
    """The share of the machine's ceiling that a pass reaches, and how many kernels a layer launches.

    The pass takes 8 inputs, and of a small model up to 64, so that the machine has enough to do. The ceiling counts
    the arithmetic of its products, and its weights once.
    """

    problem = 17
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, machine = visit.subject, visit.roofline
        pair = visit.inputs(2, _LENGTH)
        flops = count_flops(lambda: subject.run(pair)) / 2
        counted = count_kernels(lambda: subject.run(pair))
        per_layer = counted.kernels / _depth(subject)
        batch = round(min(max(_BUSY_S * machine.flops_per_s / flops, _FEWEST), _MOST))
        shares = {}
        for size in (batch // 8, batch // 4, batch // 2, batch):
            inputs = visit.inputs(size, _LENGTH)
            sample = measure_latency(
                lambda inputs=inputs: subject.run(inputs),  # type: ignore[misc]
                device=subject.device,
                repeats=4 if size == batch else 1,
                warmup=1,
            )
            shares[size] = [machine.share(time_s, size * flops, subject.weight_bytes) for time_s in sample.times_s]
            visit.progress(size / batch)
        share = estimate(shares[batch])
        return Examination(
            {"kernels_per_layer": exactly(per_layer), "roofline_share": share},
            f"{batch} inputs at once use {share.value:.0%} of this machine; a layer takes {per_layer:.0f} kernels",
            _remedies(subject, counted, per_layer, share.value),
            Curve(
                "The share of the machine that a pass reaches, by inputs at once",
                "inputs at once",
                "share of the ceiling (%)",
                tuple((float(size), 100 * sum(found) / len(found)) for size, found in shares.items()),
                x_log=True,
            ),
            {
                "peak_gflop_per_s": machine.flops_per_s / 1e9,
                "reached_gflop_per_s": share.value * machine.flops_per_s / 1e9,
                "bytes_moved_per_flop": counted.bytes_moved / (2 * flops),
            },
        )


def _depth(subject: Subject) -> int:
    """Layers, one after the other; Swin's config says how many each stage has."""
    depths = getattr(subject.config, "depths", None)
    return sum(depths) if depths else subject.num_layers


def _remedies(subject: Subject, counted: KernelCount, per_layer: float, share: float) -> tuple[Remedy, ...]:
    """Factors are in kernels a layer, or in bytes where the score matrix is what moves."""
    found = [
        Remedy(
            "custom-cuda-kernels",
            f"{_LEAST_KERNELS} kernels a layer for {per_layer:.0f}, fused; at most {max(1.0, 1 / share):.1f}x faster",
            max(1.0, per_layer / _LEAST_KERNELS),
        ),
    ]
    if getattr(subject.config, "_attn_implementation", None) != "eager":
        return (*found, Remedy("fused-mha-kernels", "queries, keys and values in one product, 2 kernels a layer less"))
    # Scores are written, then read and written by mask and softmax, then read: six times, of two texts.
    scores = 6 * 2 * subject.num_layers * subject.num_heads * _LENGTH**2 * subject.dtype.itemsize
    factor = max(1.0, counted.bytes_moved / max(counted.bytes_moved - scores, counted.bytes_moved / 10))
    told = f"{factor:.1f}x fewer bytes at {_LENGTH} tokens, more the longer the input"
    return (
        *found,
        Remedy("flash-attention", told, factor),
        Remedy("fused-mha-kernels", "attention in one kernel, about 6 a layer less", per_layer / max(per_layer - 6, 1)),
        Remedy("xformers", told, factor),
    )


CHECKUP = UseOfTheMachine()
