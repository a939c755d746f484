"""A layer that takes a short cut for one row gives what torch.nn.Linear gives."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, MissingDependencyError
from transformer_problems.kernels.linear import Linear, linear
from transformer_problems.kernels.single_row import is_row, row_backend
from transformer_problems.lab.meters.flops import count_flops


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


def operators_of(call: Callable[[], object]) -> list[str]:
    called: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(str(function))
            return function(*arguments, **(keywords or {}))

    with Watch():
        call()
    return called


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise MissingDependencyError("no C++ compiler found")

    monkeypatch.setattr("transformer_problems.kernels.single_row.load", refuse)
    row_backend.cache_clear()
    yield
    row_backend.cache_clear()


def test_one_row_in_bfloat16_takes_the_kernel_and_counts_as_a_product() -> None:
    x, weight = torch.ones(1, 1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    assert row_backend() == "cpp", "the tests need a C++ compiler"
    assert "transformer_problems.row_product.default" in operators_of(lambda: linear(x, weight))
    assert count_flops(lambda: linear(x, weight)) == 2 * 4 * 8


def test_gradients_and_strided_weights_take_the_matrix_vector_product() -> None:
    x, weight = torch.ones(8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16)
    assert "aten.mv.default" in operators_of(lambda: linear(x, weight.T))
    assert "aten.mv.default" in operators_of(lambda: linear(x, weight.clone().requires_grad_()))


def test_a_machine_without_a_compiler_is_told_once_and_gets_pytorch(without_compiler: None) -> None:
    x, weight = torch.ones(8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="slower PyTorch path: no C\\+\\+ compiler found"):
        linear(x, weight)
    assert "aten.mv.default" in operators_of(lambda: linear(x, weight))  # a second warning would be an error


@pytest.mark.parametrize("inputs", [1, 31, 32, 63, 64, 100, 768])
@pytest.mark.parametrize("outputs", [1, 7, 300])
def test_the_kernel_gives_the_float64_product_rounded_once(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    exact = weight.double() @ x.double()
    # sums in float32 err by some 1e-6, so only a tie or a sum near zero may round to a neighbour
    error = 2**-8 * exact.abs() + 1e-5
    assert ((linear(x, weight).double() - exact).abs() <= error).all()


def test_the_kernel_keeps_nan_and_infinity() -> None:
    weight = torch.ones(3, 40, dtype=torch.bfloat16)
    weight[0, 35], weight[1, 3] = float("nan"), float("inf")
    y = linear(torch.ones(40, dtype=torch.bfloat16), weight)
    assert y[0].isnan() and y[1].isposinf() and y[2] == 40


def test_a_compiled_row_takes_the_matrix_vector_product() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    compiled = torch.compile(lambda x: linear(x, weight), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], torch.mv(weight, x[0]))


def test_several_rows_of_as_many_numbers_as_the_weight_has_columns_are_no_row() -> None:
    weight = torch.ones(3, 8, dtype=torch.bfloat16)
    for x in (torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(8, 1, dtype=torch.bfloat16)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
            linear(x, weight)


def test_a_weight_on_another_device_is_read_by_no_kernel() -> None:
    x, weight = torch.ones(8, dtype=torch.bfloat16), torch.ones(3, 8, dtype=torch.bfloat16, device="meta")
    assert not is_row(x, weight) and not is_row(x.to("meta"), torch.ones(3, 8, dtype=torch.bfloat16))


def test_what_are_no_floats_of_the_weights_dtype_is_one_clear_error() -> None:
    layer = Linear(8, 3).bfloat16()
    with pytest.raises(
        ArgumentError, match="x must have the dtype of Linear's weights, torch.bfloat16; got torch.float32"
    ):
        layer(torch.ones(2, 8))
    with pytest.raises(ArgumentError, match=r"x must be a floating-point tensor; got \[1.0\]"):
        layer([1.0])
    with pytest.raises(ArgumentError, match=r"x must be floating point; got torch.int64 \[2, 8\]"):
        layer(torch.ones(2, 8, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
