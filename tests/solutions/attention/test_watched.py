"""WatchedAttention: dense attention that knows what each token received."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import CombinationError
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.watched import WatchedAttention
from transformer_problems.testing import check_attention_op


def qkv(length: int) -> Tensor:
    return torch.randn(3, 2, 4, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def test_keeps_the_contract() -> None:
    check_attention_op(WatchedAttention(block_size=16))


@pytest.mark.parametrize("length", [1, 63, 101])
@pytest.mark.parametrize("is_causal", [False, True])
def test_received_equals_the_column_means_of_dense_weights(length: int, is_causal: bool) -> None:
    q, k, v = qkv(length)
    key_mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
    key_mask[:, 0] = True
    mask = key_mask[:, None, None, :]
    op = WatchedAttention(block_size=16)
    y, attended = op.watch(lambda: op(q, k, v, mask=mask, is_causal=is_causal), key_mask=key_mask)
    torch.testing.assert_close(y, DenseAttention()(q, k, v, mask=mask, is_causal=is_causal))
    allowed = mask & torch.ones(length, length, dtype=torch.bool).tril() if is_causal else mask
    weights = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.stack([w[:, real].mean((0, 1)) for w, real in zip(weights, key_mask, strict=True)])
    torch.testing.assert_close(attended.received, expected)
    torch.testing.assert_close(attended.received.sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(attended.keys, k.mean(1))


def test_a_key_of_size_s_counts_as_s_equal_keys() -> None:
    q, k, v = qkv(7)
    sizes = torch.tensor([1, 3, 2, 1, 1, 4, 1])
    op = WatchedAttention(block_size=3)
    y, attended = op.watch(lambda: op(q, k, v), sizes=sizes.expand(2, -1).double())
    repeated = DenseAttention()(q, *(x.repeat_interleave(sizes, dim=2) for x in (k, v)))
    torch.testing.assert_close(y, repeated)
    torch.testing.assert_close(attended.received.sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_key_of_no_size_is_no_key_and_its_gradient_is_finite() -> None:
    q, k, v = qkv(7)
    sizes = torch.ones(2, 7, dtype=torch.float64)
    sizes[:, 2] = 0.0
    sizes.requires_grad_()
    op = WatchedAttention()
    y, _ = op.watch(lambda: op(q, k, v), sizes=sizes)
    torch.testing.assert_close(y, DenseAttention()(q, k, v, mask=(sizes > 0)[:, None, None, :]))
    (gradient,) = torch.autograd.grad(y.sum(), sizes)
    assert gradient.isfinite().all()


def test_gradcheck_through_sizes_and_received() -> None:
    q, k, v = (x[:1, :2, :5, :3].clone().requires_grad_() for x in qkv(5))
    sizes = torch.tensor([[1.0, 0.5, 2.0, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    op = WatchedAttention(block_size=2)

    def run(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        y, attended = op.watch(lambda: op(q, k, v), sizes=sizes)
        return y, attended.received

    assert torch.autograd.gradcheck(run, (q, k, v, sizes))


def test_without_queries_no_key_receives_anything() -> None:
    q, k, v = qkv(7)
    op = WatchedAttention()
    y, attended = op.watch(lambda: op(q[..., :0, :], k, v))
    assert y.shape == q[..., :0, :].shape
    assert torch.equal(attended.received, torch.zeros_like(attended.received[:, :1]).expand(-1, 7))


def test_watching_costs_no_matrix_product() -> None:
    q, k, v = qkv(64)
    op = WatchedAttention(block_size=16)
    with FlopCounterMode(display=False) as counter:
        op.watch(lambda: op(q, k, v))
    assert counter.get_total_flops() == 4 * 2 * 4 * 64 * 64 * 8


def test_a_layer_that_does_not_call_it_is_refused_and_nothing_lingers() -> None:
    op, x = WatchedAttention(), torch.randn(1, 3, 16)
    with pytest.raises(CombinationError, match=r"must call its WatchedAttention once; this one called it 0 times"):
        op.watch(lambda: SelfAttention(16, 4)(x))
    layer = SelfAttention(16, 4, op=op)
    torch.testing.assert_close(op.watch(lambda: layer(x))[0], layer(x))
