"""XPos against the formula, at the ends of its reach, and through a cache."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import SequenceTooLongError
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.xpos import XPos


def naive_scores(q: Tensor, k: Tensor, q_positions: list[int], k_positions: list[int], scale_base: float) -> Tensor:
    """Sum over pairs of zeta^(distance / scale_base) times the turned product, pair by pair."""
    half = q.shape[-1] // 2
    scores = q.new_zeros(*q.shape[:-1], k.shape[-2])
    for n, q_position in enumerate(q_positions):
        for m, k_position in enumerate(k_positions):
            distance = q_position - k_position
            for i in range(half):
                decay = ((i / half + 0.4) / 1.4) ** (distance / scale_base)
                angle = distance * 10_000 ** (-i / half)
                a, b, c, d = q[..., n, i], q[..., n, i + half], k[..., m, i], k[..., m, i + half]
                turned = (a * c + b * d) * math.cos(angle) + (a * d - b * c) * math.sin(angle)
                scores[..., n, m] += decay * turned
    return scores


def scores(encoding: XPos, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    rotated_q, rotated_k = encoding.rotate(q, k, q_positions, k_positions)
    return rotated_q @ rotated_k.mT


@pytest.mark.parametrize("scale_base", [16.0, 512.0])
def test_equals_the_formula_in_outputs_and_gradients(scale_base: float) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 13, 6, dtype=torch.float64, requires_grad=True)
    q_positions, k_positions = torch.arange(20, 27), torch.arange(14, 27)
    ours = scores(XPos(6, scale_base=scale_base), q, k, q_positions, k_positions)
    theirs = naive_scores(q, k, q_positions.tolist(), k_positions.tolist(), scale_base)
    weight = torch.randn_like(ours)
    # angles (below 27 rad) and factors are computed in float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours_grads = torch.autograd.grad((ours * weight).sum(), (q, k))
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), (q, k))
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-4, rtol=0)  # 13 such terms summed


def test_scores_do_not_depend_on_the_centre() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 9, 8, dtype=torch.float64)
    positions = torch.arange(100, 109)
    whole = scores(XPos(8), q, k, positions, positions)
    # the exponent is a float32 of size 8 at most: 2^-21 relative
    torch.testing.assert_close(scores(XPos(8, centre=4000), q, k, positions, positions), whole, atol=1e-5, rtol=0)


def test_far_keys_count_less() -> None:
    q = k = torch.ones(1, 1, 400, 16)
    positions = torch.arange(400)
    turned, undone = scores(XPos(16, scale_base=32), q, k, positions, positions), torch.tensor(16.0)
    assert turned[0, 0, 399, 0].abs() < 0.2 * undone
    torch.testing.assert_close(turned[0, 0].diagonal(), undone.expand(400), rtol=1e-5, atol=0)  # float32 factors cancel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_to_the_end_of_its_reach_and_refused_beyond(dtype: torch.dtype) -> None:
    encoding = XPos(8)
    reach = int(encoding.reach(dtype))
    positions = torch.tensor([-reach, reach])
    q = torch.randn(1, 1, 2, 8, dtype=dtype, requires_grad=True)
    result = scores(encoding, q, q, positions, positions)
    result.sum().backward()
    assert result.isfinite().all()
    assert q.grad is not None and q.grad.isfinite().all()
    with pytest.raises(SequenceTooLongError, match=f"within {encoding.reach(dtype):.0f} of centre=0 in {dtype}"):
        encoding.rotate(q, q, positions, torch.tensor([0, reach + 1]))


def test_a_cache_far_from_the_centre_gives_what_the_whole_gives() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, num_heads=2, position=XPos(8, centre=1000)).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    state, outputs = attention.initial_state(1), []
    for chunk in x.split([1, 20, 19], dim=1):
        y, state = attention.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x), atol=1e-12, rtol=0)  # float64 sums


def test_gradcheck() -> None:
    q, k = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(4)
    assert torch.autograd.gradcheck(lambda q, k: XPos(4).rotate(q, k, positions, positions), (q, k))
