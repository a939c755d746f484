"""PatchEmbedding against explicit loops over patches and PyTorch's convolution; which sizes it takes."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

# image, then patch_size, stride, padding, pad
CASES = {
    "patches": ((8, 12), (4, None, None, False)),
    "one pixel": ((3, 5), (1, None, None, False)),
    "whole image": ((7, 7), (7, None, None, False)),
    "padded": ((9, 11), (4, None, None, True)),
    "padded, smaller than a patch": ((1, 3), (4, None, None, True)),
    "padded around": ((10, 6), (4, None, 1, False)),
    "overlap": ((12, 20), (7, 4, None, False)),
    "overlap, even": ((8, 8), (4, 2, None, False)),
    "overlap, not padded around": ((10, 16), (4, 3, 0, False)),
    "overlap, padded": ((13, 10), (5, 4, 0, True)),
}


def build(case: str) -> tuple[PatchEmbedding, Tensor]:
    size, (patch_size, stride, padding, pad) = CASES[case]
    torch.manual_seed(0)
    module = PatchEmbedding(6, patch_size, in_channels=2, stride=stride, padding=padding, pad=pad, dtype=torch.float64)
    return module, torch.randn(3, 2, *size, dtype=torch.float64)


def naive(module: PatchEmbedding, images: Tensor) -> Tensor:
    """Patch by patch, each pixel outside the image a zero."""
    rows, columns = module.grid(*images.shape[-2:])
    weight, size = module.projection.weight, module.patch_size
    tokens = []
    for row in range(rows):
        for column in range(columns):
            token = module.projection.bias.expand(len(images), -1)
            for i in range(size):
                for j in range(size):
                    y, x = row * module.stride + i - module.padding, column * module.stride + j - module.padding
                    if 0 <= y < images.shape[2] and 0 <= x < images.shape[3]:
                        token = token + images[:, :, y, x] @ weight[:, :, i, j].T
            tokens.append(token)
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_projected_patches(case: str) -> None:
    module, images = build(case)
    expected = naive(module, images)
    # float64 sums of at most 98 terms of order one
    torch.testing.assert_close(module(images), expected, atol=1e-13, rtol=0)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((module(images) * weight).sum(), list(module.parameters()))
    wanted = torch.autograd.grad((expected * weight).sum(), list(module.parameters()))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("patch_size", "stride", "padding"), [(4, None, None), (7, 4, None), (3, 2, None), (7, 4, 2)])
def test_it_is_the_convolution(patch_size: int, stride: int | None, padding: int | None) -> None:
    """Patches of ViT, PVTv2's first and later stages, and CvT's first, on a size that they are used for."""
    torch.manual_seed(0)
    module = PatchEmbedding(5, patch_size, stride=stride, padding=padding, dtype=torch.float64)
    images = torch.randn(2, 3, 56, 112, dtype=torch.float64)
    weight, bias = module.projection.weight, module.projection.bias
    expected = torch.nn.functional.conv2d(images, weight, bias, stride=module.stride, padding=module.padding)
    assert module.grid(56, 112) == tuple(expected.shape[2:])
    torch.testing.assert_close(module(images), expected.flatten(2).mT, atol=1e-13, rtol=0)  # float64, 147 terms


@pytest.mark.parametrize("case", ["patches", "padded", "overlap, even"])
def test_gradients(case: str) -> None:
    module, images = build(case)
    images = images[:1].requires_grad_()
    assert torch.autograd.gradcheck(module, (images,))


@given(
    patch_size=st.integers(1, 6),
    stride=st.integers(1, 6),
    padding=st.none() | st.integers(0, 5),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
)
def test_every_pixel_lies_in_a_patch(
    patch_size: int, stride: int, padding: int | None, height: int, width: int
) -> None:
    stride, padding = min(stride, patch_size), None if padding is None else min(padding, patch_size - 1)
    strict, padded = (
        PatchEmbedding(1, patch_size, in_channels=1, stride=stride, padding=padding, pad=pad) for pad in (False, True)
    )
    torch.nn.init.ones_(padded.projection.weight)
    images = torch.zeros(1, 1, height, width, requires_grad=True)
    tokens = padded(images)
    rows, columns = padded.grid(height, width)
    assert tokens.shape == (1, rows * columns, 1)
    tokens.sum().backward()
    assert bool((images.grad > 0).all())
    try:
        grid = strict.grid(height, width)
    except ArgumentError as error:
        named = re.search(r"(height|width) .*; got (\d+)\. Resize it to ([\d or]+),", str(error))
        assert named is not None and int(named[2]) == {"height": height, "width": width}[named[1]]
        fitting = [size for size in range(1, 30) if fits(strict, size)]  # each size that is named, and no nearer one
        below, above = (n for n in fitting if n < int(named[2])), (n for n in fitting if n > int(named[2]))
        nearest = [max(below, default=None), min(above)]
        assert [int(n) for n in named[3].split(" or ")] == [n for n in nearest if n is not None]
    else:
        assert grid == (rows, columns)


def fits(module: PatchEmbedding, size: int) -> bool:
    """Whether a convolution reaches the image's last pixel."""
    made = (size + 2 * module.padding - module.patch_size) // module.stride + 1
    return made > 0 and (made - 1) * module.stride + module.patch_size >= size + module.padding


def test_an_image_is_cut_by_channel_row_and_column() -> None:
    module = PatchEmbedding(3, 2, in_channels=2)
    images = torch.arange(32.0).view(1, 2, 4, 4)
    assert module.cut(images)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert module.cut(images)[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]
    assert module.cut(images).shape == (1, 4, module.patch_dim)
    assert module.cut(images.double()).dtype == torch.float64  # no weight is met


def test_images_of_half_precision_and_no_images() -> None:
    module = PatchEmbedding(6, 4, dtype=torch.bfloat16)
    assert module(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module(torch.zeros(0, 3, 8, 8, dtype=torch.bfloat16)).shape == (0, 4, 6)


def test_what_does_not_fit_is_refused() -> None:
    module = PatchEmbedding(6, 4)
    with pytest.raises(
        ArgumentError, match=r"height must be filled by .* 4 pixels, 4 apart; got 30. Resize it to 28 or 32"
    ):
        module(torch.zeros(1, 3, 30, 32))
    with pytest.raises(
        ArgumentError, match=r"width must .* got 3. Resize it to 4, or build PatchEmbedding with pad=True"
    ):
        module(torch.zeros(1, 3, 4, 3))
    with pytest.raises(ArgumentError, match="height must be positive; got 0"):
        module(torch.zeros(1, 3, 0, 4))
    for images in (torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, 3)):
        with pytest.raises(
            ArgumentError, match=r"images must be floating point \[B, 3, H, W\]; got torch\..*in_channels"
        ):
            module(images)
    with pytest.raises(ArgumentError, match=r"got torch\.uint8 \[1, 3, 8, 8\]. Pass images.float\(\) / 255.$"):
        module(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(CombinationError, match="overlap, so images cannot be cut.*stride=4"):
        PatchEmbedding(6, 4, stride=2).cut(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="stride must be at most 4.*got 5. Choose stride=4"):
        PatchEmbedding(6, 4, stride=5)
    with pytest.raises(ArgumentError, match="padding must be at most 3.*got 4"):
        PatchEmbedding(6, 4, padding=4)
    with pytest.raises(ArgumentError, match="patch_size must be positive; got 0"):
        PatchEmbedding(6, 0)
    with pytest.raises(ArgumentError, match="patch_size must be a positive whole number; got True"):
        PatchEmbedding(6, True)
    for pad in ("no", None, 1):
        with pytest.raises(ArgumentError, match="pad must be True or False; got .* Pass pad=True or pad=False"):
            PatchEmbedding(6, 4, pad=pad)  # type: ignore[arg-type]
