"""NF4: four bits a weight, in steps made for weights that are normally distributed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

BLOCK = 64
"""Weights that share a scale, where nothing else is asked for."""

_SCALES_BLOCK = 256  # scales that share one of their own
_TAIL = 0.9677083  # the outermost quantile, such that 15 steps leave as much probability beyond as between
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, eq=False)
class NF4Codes:
    """A matrix in four bits a weight; with its scales rounded once more, some 4.13 bits a weight in all.

    Args:
        packed: Codes, two to a byte, the first in the upper half, [ceil(n / 2)] uint8.
        scales: Each block's largest magnitude, [blocks] float32; or that less their mean, in `steps`, [blocks] int8.
        steps: Size of a step for each 256 scales, [ceil(blocks / 256)] float32; None where scales are not rounded.
        mean: Mean of all scales, [] float32; None where scales are not rounded.
        block_size: Weights that share a scale.
    """

    packed: Tensor
    scales: Tensor
    steps: Tensor | None = None
    mean: Tensor | None = None
    block_size: int = BLOCK


def _levels() -> list[float]:
    up, down = (_upper_quantiles(number) for number in (8, 7))
    return [value / max(up) for value in sorted([*up, 0.0, *(-value for value in down)])]


def _upper_quantiles(number: int) -> list[float]:
    probabilities = torch.linspace(_TAIL, 0.5, number + 1, dtype=torch.float64)[:-1]  # the last stands for 0
    quantiles: list[float] = torch.special.ndtri(probabilities).tolist()
    return quantiles


_LEVELS = _levels()


def nf4_values(device: torch.device | None = None) -> Tensor:
    """The 16 values of a code, from -1 to 1, 0 among them: midway quantiles of a normal distribution, [16] float32.

    Eight steps lead up from 0 and seven down, so that 0, which padding and pruning need, is exact.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.
    """
    return torch.tensor(_LEVELS, dtype=torch.float32, device=device)


def quantize_nf4(weight: Tensor, *, block_size: int = BLOCK, double_quant: bool = True) -> NF4Codes:
    """The nearest codes of a tensor, block by block of its flattened values; the last block may be short.

    Args:
        weight: Of any shape.
        block_size: Weights that share a scale.
        double_quant: Scales are rounded too, 256 with a step of their own. One of them far above the others leaves
            those few steps; False keeps every scale in float32, at 0.37 more bits a weight in blocks of 64.

    Raises:
        ArgumentError: If it is empty or holds what is not finite in float32, or a size is not positive.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, section 3: NF4 and double quantization.
        Differs from the paper: the scales' second rounding is to 8-bit integers, not 8-bit floats.
    """
    require_positive_int(block_size=block_size)
    flat = weight.detach().reshape(-1).float()
    if not len(flat) or not torch.isfinite(flat).all():
        raise ArgumentError("weight must hold finite values, at least one. Load or train the model again.")
    blocks = _in_blocks(flat, block_size)
    largest = blocks.abs().amax(dim=1)
    scales, steps, mean = _rounded(largest) if double_quant else (largest, None, None)
    shares = blocks / _scales(scales, steps, mean).clamp_min(_TINY)[:, None]
    values = nf4_values(flat.device)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8).view(-1)[: len(flat)]
    pairs = _in_blocks(codes, 2)
    return NF4Codes(pairs[:, 0] << 4 | pairs[:, 1], scales, steps, mean, block_size)


def dequantize_nf4(codes: NF4Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor that the codes stand for."""
    numel, values = shape.numel(), nf4_values(codes.packed.device)
    both = torch.cartesian_prod(values, values).view(torch.float64)  # the two floats of each byte, read as one number
    found = both[codes.packed.int()].view(torch.float32).view(-1)[:numel]
    scales = _scales(codes.scales, codes.steps, codes.mean)
    whole = numel - numel % codes.block_size
    found[:whole].view(-1, codes.block_size).mul_(scales[: whole // codes.block_size, None])
    found[whole:].mul_(scales[-1])
    return found.to(dtype).view(shape)


def packed_sizes(numel: int, block_size: int = BLOCK) -> tuple[int, int, int]:
    """Lengths of `packed`, `scales` and `steps` for so many weights."""
    require_positive_int(numel=numel, block_size=block_size)
    num_blocks = -(-numel // block_size)
    return -(-numel // 2), num_blocks, -(-num_blocks // _SCALES_BLOCK)


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [ceil(n / size), size], filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _rounded(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of blocks as `NF4Codes` keeps them: in whole steps from their mean."""
    mean = largest.mean()
    centred = _in_blocks(largest - mean, _SCALES_BLOCK)
    steps = centred.abs().amax(dim=1) / 127
    rounded = (centred / steps.clamp_min(_TINY)[:, None]).round().to(torch.int8)
    return rounded.view(-1)[: len(largest)].clone(), steps, mean  # without the padding's storage


def _scales(scales: Tensor, steps: Tensor | None, mean: Tensor | None) -> Tensor:
    """What each block is multiplied by, never below zero, which rounding may fall short of."""
    if steps is None or mean is None:
        return scales
    return (scales.float() * steps.repeat_interleave(_SCALES_BLOCK)[: len(scales)] + mean).clamp_min(0)
