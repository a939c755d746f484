"""Digits drawn larger: as bilinear interpolation has it, pixel by pixel."""

import math

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.digits import Images, load_digit_images
from transformer_problems.lab.data.upscaled_digits import upscaled

IMAGES = load_digit_images()[1].take(torch.arange(3))


@pytest.mark.parametrize("size", [16, 32, 64, 13])
def test_each_pixel_is_between_its_four_neighbours(size: int) -> None:
    large = upscaled(IMAGES, size)
    assert large.pixels.shape == (3, 1, size, size)
    assert torch.equal(large.classes, IMAGES.classes)
    expected = torch.zeros(3, 1, size, size)
    for row in range(size):
        for column in range(size):
            # the border goes on outside
            y, x = (min(max((place + 0.5) * 8 / size - 0.5, 0.0), 7.0) for place in (row, column))
            for i in {math.floor(y), math.ceil(y)}:
                for j in {math.floor(x), math.ceil(x)}:
                    expected[..., row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * IMAGES.pixels[..., i, j]
    torch.testing.assert_close(large.pixels, expected, atol=1e-6, rtol=0)  # float32 sums of four terms of at most one


def test_at_their_own_size_they_are_as_they_were() -> None:
    assert torch.equal(upscaled(IMAGES, 8).pixels, IMAGES.pixels)


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="size must be positive; got 0"):
        upscaled(IMAGES, 0)
    assert isinstance(upscaled(IMAGES, 16), Images)


def test_images_of_bytes_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"pixels of floating point from 0 to 1; got torch.uint8. Divide bytes by"):
        upscaled(Images(IMAGES.pixels.byte(), IMAGES.classes), 16)
