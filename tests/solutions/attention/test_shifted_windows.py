"""ShiftedWindowAttention against a loop over tokens, for grids that windows fill, do not fill, or are larger than."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention.grid_windows import GridWindows
from transformer_problems.solutions.attention.shifted_windows import ShiftedWindowAttention

WIDTH, HEADS = 12, 3

# grid, then window
CASES = {
    "filled": ((8, 8), (4, 4)),
    "filled, odd windows": ((6, 9), (3, 3)),
    "padded": ((7, 10), (4, 4)),
    "padded beyond half a window": ((9, 5), (4, 3)),
    "a prime": ((13, 5), (2, 3)),
    "one window": ((4, 4), (4, 4)),
    "larger than the grid": ((3, 2), (7, 4)),
    "larger than one axis": ((3, 12), (4, 4)),
    "larger than one axis, padded": ((10, 3), (4, 7)),
    "one token": ((1, 1), (7, 7)),
    "windows of one token": ((3, 4), (1, 1)),
    "clip": ((4, 6, 4), (2, 3, 4)),
    "clip, padded": ((5, 4, 7), (2, 3, 4)),
    "clip shorter than windows": ((2, 6, 5), (8, 3, 3)),
    "line of 1": ((1,), (8,)),
    "line of 63": ((63,), (8,)),
    "line of 64": ((64,), (8,)),
    "line of 100": ((100,), (8,)),
}


def build(window_size: tuple[int, ...], *, shifted: bool) -> ShiftedWindowAttention:
    torch.manual_seed(0)
    module = ShiftedWindowAttention(WIDTH, HEADS, window_size, shifted=shifted, dtype=torch.float64)
    with torch.no_grad():
        module.bias_table.normal_()  # so that the bias counts as much as the scores
    return module


def draw(grid: tuple[int, ...], *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *grid, WIDTH, dtype=torch.float64, generator=generator)


def naive(module: ShiftedWindowAttention, x: Tensor) -> Tensor:
    """Token by token: those of the same window are those with as many window borders before them on each axis."""
    grid = x.shape[1:-1]
    sizes = [min(size, length) for size, length in zip(module.window_size, grid, strict=True)]
    shifts = [size // 2 if module.shifted and size < length else 0 for size, length in zip(sizes, grid, strict=True)]
    tokens = list(itertools.product(*map(range, grid)))

    def window(token: tuple[int, ...]) -> list[int]:
        return [(place - shift) // size for place, shift, size in zip(token, shifts, sizes, strict=True)]

    def row(query: tuple[int, ...], key: tuple[int, ...]) -> int:
        index = 0
        for i, j, size in zip(query, key, module.window_size, strict=True):
            index = index * (2 * size - 1) + i - j + size - 1
        return index

    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in module.qkv_proj(x).chunk(3, dim=-1))
    everywhere = (slice(None),)
    outputs = []
    for query in tokens:
        keys = [key for key in tokens if window(key) == window(query)]
        bias = module.bias_table[[row(query, key) for key in keys]]  # [M, H]
        seen_k, seen_v = (torch.stack([part[everywhere + key] for key in keys], dim=1) for part in (k, v))
        scores = torch.einsum("bhd,bmhd->bmh", q[everywhere + query], seen_k) / q.shape[-1] ** 0.5 + bias
        outputs.append(torch.einsum("bmh,bmhd->bhd", scores.softmax(dim=1), seen_v).flatten(1))
    return module.out_proj(torch.stack(outputs, dim=1)).view(x.shape)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_tokens(case: str, shifted: bool) -> None:
    grid, window_size = CASES[case]
    module, x = build(window_size, shifted=shifted), draw(grid).requires_grad_()
    ours, theirs = module(x), naive(module, x)
    # float64 sums of at most 48 terms of order one
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    inputs, weight = (x, *module.parameters()), torch.randn_like(ours)
    found, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(module(x), theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
def test_a_bias_that_does_not_learn_passes_the_other_gradients(grid: tuple[int, int], shifted: bool) -> None:
    module, x = build((4, 4), shifted=shifted), draw(grid).requires_grad_()
    module.bias_table.requires_grad_(False)
    inputs = (x, *module.qkv_proj.parameters(), *module.out_proj.parameters())
    weight = torch.randn_like(x)
    with torch.inference_mode():
        module(x)  # what is kept here serves a backward pass too
    found, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (module(x), naive(module, x)))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)  # float64 sums of at most 16 terms


@pytest.mark.parametrize("case", ["padded beyond half a window", "clip shorter than windows"])
def test_gradients(case: str) -> None:
    grid, window_size = CASES[case]
    module, x = build(window_size, shifted=True), draw(grid, batch=1).requires_grad_()
    with torch.no_grad():
        weight = torch.randn(WIDTH, 2, dtype=torch.float64)  # a few outputs, for every input has its own column

    def function(x: Tensor, table: Tensor) -> Tensor:
        return (functional_call(module, {"bias_table": table}, (x,)) @ weight).flatten(1, -2).sum(dim=1)

    assert torch.autograd.gradcheck(function, (x, module.bias_table))


def test_second_derivatives() -> None:
    module, x = build((3,), shifted=True), draw((5,), batch=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x).sum(dim=-1), (x,))


@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_images_do_not_see_each_other(shifted: bool) -> None:
    module, x = build((4, 4), shifted=shifted), draw((7, 9), batch=3)
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), alone, atol=1e-13, rtol=0)  # float64 sums in another order


@torch.no_grad()
def test_what_is_kept_follows_the_table_the_grid_and_the_dtype() -> None:
    module = build((4, 4), shifted=True)
    for grid in ((8, 8), (7, 9), (8, 8)):
        x = draw(grid)
        torch.testing.assert_close(module(x), naive(module, x), atol=1e-12, rtol=0)
        for change in (
            lambda: module.bias_table.neg_(),
            lambda: module.bias_table.data.mul_(2),  # which leaves no trace in the version of the parameter
            lambda: module.load_state_dict(build((4, 4), shifted=True).state_dict()),
        ):
            change()
            torch.testing.assert_close(module(x), naive(module, x), atol=1e-12, rtol=0)
    first = module(x)
    module.float()
    torch.testing.assert_close(module(x.float()).double(), first, atol=1e-5, rtol=0)  # float32 numbers of order one


def test_windows_are_made_once() -> None:
    def windows(grid: tuple[int, int]) -> GridWindows:
        return GridWindows.of(grid, (4, 4), shifted=True, device=torch.device("cpu"))

    assert windows((8, 8)) is windows((8, 8))
    assert windows((8, 8)) is not windows((8, 4))


def test_windows_made_in_inference_mode_serve_training() -> None:
    module, x = build((5, 2), shifted=True), draw((9, 11))
    with torch.inference_mode():
        expected = module(x).clone()
    y = module(x)
    torch.testing.assert_close(y, expected.clone(), atol=1e-13, rtol=0)  # the same float64 sums
    y.sum().backward()
    assert module.bias_table.grad is not None


@pytest.mark.parametrize("learns", [False, True])
def test_half_precision(learns: bool) -> None:
    module, x = build((4, 4), shifted=True), draw((7, 8))
    expected = module(x).detach()
    module.bfloat16().bias_table.requires_grad_(learns)
    y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # eight bits of precision, and outputs below 2
    torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window_size"), [((8, 16), (4, 4)), ((4, 8, 16), (2, 4, 4))])
def test_cost_is_tokens_times_tokens_of_a_window(
    grid: tuple[int, ...], window_size: tuple[int, ...], shifted: bool
) -> None:
    module, x = build(window_size, shifted=shifted), draw(grid, batch=1)
    num_tokens, length = x[..., 0].numel(), torch.Size(window_size).numel()
    projections, products = 4 * 2 * WIDTH**2, 2 * 2 * WIDTH * length
    assert count_flops(lambda: module(x)) == num_tokens * (projections + products)
    with torch.no_grad():
        assert count_flops(lambda: module(x)) == num_tokens * (projections + products)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 12 and 5"):
        ShiftedWindowAttention(12, 5, (4, 4), shifted=False)
    with pytest.raises(ArgumentError, match="window_size must be a tuple of whole numbers; got 7"):
        ShiftedWindowAttention(12, 3, 7, shifted=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"window_size must have a size for each axis of the grid; got \(\)"):
        ShiftedWindowAttention(12, 3, (), shifted=False)
    with pytest.raises(ArgumentError, match="window_size must be positive; got 0"):
        ShiftedWindowAttention(12, 3, (4, 0), shifted=False)


@pytest.mark.parametrize("shape", [(2, 8, 8, 13), (2, 64, 12), (2, 4, 8, 8, 12), (2, 0, 8, 12)])
def test_bad_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"x must be \[B, \*grid, 12\] with a grid of 2 axes.*got \[2, "):
        build((4, 4), shifted=False)(torch.zeros(shape, dtype=torch.float64))
