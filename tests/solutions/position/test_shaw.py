"""ShawRelative against the formula, pair by pair."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.shaw import ShawRelative


def naive(q: Tensor, table: Tensor, q_positions: list[int], k_positions: list[int], limit: int) -> Tensor:
    rows = [
        torch.stack([q[..., n, :] @ table[max(-limit, min(limit, j - i)) + limit] for j in k_positions], dim=-1)
        for n, i in enumerate(q_positions)
    ]
    return torch.stack(rows, dim=-2) * q.shape[-1] ** -0.5


@pytest.mark.parametrize("max_distance", [1, 4, 50])
def test_equals_the_formula_in_outputs_and_gradients(max_distance: int) -> None:
    torch.manual_seed(0)
    encoding = ShawRelative(5, max_distance=max_distance, dtype=torch.float64)
    q = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    q_positions, k_positions = torch.arange(6, 13), torch.arange(13)
    ours = encoding.bias(q, q_positions, k_positions)
    theirs = naive(q, encoding.weight, q_positions.tolist(), k_positions.tolist(), max_distance)
    weight = torch.randn_like(ours)
    inputs = (q, encoding.weight)
    # float64 sums of a few dozen terms
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), inputs)
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    encoding = ShawRelative(3, max_distance=2, dtype=torch.float64)
    q = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(4)

    def run(q: Tensor, weight: Tensor) -> Tensor:
        return encoding.bias(q, positions, positions)

    assert torch.autograd.gradcheck(run, (q, encoding.weight))


def test_no_distance_to_clip_to_is_refused() -> None:
    with pytest.raises(ArgumentError, match="max_distance must be positive; got 0"):
        ShawRelative(8, max_distance=0)
