"""DenseAttention against the formula written out, and against PyTorch's own kernel."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.position.alibi import ALiBi

HEADS, DIM = 4, 8


def draw(num_queries: int, num_keys: int, *, groups: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(2, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    return heads(HEADS, num_queries), heads(groups, num_keys), heads(groups, num_keys)


def naive(q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Row by row; a row without a key gives zeros."""
    batch, heads, num_queries, dim = q.shape
    repeats = heads // k.shape[1]
    allowed = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    allowed = allowed.expand(batch, heads, num_queries, k.shape[2])
    rows = []
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h] @ k[b, h // repeats].T / dim**0.5
            if bias is not None:
                scores = scores + bias.expand(batch, heads, *scores.shape)[b, h]
            weights = torch.where(allowed[b, h], scores.exp(), 0.0)
            total = weights.sum(1, keepdim=True)
            rows.append(weights / torch.where(total == 0, 1.0, total) @ v[b, h // repeats])
    return torch.stack(rows).view(batch, heads, num_queries, dim)


def check_close(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    # float64 sums of about a hundred terms of order one
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(ours_grads, expected_grads, atol=1e-11, rtol=0)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(length: int, groups: int) -> None:
    q, k, v = draw(length, length, groups=groups)
    check_close(DenseAttention()(q, k, v), naive(q, k, v), (q, k, v))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 64), (7, 20), (64, 64), (20, 7)])
def test_causal_queries_are_the_last_ones(num_queries: int, num_keys: int) -> None:
    q, k, v = draw(num_queries, num_keys)
    row, column = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    allowed = column <= row + num_keys - num_queries
    check_close(DenseAttention()(q, k, v, is_causal=True), naive(q, k, v, allowed=allowed), (q, k, v))


def test_masks_and_rows_without_a_key() -> None:
    q, k, v = draw(20, 20)
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0, 0, 3] = False
    y = DenseAttention()(q, k, v, mask=mask)
    assert (y[0, :, 3] == 0).all()
    check_close(y, naive(q, k, v, allowed=mask), (q, k, v))


def test_position_bias_is_added_to_the_scores() -> None:
    q, k, v = draw(20, 20)
    positions = torch.arange(20)
    bias = PositionBias(ALiBi(HEADS), q, positions, positions)
    check_close(DenseAttention()(q, k, v, bias=bias), naive(q, k, v, bias=bias.dense()), (q, k, v))


@pytest.mark.peer
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_pytorch(is_causal: bool) -> None:
    q, k, v = draw(100, 100)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    check_close(DenseAttention()(q, k, v, is_causal=is_causal), theirs, (q, k, v))


def test_bfloat16() -> None:
    q, k, v = (x.detach() for x in draw(64, 64))
    half = DenseAttention()(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    # a bfloat16 step is 2^-8: scores up to 4 are off by 2^-7 or less, then inputs, weights and output by 2^-9 each
    torch.testing.assert_close(half.double(), DenseAttention()(q, k, v), atol=2**-5, rtol=0)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = torch.ones(1, 4, 2, 8), torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8)
    with pytest.raises(ArgumentError, match="num_heads must be a multiple of num_kv_heads; got 4 and 3"):
        DenseAttention()(q, k, v)


@pytest.mark.parametrize(("masked", "is_causal", "held"), [(False, False, 1), (False, True, 1), (True, False, 2)])
def test_masks_make_the_baseline_hold_no_more_scores(masked: bool, is_causal: bool, held: int) -> None:
    """It is what every op is compared with, so a wasteful one would flatter them all.

    The backward pass needs the weights; behind a mask that may leave a row empty, also what the softmax gave.
    """
    q, k, v = draw(50, 50)
    mask = torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    kept: set[int] = set()

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.numel() == 2 * HEADS * 50 * 50:
            kept.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = DenseAttention()(q, k, v, mask=mask, is_causal=is_causal)
    assert len(kept) == held
    y.sum().backward()
