"""Every back end gives the exact integer product of what was rounded; races are run once and remembered."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.kernels import int8_product as kernel
from transformer_problems.kernels.compiler import load
from transformer_problems.kernels.int8_product import fastest, int8_backends, int8_product, raced
from transformer_problems.lab.meters.flops import count_flops

BACKENDS = ("cpp", "int_mm", "float")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return (
        torch.randn(rows, inputs),
        weight,
        weight.sum(1, dtype=torch.int32),
        torch.rand(outputs),
        torch.randn(outputs),
    )


def expected(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float | None) -> Tensor:
    """In float64, whose sums of these integers are exact; x is rounded as float32 arithmetic does."""
    step = x.abs().amax(1, keepdim=True) / 127 if x_scale is None else torch.full((len(x), 1), x_scale)
    step = torch.where(step > 0, step, 1.0)
    rounded = (x * (1 / step)).round().clamp(-127, 127).double()
    y = rounded @ weight.double().T * step.double() * scales.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_scale", [None, 0.01])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 63, 7), (3, 64, 100), (7, 130, 37), (8, 3, 31), (17, 100, 33), (40, 257, 64)],
)
def test_the_product_is_exact_but_for_its_last_roundings(
    rows: int, inputs: int, outputs: int, x_scale: float | None, backend: str
) -> None:
    x, weight, sums, scales, bias = draw(rows, inputs, outputs)
    for b in (bias, None):
        y = int8_product(x, weight, sums, scales, b, x_scale=x_scale, backend=backend)
        exact = expected(x, weight, scales, b, x_scale)
        # a float32 product of an exact integer and two scales, and a sum: some roundings of 2^-24
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_values_do_not_overflow_or_saturate(backend: str) -> None:
    x, weight = torch.full((2, 4096), 3.0), torch.full((2, 4096), -127, dtype=torch.int8)
    weight[1] = 127
    y = int8_product(x, weight, weight.sum(1, dtype=torch.int32), torch.ones(2), None, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[-127.0 * 4096 * 3, 127.0 * 4096 * 3]] * 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_and_no_rows(backend: str) -> None:
    _, weight, sums, scales, bias = draw(1, 8, 4)
    y = int8_product(torch.zeros(2, 8), weight, sums, scales, bias, backend=backend)
    assert torch.equal(y, bias.expand(2, 4))
    assert int8_product(torch.zeros(0, 8), weight, sums, scales, bias, backend=backend).shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_scale", [None, 0.01])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_row_and_no_other(value: float, x_scale: float | None, backend: str) -> None:
    x, weight, sums, scales, bias = draw(9, 100, 33)
    clean = int8_product(x, weight, sums, scales, bias, x_scale=x_scale, backend=backend)
    x[4, 50] = value
    y = int8_product(x, weight, sums, scales, bias, x_scale=x_scale, backend=backend)
    others = torch.arange(9) != 4
    assert torch.equal(y[others], clean[others])
    if x_scale is None or value != value:
        assert not y[4].isfinite().any()
    else:  # one given scale cuts off what is larger, infinity too
        assert y[4].isfinite().all()


@pytest.mark.parametrize("rows", [1, 9])
def test_a_processor_without_vnni_gets_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, sums, scales, bias = draw(rows, 100, 33)
    y = int8_product(x, weight, sums, scales, bias, backend="cpp")
    portable = load(kernel._SOURCE, extra_flags=("-fopenmp", "-DPORTABLE")).int8_product
    portable.argtypes, portable.restype = kernel._kernel("int8_product").argtypes, None
    monkeypatch.setattr(kernel, "_kernel", lambda name: portable)
    assert torch.equal(int8_product(x, weight, sums, scales, bias, backend="cpp"), y)


def test_threads_share_the_outputs_and_give_the_same(threads: None) -> None:
    x, weight, sums, scales, bias = draw(40, 600, 70)
    torch.set_num_threads(1)
    y = int8_product(x, weight, sums, scales, bias, backend="cpp")
    torch.set_num_threads(3)
    assert torch.equal(int8_product(x, weight, sums, scales, bias, backend="cpp"), y)


def test_a_race_is_run_once_for_each_size_and_its_fastest_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    races: list[int] = []

    def race(rows: int, weight: Tensor) -> dict[str, float]:
        races.append(rows)
        return {"cpp": 2.0, "int_mm": 1.0 if rows > 1 else 3.0, "float": 4.0}

    monkeypatch.setattr(kernel, "_RACED", {})
    monkeypatch.setattr(kernel, "_race", race)
    weight = torch.zeros(4, 8, dtype=torch.int8)
    assert [fastest(torch.zeros(rows, 8), weight) for rows in (1, 1, 2, 4, 3, 300)] == ["cpp", "cpp", *["int_mm"] * 4]
    assert races == [1, 4, 256]
    assert {key[1] for key in raced()} == {1, 4, 256}


def test_a_real_race_times_every_back_end() -> None:
    _, weight, *_ = draw(1, 64, 48)
    assert fastest(torch.zeros(1, 64), weight) in int8_backends("cpu")
    times = raced()["cpu", 1, 48, 64, torch.get_num_threads()]
    assert set(times) == set(int8_backends("cpu")) and min(times.values()) > 0


def test_products_count_as_they_are() -> None:
    x, weight, sums, scales, bias = draw(3, 8, 4)
    for backend in BACKENDS:
        assert count_flops(lambda b=backend: int8_product(x, weight, sums, scales, bias, backend=b)) == 2 * 3 * 8 * 4


def test_a_machine_without_a_compiler_races_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise MissingDependencyError("no C++ compiler found")

    monkeypatch.setattr(kernel, "_kernel", refuse)
    int8_backends.cache_clear()
    try:
        assert int8_backends("cpu") == ("int_mm", "float")
        x, weight, sums, scales, bias = draw(3, 64, 16)
        y = int8_product(x, weight, sums, scales, bias, backend="int_mm")
        torch.testing.assert_close(y.double(), expected(x, weight, scales, bias, None), rtol=1e-6, atol=1e-5)
        x[1, 5] = torch.nan
        for x_scale in (None, 0.01):
            y = int8_product(x, weight, sums, scales, bias, x_scale=x_scale, backend="int_mm")
            assert y.isnan().all(dim=1).tolist() == [False, True, False]
        with pytest.raises(UnknownNameError, match="unknown int8 back end on this machine 'cpp'"):
            int8_product(x, weight, sums, scales, bias, backend="cpp")
    finally:
        int8_backends.cache_clear()


def test_inputs_whose_sums_could_overflow_are_refused() -> None:
    weight = torch.zeros(1, 2**16 + 1, dtype=torch.int8)
    with pytest.raises(ArgumentError, match="inputs must be at most 65,536"):
        int8_product(torch.zeros(1, 2**16 + 1), weight, torch.zeros(1, dtype=torch.int32), torch.ones(1), None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_with_gaps_or_repeats_in_memory_give_what_copies_give(backend: str) -> None:
    x, weight, sums, scales, bias = draw(3, 16, 8)
    every_other = [torch.stack([t, -t], dim=-1).flatten(-2)[..., ::2] for t in (x, scales, bias)]
    turned = weight.T.contiguous().T
    y = int8_product(every_other[0], turned, torch.stack([sums, 0 * sums], 1)[:, 0], *every_other[1:], backend=backend)
    assert torch.equal(y, int8_product(x, weight, sums, scales, bias, backend=backend))
    repeated = (
        x[:1].expand(3, 16),
        weight[:1].expand(8, 16),
        sums[:1].expand(8),
        scales[:1].expand(8),
        bias[:1].expand(8),
    )
    y = int8_product(*repeated, backend=backend)
    assert torch.equal(y, int8_product(*(t.contiguous() for t in repeated), backend=backend))


def test_what_the_kernel_would_read_wrongly_is_refused() -> None:
    given = dict(zip(("x", "weight", "weight_sums", "scales", "bias"), draw(3, 16, 8), strict=True))
    for name, value, message in (
        ("x", given["x"].tolist(), r"x must be float32 \[rows, 16\]; got an object of type list"),
        ("x", given["x"].double(), r"x must be float32 \[rows, 16\]; got torch.float64 \[3, 16\]"),
        ("x", given["x"][0], r"x must be float32 \[rows, 16\]; got torch.float32 \[16\]"),
        ("x", given["x"].to("meta"), "x must be on cpu, as the weight; got meta"),
        ("weight", given["weight"].float(), r"weight must be int8 \[O, I\]; got torch.float32 \[8, 16\]"),
        ("weight", given["weight"].numpy(), r"weight must be int8 \[O, I\]; got an object of type ndarray"),
        ("weight_sums", given["weight_sums"].long(), r"weight_sums must be torch.int32 \[8\], .*; got torch.int64"),
        ("scales", given["scales"][:7], r"scales must be torch.float32 \[8\], .*; got torch.float32 \[7\]"),
        ("scales", None, r"scales must be torch.float32 \[8\], .*; got None"),
        ("scales", given["scales"].to("meta"), "scales must be on cpu, as the weight; got meta"),
        ("bias", given["bias"].tolist()[:2], r"bias must be torch.float32 \[8\], one for each output; got \["),
    ):
        with pytest.raises(ArgumentError, match=message):
            int8_product(**given | {name: value})
    for x_scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="x_scale must be positive; got"):
            int8_product(**given, x_scale=x_scale)
