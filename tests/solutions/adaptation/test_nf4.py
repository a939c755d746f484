"""The published table, the bits a weight takes, and the nearest code."""

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.adaptation.nf4 import BLOCK, dequantize_nf4, nf4_values, quantize_nf4

# Dettmers et al. 2023, arXiv:2305.14314, appendix E
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_the_values_are_the_published_ones() -> None:
    # the outermost quantile is known to seven digits
    torch.testing.assert_close(nf4_values(), torch.tensor(PUBLISHED), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 9), (300, 200)])
def test_every_weight_takes_the_nearest_code_of_its_block(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    codes = quantize_nf4(weight)
    back = dequantize_nf4(codes, weight.shape, torch.float32)
    values, flat = nf4_values(), weight.flatten()
    for start in range(0, len(flat), BLOCK):
        block, got = flat[start : start + BLOCK], back.flatten()[start : start + BLOCK]
        scale = got.abs().max()  # the largest takes the outermost code, so this is the scale as it was rounded
        best = (block[:, None] - scale * values).abs().min(dim=1).values
        torch.testing.assert_close((block - got).abs(), best, rtol=1e-5, atol=1e-6)
        # scales differ by one at most, so a step of theirs is at most 1/127 of the largest difference
        assert abs(scale - block.abs().max()) <= (weight.abs().max()) / 127


def test_a_weight_takes_some_four_bits_and_an_eighth() -> None:
    weight = torch.randn(512, 512)
    codes = quantize_nf4(weight)
    num_bytes = sum(part.nbytes for part in (codes.packed, codes.scales, codes.steps, codes.mean))
    # 4, 8 bits in 64 for a scale, 32 in 64 * 256 for its step, and one mean
    assert num_bytes * 8 / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_zeros_stay_zeros_and_equal_scales_are_exact() -> None:
    weight = torch.tensor([[0.0] * 63 + [1.0], [0.0] * 64, [-1.0] * 64])
    back = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    torch.testing.assert_close(back[[0, 2]], weight[[0, 2]], rtol=1e-2, atol=0)
    assert back[1].abs().max() < 1e-2


@pytest.mark.parametrize("weight", [torch.empty(0, 3), torch.tensor([1.0, float("nan")])])
def test_weights_without_codes_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="weight must hold finite values"):
        quantize_nf4(weight)
