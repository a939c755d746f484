"""Known counts: what launches a kernel, what does not, and how many bytes each reads and writes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.kernels.bias_gelu import bias_gelu
from transformer_problems.lab.meters.kernels import KernelCount, count_compiled_kernels, count_kernels

A, B, W = torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8)
BYTES = 4 * 4 * 8  # of A, and of B


@pytest.mark.parametrize(
    ("function", "kernels", "read", "written"),
    [
        (lambda: A + B, 1, 2 * BYTES, BYTES),
        (lambda: A + A, 1, BYTES, BYTES),
        (lambda: A + 1, 1, BYTES, BYTES),
        (lambda: A.double(), 1, BYTES, 2 * BYTES),
        (lambda: A @ W.t(), 1, BYTES + 4 * 16 * 8, 4 * 4 * 16),
        (lambda: nn.functional.linear(A, W, torch.empty(16)), 1, BYTES + 4 * 16 * 8 + 4 * 16, 4 * 4 * 16),
        (lambda: torch.cat([A, B]), 1, 2 * BYTES, 2 * BYTES),
        (lambda: A[:1].expand(4, 8) * B, 1, BYTES // 4 + BYTES, BYTES),
        (lambda: A.sum(), 1, BYTES, 4),
        (lambda: torch.zeros(4, 8), 1, 0, BYTES),
        (lambda: bias_gelu(A, B[0]), 1, BYTES + BYTES // 4, BYTES),
        (lambda: A.clone().add_(B), 2, BYTES + 2 * BYTES, 2 * BYTES),
        (lambda: torch.empty(4, 8).copy_(A), 1, BYTES, BYTES),
        (lambda: torch.add(A, B, out=torch.empty(4, 8)), 1, 2 * BYTES, BYTES),
        (lambda: A.t().contiguous(), 1, BYTES, BYTES),
        (lambda: A.t().reshape(-1), 1, BYTES, BYTES),
        (lambda: nn.functional.embedding(torch.tensor([3, 3]), W), 1, 2 * 4 * 8 + 2 * 8, 2 * 4 * 8),
    ],
)
def test_operations_count_what_they_read_and_write(
    function: Callable[[], Tensor], kernels: int, read: int, written: int
) -> None:
    expected = KernelCount(kernels, read, written)
    assert count_kernels(function) == expected
    with torch.inference_mode():
        assert count_kernels(function) == expected
    assert expected.bytes_moved == read + written


@pytest.mark.parametrize(
    "function",
    [
        lambda: A.view(8, 4).t()[1:].unsqueeze(0).split(1),
        lambda: A.detach().expand(2, 4, 8).unbind(),
        lambda: torch.empty(3).view(3, 1),
        lambda: A.contiguous().to(torch.float32),
        lambda: A[0, 0].item() + A.shape[0],
        lambda: torch.empty(0, 8) + torch.empty(0, 8),
        lambda: None,
    ],
)
def test_views_allocations_and_nothing_cost_nothing(function: Callable[[], object]) -> None:
    assert count_kernels(function) == KernelCount(0, 0, 0)


def test_the_backward_pass_counts() -> None:
    x = A.clone().requires_grad_()
    grad = torch.ones_like(x)
    y = x * B  # the gradient is one product, and becomes x.grad as it is
    assert count_kernels(lambda: y.backward(grad)) == KernelCount(1, 2 * BYTES, BYTES)


def test_composite_operators_count_their_parts_in_inference_mode_too() -> None:
    layer = nn.Linear(8, 16)
    with torch.no_grad():
        expected = count_kernels(lambda: layer(A.view(2, 2, 8)))
    with torch.inference_mode():
        assert count_kernels(lambda: layer(A.view(2, 2, 8))) == expected
    assert expected.kernels == 1


@pytest.mark.parametrize("is_warm", [True, False])
def test_compiled_functions_are_refused_for_they_would_run_uncompiled(is_warm: bool) -> None:
    compiled = torch.compile(lambda x: torch.relu(x + 1), backend="aot_eager")
    if is_warm:
        compiled(A)
    with pytest.raises(ArgumentError, match="function must not be compiled.*count_compiled_kernels"):
        count_kernels(lambda: compiled(A))
    assert count_kernels(lambda: A + B).kernels == 1  # afterwards all is as before


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        count_kernels(lambda: A + W)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_fused_kernels_of_a_compiled_graph_count_once_and_library_calls_too() -> None:
    def layer(x: Tensor) -> Tensor:
        return nn.functional.gelu((x + 1) * 2) @ W.t()

    assert count_kernels(lambda: layer(A)).kernels == 4
    compiled = torch.compile(layer)
    assert count_compiled_kernels(lambda: compiled(A)) == 2  # the product, and everything before it
    with pytest.raises(ArgumentError, match="function must run a graph compiled"):
        count_compiled_kernels(lambda: layer(A))
