"""The published table, the bits a weight takes, and the nearest code."""

import warnings

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.adaptation.nf4 import (
    BLOCK,
    dequantize_nf4,
    nf4_values,
    packed_sizes,
    quantize_nf4,
)

# Dettmers et al. 2023, arXiv:2305.14314, appendix E
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_the_values_are_the_published_ones() -> None:
    # the outermost quantile is known to seven digits
    torch.testing.assert_close(nf4_values(), torch.tensor(PUBLISHED), rtol=0, atol=2e-6)


@pytest.mark.parametrize("block_size", [BLOCK, 7])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 9), (41, 50)])
def test_every_weight_takes_the_nearest_code_of_its_block(
    shape: tuple[int, ...], double_quant: bool, block_size: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    codes = quantize_nf4(weight, block_size=block_size, double_quant=double_quant)
    back = dequantize_nf4(codes, weight.shape, torch.float32)
    values, flat = nf4_values(), weight.flatten()
    for start in range(0, len(flat), block_size):
        block, got = flat[start : start + block_size], back.flatten()[start : start + block_size]
        scale = got.abs().max()  # the largest takes the outermost code, so this is the scale as it was rounded
        best = (block[:, None] - scale * values).abs().min(dim=1).values
        torch.testing.assert_close((block - got).abs(), best, rtol=1e-5, atol=1e-6)
        # scales differ by no more than the largest, and a step of theirs is at most 1/127 of that
        assert abs(scale - block.abs().max()) <= (weight.abs().max() / 127 if double_quant else 0)


def test_a_weight_takes_some_four_bits_and_an_eighth() -> None:
    weight = torch.randn(512, 512)
    codes = quantize_nf4(weight)
    num_bytes = sum(part.nbytes for part in (codes.packed, codes.scales, codes.steps, codes.mean))
    # 4, 8 bits in 64 for a scale, 32 in 64 * 256 for its step, and one mean
    assert num_bytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    single = quantize_nf4(weight, double_quant=False)
    assert (single.packed.nbytes + single.scales.nbytes) * 8 / weight.numel() == 4 + 32 / 64
    assert single.steps is None and single.mean is None
    assert packed_sizes(65) == (33, 2, 1) and packed_sizes(64 * 257, 64) == (32 * 257, 257, 2)


@pytest.mark.peer
def test_codes_and_values_are_those_of_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own loading
        quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    theirs = quantization.to_nf4(weight, block_size=64, scaler_block_size=256)
    # a share that falls in the middle of two codes, as they are rounded, may take either
    exact, rounded = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    assert (exact.packed == theirs.quantized_data.view(-1)).float().mean() > 0.999
    # we choose codes after rounding the scales, they before, so that ours are as near or nearer
    back = dequantize_nf4(rounded, weight.shape, torch.float32)
    assert (back - weight).norm() <= (theirs.get_original_weight() - weight).norm()
    # scales of 8 bits are off by 1/254 of their range at most, in both
    assert (back - theirs.get_original_weight()).norm() < 0.03 * weight.norm()


def test_a_scale_far_above_the_others_takes_their_steps_unless_scales_are_kept() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 64) * 0.01
    weight[0] *= 1e4
    for double_quant, least, most in ((True, 0.5, 1.0), (False, 0.0, 0.15)):
        back = dequantize_nf4(quantize_nf4(weight, double_quant=double_quant), weight.shape, torch.float32)
        assert least <= (back - weight)[1:].norm() / weight[1:].norm() <= most


def test_zeros_stay_zeros_and_equal_scales_are_exact() -> None:
    weight = torch.tensor([[0.0] * 63 + [1.0], [0.0] * 64, [-1.0] * 64])
    back = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    torch.testing.assert_close(back[[0, 2]], weight[[0, 2]], rtol=1e-2, atol=0)
    assert back[1].abs().max() < 1e-2


@pytest.mark.parametrize(
    "weight",
    [torch.empty(0, 3), torch.tensor([1.0, float("nan")]), torch.tensor([1e300], dtype=torch.float64)],
)
def test_weights_without_codes_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="weight must hold finite values"):
        quantize_nf4(weight)
    with pytest.raises(ArgumentError, match="block_size must be positive"):
        quantize_nf4(torch.ones(3), block_size=0)
