"""What the readers of image and sound files give: examples as tensors, each with its class."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images of one size, and the class of each.

    Args:
        pixels: [B, channels, height, width] uint8, 0 black; divide by 255 when a batch is taken.
        classes: [B] int64, indices of `class_names`.
        class_names: One for each class.
        num_skipped: Files and folders that are left out: unreadable, of another type, or in no class's folder.
    """

    pixels: Tensor
    classes: Tensor
    class_names: tuple[str, ...]
    num_skipped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSequences:
    """Sequences of features, padded with zeros to the longest, and the class of each.

    Args:
        features: [B, N, F] float32.
        key_mask: [B, N] bool, True for real frames.
        classes: [B] int64, indices of `class_names`.
        class_names: One for each class.
        num_skipped: Files and folders that are left out: unreadable, of another type, or in no class's folder.
        num_cut: Sequences of which only the beginning is here.
    """

    features: Tensor
    key_mask: Tensor
    classes: Tensor
    class_names: tuple[str, ...]
    num_skipped: int = 0
    num_cut: int = 0

    @classmethod
    def padded(
        cls,
        sequences: list[Tensor],
        classes: list[int],
        class_names: tuple[str, ...],
        *,
        num_skipped: int = 0,
        num_cut: int = 0,
    ) -> Self:
        """From sequences [N, F] of any lengths N."""
        features = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        key_mask = torch.arange(features.shape[1]) < lengths[:, None]
        return cls(features, key_mask, torch.tensor(classes), class_names, num_skipped, num_cut)
