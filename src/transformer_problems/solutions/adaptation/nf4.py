"""NF4: four bits a weight, in steps made for weights that are normally distributed."""

from dataclasses import dataclass
from functools import cache

import torch
from scipy.stats import norm
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

BLOCK = 64
"""Weights that share a scale."""

_SCALES_BLOCK = 256  # scales that share one of their own
_TAIL = 0.9677083  # the outermost quantile, such that 15 steps leave as much probability beyond as between


@dataclass(frozen=True, slots=True, eq=False)
class NF4Codes:
    """A matrix in four bits a weight, its scales rounded once more: some 4.13 bits a weight in all.

    Args:
        packed: Codes, two to a byte, the first in the upper half, [ceil(n / 2)] uint8.
        scales: Each block's largest magnitude less their mean, in steps of `steps`, [n / 64] int8.
        steps: Size of a step for each 256 scales, [n / 64 / 256] float32.
        mean: Mean of all scales, [] float32.
    """

    packed: Tensor
    scales: Tensor
    steps: Tensor
    mean: Tensor


@cache
def nf4_values() -> Tensor:
    """The 16 values of a code, from -1 to 1, 0 among them: midway quantiles of a normal distribution, [16] float32.

    Eight steps lead up from 0 and seven down, so that 0, which padding and pruning need, is exact.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.
    """
    up = norm.ppf(torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64).numpy())[:-1]
    down = -norm.ppf(torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64).numpy())[:-1]
    values = torch.tensor(sorted([*up, 0.0, *down]), dtype=torch.float64)
    return (values / values.max()).float()


def quantize_nf4(weight: Tensor) -> NF4Codes:
    """The nearest codes of a tensor, block by block of its flattened values; the last block may be short.

    Raises:
        ArgumentError: If it is empty or holds what is not finite.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3: NF4 and double quantization.
        Differs from the paper: the scales' second rounding is to 8-bit integers, not 8-bit floats.
    """
    if not weight.numel() or not torch.isfinite(weight).all():
        raise ArgumentError("weight must hold finite values, at least one. Load or train the model again.")
    flat = weight.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)  # [n / 64]
    mean = scales.mean()
    centred = torch.nn.functional.pad(scales - mean, (0, -len(scales) % _SCALES_BLOCK)).view(-1, _SCALES_BLOCK)
    steps = centred.abs().amax(dim=1) / 127
    rounded = (centred / steps.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    rounded = rounded.view(-1)[: len(scales)].clone()  # without the padding's storage
    kept = _scales(rounded, steps, mean)
    shares = blocks / kept.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    values = nf4_values().to(flat.device)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8).view(-1)[: len(flat)]
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return NF4Codes(pairs[:, 0] << 4 | pairs[:, 1], rounded, steps, mean)


def dequantize_nf4(codes: NF4Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor that the codes stand for."""
    numel = shape.numel()
    pairs = torch.stack([codes.packed >> 4, codes.packed & 15], dim=1).view(-1)[:numel]
    values = nf4_values().to(pairs.device)[pairs.int()]
    scales = _scales(codes.scales, codes.steps, codes.mean).repeat_interleave(BLOCK)[:numel]
    return (values * scales).to(dtype).view(shape)


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Lengths of `packed`, `scales` and `steps` for so many weights."""
    require_positive_int(numel=numel)
    num_blocks = -(-numel // BLOCK)
    return -(-numel // 2), num_blocks, -(-num_blocks // _SCALES_BLOCK)


def _scales(rounded: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    return rounded.float() * steps.repeat_interleave(_SCALES_BLOCK)[: len(rounded)] + mean
