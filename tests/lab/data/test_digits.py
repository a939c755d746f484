"""The digits are split the same way at every call, no image is on both sides, and the two tasks share no class."""

import pytest
import torch
from sklearn.datasets import load_digits

from transformer_problems.lab.data.digits import NUM_CLASSES, SIZE, Images, load_digit_images, load_digit_tasks

NUM_IMAGES = 1797  # as scikit-learn says of its copy, all of them different


def rows(images: Images) -> set[tuple[float, ...]]:
    return {tuple(row) for row in images.pixels.flatten(1).tolist()}


def digits_of(images: Images) -> list[int]:
    """The digit that each image was published with, looked up by its pixels."""
    bunch = load_digits()
    published = {
        tuple(image.flatten() / 16): int(digit) for image, digit in zip(bunch.images, bunch.target, strict=True)
    }
    return [published[tuple(row)] for row in images.pixels.flatten(1).tolist()]


def test_images_are_gray_and_scaled_to_one() -> None:
    train, test = load_digit_images()
    for images in (train, test):
        assert images.pixels.shape == (len(images), 1, SIZE, SIZE)
        assert images.pixels.dtype == torch.float32
        assert images.pixels.min() == 0
        assert images.pixels.max() == 1


def test_the_whole_set_is_split_without_overlap() -> None:
    train, test = load_digit_images()
    assert len(test) == 300
    assert not rows(train) & rows(test)
    assert len(rows(train) | rows(test)) == len(train) + len(test) == NUM_IMAGES


def test_each_image_keeps_its_digit() -> None:
    for images in load_digit_images():
        assert images.classes.tolist() == digits_of(images)
        assert set(images.classes.tolist()) == set(range(10))


def test_the_two_tasks_share_no_class_and_no_image() -> None:
    tasks = load_digit_tasks()
    assert tasks.source.classes.tolist() == digits_of(tasks.source)
    assert set(tasks.source.classes.tolist()) == {0, 1, 2, 3, 4}
    for images in (tasks.train, tasks.test):
        assert (images.classes + NUM_CLASSES).tolist() == digits_of(images)
        assert set(images.classes.tolist()) == {0, 1, 2, 3, 4}
    parts = [rows(images) for images in (tasks.source, tasks.train, tasks.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == NUM_IMAGES
    assert len(tasks.test) == 300


def test_there_are_as_many_examples_as_labels_may_be_asked_for() -> None:
    assert len(load_digit_tasks().train) >= 500


def test_every_call_gives_the_same_split() -> None:
    for once, again in zip(load_digit_images(), load_digit_images(), strict=True):
        assert torch.equal(once.pixels, again.pixels)
        assert torch.equal(once.classes, again.classes)
    assert torch.equal(load_digit_tasks().test.pixels, load_digit_tasks().test.pixels)
    assert torch.equal(load_digit_tasks().train.classes, load_digit_tasks().train.classes)


@pytest.mark.parametrize("chosen", [[], [2], [3, 0, 0]])
def test_images_are_taken_in_the_order_asked_for(chosen: list[int]) -> None:
    images = Images(torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([5, 6, 7, 8]))
    taken = images.take(torch.tensor(chosen, dtype=torch.long))
    assert len(taken) == len(chosen)
    assert taken.pixels.flatten().tolist() == chosen
    assert taken.classes.tolist() == [5 + i for i in chosen]
