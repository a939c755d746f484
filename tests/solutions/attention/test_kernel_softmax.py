"""KernelSoftmaxAttention is DenseAttention with one kernel in place of several."""

import pytest
import torch

from transformer_problems import ALiBi, DenseAttention, SelfAttention
from transformer_problems.core.errors import UnknownNameError
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.solutions.attention.kernel_softmax import KernelSoftmaxAttention


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_outputs_and_gradients_are_those_of_dense_attention(is_causal: bool, masked: bool, with_bias: bool) -> None:
    torch.manual_seed(0)
    dense, own = (
        SelfAttention(16, 2, op=op, position=ALiBi(2) if with_bias else None, is_causal=is_causal, dtype=torch.float64)
        for op in (DenseAttention(), KernelSoftmaxAttention(backend="cpp"))
    )
    own.load_state_dict(dense.state_dict())
    x = torch.randn(2, 63, 16, dtype=torch.float64)
    key_mask = torch.rand(2, 63) < 0.6 if masked else None
    results = []
    for layer in (dense, own):
        given = x.clone().requires_grad_()
        y = layer(given, key_mask=key_mask)
        results.append((y, *torch.autograd.grad(y.square().sum(), (given, *layer.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_it_launches_fewer_kernels_and_moves_fewer_bytes() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 8).requires_grad_().unbind(0)

    def step(op: torch.nn.Module) -> None:
        op(q, k, v, is_causal=True).sum().backward()

    own, dense = (count_kernels(lambda op=op: step(op)) for op in (KernelSoftmaxAttention(), DenseAttention()))
    assert own.kernels < dense.kernels and own.bytes_moved < dense.bytes_moved


def test_what_answers_is_told() -> None:
    q = torch.zeros(1, 2, 4, 8)
    assert KernelSoftmaxAttention().backend_for(q) == "cpp"
    assert KernelSoftmaxAttention().backend_for(q.half()) == "torch"
    assert KernelSoftmaxAttention(backend="torch").backend_for(q) == "torch"


def test_what_ran_is_recorded_by_the_scores_which_autocast_may_change() -> None:
    op, q = KernelSoftmaxAttention(), torch.zeros(1, 2, 4, 8)
    assert op.last_run is None
    op(q, q, q)
    assert op.last_run == "cpp"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op(q, q, q)
    assert op.backend_for(q) == "cpp" and op.last_run == "torch"


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown back end of KernelSoftmaxAttention 'triton'"):
        KernelSoftmaxAttention(backend="triton")  # type: ignore[arg-type]
