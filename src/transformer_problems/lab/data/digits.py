"""scikit-learn's real 8x8 images of handwritten digits, whole, and as two tasks of five digits each."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from transformer_problems.core.seeding import generator

NUM_CLASSES = 5  # of each of the two tasks
SIZE = 8  # pixels a side
DIGITS_SOURCE = (
    "scikit-learn's digits of 8 x 8 pixels (the test set of Alpaydin and Kaynak's Optical Recognition of Handwritten "
    "Digits, UCI)"
)
_NUM_TEST = 300  # images, the same in every run


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images [B, 1, 8, 8], float32 from 0 to 1, and classes [B]."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, chosen: Tensor) -> "Images":
        """The chosen images, in that order."""
        return Images(self.pixels[chosen], self.classes[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class DigitTasks:
    """The digits 0 to 4, all labelled; and 5 to 9, the task in question, split for training and test."""

    source: Images
    train: Images
    test: Images


def load_digit_images() -> tuple[Images, Images]:
    """All 1,797 images with their ten classes, for training and for test; every call gives the same split."""
    images = _all_images()
    order = torch.randperm(len(images), generator=generator(0, "all digits"))
    return images.take(order[_NUM_TEST:]), images.take(order[:_NUM_TEST])


def load_digit_tasks() -> DigitTasks:
    """The two tasks, classes 0 to 4 in each; every call gives the same split."""
    images = _all_images()
    target = images.take((images.classes >= NUM_CLASSES).nonzero().squeeze(1))
    asked = Images(target.pixels, target.classes - NUM_CLASSES)
    order = torch.randperm(len(asked), generator=generator(0, "digits"))
    return DigitTasks(
        source=images.take((images.classes < NUM_CLASSES).nonzero().squeeze(1)),
        train=asked.take(order[_NUM_TEST:]),
        test=asked.take(order[:_NUM_TEST]),
    )


def _all_images() -> Images:
    bunch = load_digits()
    return Images(torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target))
