"""A model that sees only what stands right beside."""

import torch
from torch import Tensor

from transformer_problems.checkpoints.attention_bias import with_attention_bias
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError

_SHARE = 16


class NearSighted:
    """Every layer's attention sees a sixteenth of the window, so that layers together see some more."""

    problem = 3
    name = "attention is cut to a sixteenth of the window in every layer"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.trained_len is None:
            raise CombinationError(f"{subject.name} has no window of tokens, to cut it.")
        return with_window(subject, max(2, subject.trained_len // _SHARE))


def with_window(subject: Subject, window_size: int) -> Subject:
    """A copy whose tokens see no others from `window_size` tokens away on.

    Raises:
        CombinationError: If no part of it takes a mask, so that none can be put in.
    """

    def hide(before: Tensor) -> Tensor:
        return torch.zeros(before.shape, device=before.device).masked_fill(before.abs() >= window_size, -torch.inf)

    return with_attention_bias(subject, [hide])


FAULT = NearSighted()
