"""A layer that takes a short cut for one row gives what torch.nn.Linear gives."""

import pytest
import torch
from torch import nn

from transformer_problems.kernels.linear import Linear, linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2, 1), (1, 7), (0, 3)])
def test_outputs_and_gradients_are_those_of_torch(lead: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Linear(48, 63, bias=bias, dtype=dtype), nn.Linear(48, 63, bias=bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*lead, 48, dtype=dtype, requires_grad=True)
    weight = torch.randn(*lead, 63, dtype=dtype)
    y, expected = ours(x), theirs(x)
    assert y.dtype == dtype
    # 48 products of order one, summed in another order: a few roundings of the dtype
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y, expected, **tolerance)
    gradients = torch.autograd.grad((y * weight).sum(), (x, *ours.parameters()))
    references = torch.autograd.grad((expected * weight).sum(), (x, *theirs.parameters()))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


def test_one_row_in_bfloat16_is_a_matrix_vector_product() -> None:
    called: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(str(function))
            return function(*arguments, **(keywords or {}))

    with Watch(), torch.no_grad():
        linear(torch.ones(1, 1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16))
    assert "aten.mv.default" in called
