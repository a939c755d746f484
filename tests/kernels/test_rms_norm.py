"""A norm that takes a short cut for one row gives what torch.nn.RMSNorm gives."""

import pytest
import torch

from transformer_problems.kernels.rms_norm import RMSNorm


@pytest.mark.parametrize("width", [1, 15, 16, 63, 100, 768])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2,), (0, 1)])
def test_rows_are_normalised_as_in_float64(width: int, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(width, eps=1e-6, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width))
        x = torch.randn(*lead, width).bfloat16()
        y = norm(x)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    # PyTorch rounds before it weighs, our kernel once: two steps of bfloat16 at most
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-6)


def test_one_row_takes_the_kernel_and_training_does_not() -> None:
    norm, called = RMSNorm(8, eps=1e-6, dtype=torch.bfloat16), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(str(function))
            return function(*arguments, **(keywords or {}))

    x = torch.ones(1, 8, dtype=torch.bfloat16)
    with Watch(), torch.no_grad():
        norm(x)
    assert called == ["transformer_problems.row_rms_norm.default"]
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_several_rows_of_as_many_numbers_as_the_norm_is_wide_are_no_row() -> None:
    norm = RMSNorm(8, eps=1e-6, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Given normalized_shape"):
        norm(torch.ones(2, 4, dtype=torch.bfloat16))
