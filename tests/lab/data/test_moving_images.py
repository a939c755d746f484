"""Moving digits stay whole, move as fast as their class says, and give it away in no single frame."""

import math

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.digits import SIZE, Images, load_digit_images
from transformer_problems.lab.data.moving_images import SPEEDS, _ways, moving_digits
from transformer_problems.lab.data.upscaled_digits import upscaled

TRAIN, TEST = load_digit_images()


def square(gray: float) -> Images:
    return Images(torch.full((1, 1, SIZE, SIZE), gray), torch.zeros(1, dtype=torch.long))


def test_clips_are_gray_and_of_every_class() -> None:
    clips = moving_digits(TRAIN, 200, num_frames=6, size=20, generator=generator(0))
    assert clips.pixels.shape == (200, 1, 6, 20, 20) and len(clips) == 200
    assert clips.pixels.dtype == torch.float32
    assert clips.pixels.min() == 0 and clips.pixels.max() == 1
    assert clips.classes.unique().tolist() == [0, 1, 2, 3]


def test_the_same_generator_makes_the_same_clips() -> None:
    first, again, other = (
        moving_digits(TEST, 4, num_frames=3, size=16, generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.classes, again.classes)
    assert not torch.equal(first.pixels, other.pixels)


def test_two_whole_images_are_in_every_frame() -> None:
    light = moving_digits(square(0.25), 50, num_frames=20, size=13, generator=generator(0))
    total = light.pixels.sum(dim=(3, 4))
    assert torch.equal(total, torch.full_like(total, 2 * 0.25 * SIZE**2))  # sums of quarters are exact
    dark = moving_digits(square(0.75), 50, num_frames=20, size=13, generator=generator(0))
    assert torch.equal(dark.pixels, (3 * light.pixels).clamp(max=1))  # where squares overlap


def test_images_keep_their_form() -> None:
    dot = torch.zeros(1, 1, SIZE, SIZE)
    dot[0, 0, 1, 5] = 0.5
    clips = moving_digits(Images(dot, torch.zeros(1)), 300, num_frames=5, size=12, generator=generator(0))
    assert torch.equal(clips.pixels.sum(dim=(3, 4)), torch.ones(300, 1, 5))
    rows, columns = clips.pixels.nonzero()[:, -2:].T
    assert (rows.min(), rows.max()) == (1, 1 + 12 - SIZE)  # from border to border
    assert (columns.min(), columns.max()) == (5, 5 + 12 - SIZE)


@pytest.mark.parametrize("side", [8, 32])
def test_a_class_is_a_speed(side: int) -> None:
    """On a field so large that most never meet a border, from the first frame to the last."""
    speed = (side * torch.tensor(SPEEDS)).repeat_interleave(100)
    corners = _ways(speed, 101, 100_000, generator(0)).double()
    distance = (corners[:, -1] - corners[:, 0]).norm(dim=1).unflatten(0, (len(SPEEDS), 100)).median(dim=1).values
    expected = 100 * side * torch.tensor(SPEEDS, dtype=torch.float64)
    torch.testing.assert_close(distance, expected, atol=2**0.5, rtol=0)  # each end is rounded by half a pixel an axis


@pytest.mark.parametrize(("room", "speed"), [(5, 4.0), (8, 0.5), (8, 4.0), (56, 4.0)])
def test_an_image_goes_straight_until_it_bounces(room: int, speed: float) -> None:
    corners = _ways(torch.full((64,), speed), 50, room, generator(0))
    drawn = generator(0)
    place = room * torch.rand(64, 1, 2, generator=drawn)[:, 0].double()
    angle = 2 * math.pi * torch.rand(64, 1, generator=drawn)[:, 0].double()
    velocity = speed * torch.stack([angle.sin(), angle.cos()], dim=1)
    for frame in range(50):
        # rounded by at most a half; float32 counts to 200 within 2^-16
        assert bool(((corners[:, frame] - place).abs() <= 0.5 + 1e-4).all())
        place = place + velocity
        for beyond, mirrored in ((place < 0, -place), (place > room, 2 * room - place)):
            place, velocity = place.where(~beyond, mirrored), velocity.where(~beyond, -velocity)
    assert corners.min() == 0 and corners.max() == room


def test_no_single_frame_tells_the_speed() -> None:
    """At any moment all places but the two borders are as likely, those half as much, for every speed."""
    num_ways, room, last = 40_000, 8, 9
    for speed in SPEEDS:
        corners = _ways(torch.full((num_ways,), SIZE * speed), last + 1, room, generator(0))
        for frame in (0, 1, last):
            for axis in (0, 1):
                share = corners[:, frame, axis].bincount(minlength=room + 1) / num_ways
                expected = torch.full((room + 1,), 1 / room)
                expected[[0, -1]] /= 2  # what is rounded to a border comes from one side
                deviation = (expected * (1 - expected) / num_ways).sqrt()
                assert bool(((share - expected).abs() < 5 * deviation).all())  # five sigma


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="size must leave images of 8 pixels a side room to move; got 8. Choose 9 or"
    ):
        moving_digits(TEST, 2, num_frames=4, size=8, generator=generator(0))
    with pytest.raises(ArgumentError, match="size must leave images of 16 pixels .* got 12. Choose 17 or"):
        moving_digits(upscaled(TEST, 16), 2, num_frames=4, size=12, generator=generator(0))
    assert moving_digits(TEST, 2, num_frames=4, size=9, generator=generator(0)).pixels.shape[-1] == 9  # as advised
    as_bytes = Images((255 * TEST.pixels).byte(), TEST.classes)
    with pytest.raises(
        ArgumentError, match=r"digits must be square images of floating point .* got torch.uint8 .* 255"
    ):
        moving_digits(as_bytes, 2, num_frames=4, size=16, generator=generator(0))
    with pytest.raises(ArgumentError, match=r"digits must be square .* \[300, 1, 4, 8\]. Crop"):
        moving_digits(Images(TEST.pixels[:, :, :4], TEST.classes), 2, num_frames=4, size=16, generator=generator(0))
    with pytest.raises(ArgumentError, match="num_frames must be 2 or more, for a speed to be seen; got 1"):
        moving_digits(TEST, 2, num_frames=1, size=16, generator=generator(0))
    with pytest.raises(ArgumentError, match="num_clips must be positive; got 0"):
        moving_digits(TEST, 0, num_frames=4, size=16, generator=generator(0))
