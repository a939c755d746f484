"""TopKAttention against the formula, and that its memory is not quadratic."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.topk import TopKAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.testing import check_attention_op


def qkv(length: int, *, batch: int = 2, heads: int = 4, groups: int = 2, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, h, length, 8, dtype=torch.float64, generator=generator, requires_grad=requires_grad)
        for h in (heads, groups, groups)
    ]


def naive(q: Tensor, k: Tensor, v: Tensor, num_keys: int, allowed: Tensor, bias: Tensor | None = None) -> Tensor:
    """One query at a time: sort its scores, softmax over the best."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:-1])).tolist():
        g = h // (q.shape[1] // k.shape[1])
        scores = k[b, g] @ q[b, h, n] / q.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias[h, n]
        visible = allowed.expand(*q.shape[:-1], k.shape[-2])[b, h, n].nonzero().flatten()
        best = visible[scores[visible].argsort(descending=True)[:num_keys]]
        out[b, h, n] = scores[best].softmax(0) @ v[b, g, best]
    return out


@pytest.mark.parametrize("length", [1, 37, 64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(length: int, is_causal: bool, masked: bool) -> None:
    q, k, v = qkv(length, requires_grad=True)
    allowed = (
        torch.ones(length, length, dtype=torch.bool).tril() if is_causal else torch.ones(1, length, dtype=torch.bool)
    )
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, length, generator=torch.Generator().manual_seed(0)) < 0.6
        allowed = allowed & mask
    y = TopKAttention(5, block_size=16)(q, k, v, mask=mask, is_causal=is_causal)
    expected = naive(q, k, v, 5, allowed)
    torch.testing.assert_close(y, expected)  # float64 defaults, 1e-7: sums of five terms
    weight = torch.randn_like(y)
    for mine, reference in zip(
        torch.autograd.grad((y * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_takes_a_position_bias() -> None:
    q, k, v = qkv(33)
    positions = torch.arange(33)
    bias = PositionBias(ALiBi(4), q, positions, positions)
    y = TopKAttention(4, block_size=8)(q, k, v, bias=bias)
    torch.testing.assert_close(
        y, naive(q, k, v, 4, torch.ones(1, 33, dtype=torch.bool), bias.dense().squeeze(0).double())
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_all_keys_make_dense_attention(is_causal: bool) -> None:
    q, k, v = qkv(40)
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5  # a mask of another shape: [N, M]
    y = TopKAttention(40, block_size=7)(q, k, v, mask=mask, is_causal=is_causal)
    torch.testing.assert_close(y, DenseAttention()(q, k, v, mask=mask, is_causal=is_causal))


def test_keeps_the_contract() -> None:
    # 64 of 101 keys: bfloat16 may swap the last key for the next best, which must not matter much
    check_attention_op(TopKAttention(64, block_size=16))


def test_distractors_cannot_dilute_it() -> None:
    q = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    wanted, noise = torch.full((1, 1, 1, 8), 2.0, dtype=torch.float64), torch.zeros(1, 1, 500, 8, dtype=torch.float64)
    k, v = torch.cat([wanted, noise], dim=2), torch.cat([torch.ones_like(wanted), noise], dim=2)
    sparse, dense = TopKAttention(1)(q, k, v), DenseAttention()(q, k, v)
    assert (sparse == 1).all()
    assert dense.max() < 0.5


@pytest.mark.parametrize("is_causal", [False, True])
def test_bytes_kept_for_the_backward_pass_grow_linearly(is_causal: bool) -> None:
    def kept(length: int) -> int:
        storages: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
            return x

        alive: list[Tensor] = []
        q, k, v = qkv(length, batch=1, groups=4, requires_grad=True)
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            TopKAttention(4, block_size=32)(q, k, v, mask=mask, is_causal=is_causal)
        return sum(storages.values())

    # linear growth doubles; a single N x M mask of one byte an entry would make it triple
    assert kept(1024) <= 2.05 * kept(512)


def test_causal_scores_stop_at_the_diagonal() -> None:
    q, k, v = qkv(256, groups=4)

    def flops(is_causal: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            TopKAttention(4, block_size=32)(q, k, v, is_causal=is_causal)
        return counter.get_total_flops()

    assert flops(False) == 2 * q.shape[0] * q.shape[1] * 256 * 256 * 8
    # blocks of 32 queries, the i-th of 8 over 32 i keys: 36 of 64 blocks
    assert flops(True) == flops(False) * 36 // 64


def test_no_keys_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_keys must be positive; got 0"):
        TopKAttention(0)
