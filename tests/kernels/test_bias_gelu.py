"""The fused bias and GELU are exact in both directions, on both back ends, in place and in compiled graphs."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.kernels import bias_gelu as kernel
from transformer_problems.kernels.bias_gelu import bias_gelu, gelu_backend

BACKENDS = ("cpp", "torch")
DTYPES = (torch.float32, torch.float64)
OPERATOR = torch.ops.transformer_problems.bias_gelu.default


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)


def exact(z: Tensor) -> Tensor:
    """z Phi(z) by the complementary error function in float64, which keeps the tail's digits."""
    return z * torch.special.erfc(-z / 2**0.5) / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 64), (2, 3, 100), (1, 1009), (300, 257)])
def test_outputs_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    x, bias = draw(*shape, dtype=dtype)
    for b in (bias, None):
        inputs = [t.clone().requires_grad_() for t in ((x,) if b is None else (x, b))]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        y, reference = bias_gelu(*inputs, backend=backend), exact(sum(wide))
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        (y.double() * weights).sum().backward()
        (reference * weights).sum().backward()
        assert y.dtype == dtype and y.shape == x.shape
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), reference, rtol=8 * step, atol=12 * 8 * step)  # of values up to 12
        for one, other in zip(inputs, wide, strict=True):  # a bias's gradient is a sum of up to 300 rows
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=8 * step, atol=len(x) * 2 * step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_keeps_the_digits_of_small_outputs(dtype: torch.dtype) -> None:
    z = torch.linspace(-9, 0, 20011, dtype=dtype)
    y, reference = bias_gelu(z, backend="cpp").double(), exact(z.double())
    # exp(-z^2/2) carries the rounding of its argument, up to 41 of them, in both
    torch.testing.assert_close(y, reference, rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_their_limits_and_nan_stays(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -50.0, -1e30, -1e38, 50.0, 1e38, float("inf"), float("nan")], dtype=dtype)
    y = bias_gelu(x, backend="cpp")
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0, 1e38, float("inf"), float("nan")], dtype=dtype)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    x = x[:6].requires_grad_()
    bias_gelu(x, backend="cpp").sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.5, 0, 0, 0, 1, 1], dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_first_and_second_order_are_those_of_the_outputs(backend: str) -> None:
    x, bias = (t.requires_grad_() for t in draw(2, 3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, b: bias_gelu(x, b, backend=backend), (x, bias))
    assert torch.autograd.gradcheck(lambda x: bias_gelu(x, backend=backend), (x,))
    assert torch.autograd.gradgradcheck(lambda x, b: bias_gelu(x, b, backend=backend), (x, bias))


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    x, bias = draw(3, 8)
    torch.library.opcheck(OPERATOR, (x.clone().requires_grad_(), bias.clone().requires_grad_(), "auto"))
    torch.library.opcheck(OPERATOR, (x.t(), None, "torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_it_writes_over_its_input(backend: str) -> None:
    x, bias = draw(4, 33)
    expected = bias_gelu(x, bias, backend=backend)
    with torch.inference_mode():
        held = x.clone()
        y = bias_gelu(held, bias, inplace=True, backend=backend)
    assert y.data_ptr() == held.data_ptr()
    assert torch.equal(y, expected)


def test_strided_inputs_are_answered_as_packed_ones() -> None:
    x, bias = draw(12, 10)
    every_second = bias.repeat_interleave(2)[::2]
    assert torch.equal(bias_gelu(x.t().contiguous().t(), every_second), bias_gelu(x, bias))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    bias_gelu(one, bias).t().contiguous().square().sum().backward()
    bias_gelu(other, bias).square().sum().backward()
    assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads: int) -> None:
    x, bias = (t.requires_grad_() for t in draw(129, 1024))  # enough for four workers
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = bias_gelu(x, bias, backend="cpp")
        y.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, bias_gelu(x, bias, backend="cpp"))
    reference = x.detach().double().requires_grad_()
    exact(reference + bias.detach().double()).sum().backward()
    torch.testing.assert_close(bias.grad.double(), reference.grad.sum(0), rtol=1e-6, atol=1e-5)  # 129 roundings


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_outputs_and_a_gradient_of_zero(backend: str) -> None:
    bias = torch.ones(5, requires_grad=True)
    y = bias_gelu(torch.zeros(0, 5), bias, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 5) and torch.equal(bias.grad, torch.zeros(5))


def test_other_dtypes_take_pytorch_by_themselves() -> None:
    x, bias = draw(3, 8, dtype=torch.bfloat16)
    assert gelu_backend(x) == "torch" and gelu_backend(x.float()) == "cpp"
    assert torch.equal(bias_gelu(x, bias), torch.nn.functional.gelu(x + bias))


def test_without_a_compiler_pytorch_answers_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise MissingDependencyError("no C++ compiler found")

    x, bias = draw(3, 8)
    monkeypatch.setattr(kernel, "load", refuse)
    kernel._is_built.cache_clear()
    try:
        with pytest.warns(UserWarning, match="bias_gelu uses its slower PyTorch path: no C"):
            y = bias_gelu(x, bias)
        assert gelu_backend(x) == "torch" and torch.equal(y, bias_gelu(x, bias, backend="torch"))
    finally:
        kernel._is_built.cache_clear()


def test_what_it_cannot_take_is_refused() -> None:
    x, bias = draw(3, 8)
    for call, message in (
        (lambda: bias_gelu(x, bias[:4]), r"bias must be \[8\], torch.float32 on cpu, as x; got \[4\]"),
        (lambda: bias_gelu(x, bias.double()), "got .8., torch.float64 on cpu. Convert"),
        (lambda: bias_gelu([1.0]), r"x must be a floating-point tensor; got \[1.0\]"),
        (lambda: bias_gelu(x, [1.0]), r"bias must be a floating-point tensor; got \[1.0\]"),
        (lambda: bias_gelu(x.int()), "x must be floating point; got torch.int32"),
        (lambda: bias_gelu(x.half(), backend="cpp"), "'cpp' takes float32 and float64 on a CPU; got torch.float16"),
        (lambda: bias_gelu(x.t(), inplace=True), "x must be contiguous"),
        (lambda: bias_gelu(x, bias.requires_grad_(), inplace=True), "inplace must be False where a gradient"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(UnknownNameError, match="unknown back end of bias_gelu 'cuda'"):
        bias_gelu(x, backend="cuda")


def test_a_compiled_graph_takes_it_whole() -> None:
    compiled = torch.compile(lambda x, b: 2 * bias_gelu(x + 1, b), backend="aot_eager", fullgraph=True)
    one, other = (tuple(t.requires_grad_() for t in draw(5, 8)) for _ in range(2))
    y, expected = compiled(*one), 2 * bias_gelu(other[0] + 1, other[1])
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one, other, strict=True))


def test_autograd_sees_that_x_was_overwritten() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    h = x.exp()
    with torch.no_grad():
        bias_gelu(h.detach(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
