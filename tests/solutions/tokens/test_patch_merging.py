"""PatchMerging against a loop over squares, in images and clips, and as transformers' with the same weights."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.tokens.patch_merging import PatchMerging

WIDTH = 6
GRIDS = [(4, 6), (5, 6), (4, 7), (3, 5), (1, 1), (3, 4, 5)]


def build(out_dim: int | None = None) -> PatchMerging:
    torch.manual_seed(0)
    module = PatchMerging(WIDTH, out_dim, dtype=torch.float64)
    for parameter in module.norm.parameters():
        torch.nn.init.normal_(parameter)
    return module


def draw(grid: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *grid, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def naive(module: PatchMerging, x: Tensor) -> Tensor:
    height, width = x.shape[-3:-1]
    rows = []
    for i in range(0, height, 2):
        row = []
        for j in range(0, width, 2):
            square = [
                x[..., i + a, j + b, :] if i + a < height and j + b < width else torch.zeros_like(x[..., 0, 0, :])
                for b in range(2)
                for a in range(2)
            ]
            row.append(module.projection(module.norm(torch.cat(square, dim=-1))))
        rows.append(torch.stack(row, dim=-2))
    return torch.stack(rows, dim=-3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("out_dim", [None, 7])
def test_equals_the_loop_over_squares(grid: tuple[int, ...], out_dim: int | None) -> None:
    module, x = build(out_dim), draw(grid).requires_grad_()
    ours, theirs = module(x), naive(module, x)
    assert ours.shape == (2, *grid[:-2], (grid[-2] + 1) // 2, (grid[-1] + 1) // 2, out_dim or 2 * WIDTH)
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)  # float64 sums of 24 terms of order one
    inputs, weight = (x, *module.parameters()), torch.randn_like(ours)
    found, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if len(grid) == 2])
def test_it_is_transformers_module_with_the_same_weights(grid: tuple[int, int]) -> None:
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    module, peer, x = build(), SwinPatchMerging(WIDTH).double(), draw(grid)
    peer.norm.load_state_dict(module.norm.state_dict())
    peer.reduction.load_state_dict(module.projection.state_dict())
    # the same float64 sums, in another order
    torch.testing.assert_close(module(x).flatten(1, 2), peer(x.flatten(1, 2), grid), atol=1e-13, rtol=0)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(build(), (draw((3, 2)).requires_grad_(),))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="out_dim must be positive; got 0"):
        PatchMerging(6, 0)
    with pytest.raises(ArgumentError, match=r"x must be \[B, ..., H, W, 6\]; got \[2, 4, 4, 5\]"):
        PatchMerging(6)(torch.zeros(2, 4, 4, 5))
    with pytest.raises(ArgumentError, match=r"x must be \[B, ..., H, W, 6\]; got \[2, 16, 6\]"):
        PatchMerging(6)(torch.zeros(2, 16, 6))
    with pytest.raises(ArgumentError, match="embed_dim must be a positive whole number; got None"):
        PatchMerging(None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"x must be floating point; got torch\.int64 \[2, 4, 4, 6\]"):
        PatchMerging(6)(torch.zeros(2, 4, 4, 6, dtype=torch.int64))
