"""LearnedGridPositions: the table on its own grid, and stretched over others as bicubic interpolation has it."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.learned_grid import LearnedGridPositions


def build(rows: int, columns: int) -> LearnedGridPositions:
    torch.manual_seed(0)
    module = LearnedGridPositions(rows, columns, 2, dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    return module


def naive(table: Tensor, rows: int, columns: int) -> Tensor:
    """Keys' cubic with a = -3/4 about the centre of each place, the table's border repeated outside."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    out = torch.zeros(rows, columns, table.shape[2], dtype=table.dtype)
    for row in range(rows):
        for column in range(columns):
            y = (row + 0.5) * table.shape[0] / rows - 0.5
            x = (column + 0.5) * table.shape[1] / columns - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = min(max(i, 0), table.shape[0] - 1), min(max(j, 0), table.shape[1] - 1)
                    out[row, column] += kernel(y - i) * kernel(x - j) * table[inside]
    return out


def test_on_its_own_grid_each_place_has_its_row() -> None:
    module, x = build(2, 3), torch.randn(4, 6, 2, dtype=torch.float64)
    y = module(x, (2, 3))
    for n in range(6):
        assert torch.equal(y[:, n], x[:, n] + module.weight[n // 3, n % 3])


@pytest.mark.parametrize("grid", [(7, 9), (2, 2), (4, 8), (8, 4), (1, 1), (1, 63), (13, 5)])
def test_on_another_grid_the_table_is_interpolated(grid: tuple[int, int]) -> None:
    module = build(4, 4)
    x = torch.randn(2, grid[0] * grid[1], 2, dtype=torch.float64)
    expected = x + naive(module.weight, *grid).flatten(0, 1)
    # float64 sums of sixteen terms of order one
    torch.testing.assert_close(module(x, grid), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("grid", [(2, 3), (3, 5)])
def test_gradients(grid: tuple[int, int]) -> None:
    module = build(2, 3)
    x = torch.randn(1, grid[0] * grid[1], 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x, grid))

    assert torch.autograd.gradcheck(run, (x, module.weight))


def test_what_does_not_fit_is_refused() -> None:
    module = build(2, 3)
    for x in (torch.zeros(1, 5, 2), torch.zeros(1, 6, 3), torch.zeros(6, 2)):
        with pytest.raises(ArgumentError, match=r"x must be \[B, 6, 2\].*grid 2 x 3; got \["):
            module(x, (2, 3))
    with pytest.raises(ArgumentError, match="rows must be positive; got 0"):
        LearnedGridPositions(0, 3, 2)
    with pytest.raises(ArgumentError, match="rows must be positive; got -4"):
        LearnedGridPositions(-4, 3, 2)
    for grid in ((6,), 6, None, (-2, -3), (0, 3), (2.0, 3)):
        with pytest.raises(ArgumentError, match=r"grid must be \(rows, columns\) in positive whole numbers; got"):
            module(torch.zeros(1, 6, 2), grid)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="x must be floating point; got torch.int64"):
        module(torch.zeros(1, 6, 2, dtype=torch.int64), (2, 3))
