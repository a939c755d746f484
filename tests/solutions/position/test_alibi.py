"""ALiBi against the paper's slopes and Transformers' Bloom."""

import pytest
import torch

from transformer_problems.solutions.position.alibi import ALiBi, alibi_slopes


@pytest.mark.peer
@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 25])
def test_equals_bloom_after_softmax(num_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    length = 101
    scores = torch.randn(num_heads, length, length)
    positions = torch.arange(length)
    ours = ALiBi(num_heads).bias(torch.empty(1, num_heads, length, 4), positions, positions)
    theirs = build_alibi_tensor(torch.ones(1, length), num_heads, torch.float32)
    causal = torch.full((length, length), float("-inf")).triu(1)
    # theirs adds slope * j, which differs from -slope * (i - j) by a constant a row; scores reach 100 in float32
    torch.testing.assert_close(
        (scores + ours + causal).softmax(-1), (scores + theirs + causal).softmax(-1), atol=100 * 2**-23, rtol=0
    )


def test_eight_heads_have_the_papers_slopes() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("num_heads", range(1, 40))
def test_every_head_has_a_slope_of_its_own(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes)) == num_heads
    assert all(0 < slope < 1 for slope in slopes)


def test_both_sides_are_alike() -> None:
    positions = torch.arange(7)
    bias = ALiBi(4).bias(torch.empty(1, 4, 7, 2), positions, positions)
    assert torch.equal(bias, bias.mT)
    assert bias[0, 3].tolist() == [-0.25 * abs(3 - j) for j in range(7)]
