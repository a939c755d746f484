"""Evidence planted in noise: a few tokens decide the class, all others are padding or real text that says nothing.

Synthetic by design, after the distraction tests of the literature (Shi et al. 2023, arXiv:2302.00093), at the size of
byte-level models: evidence is made of tokens outside the bytes, so that text can never be taken for it.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformer_problems.core.errors import ArgumentError

NUM_CLASSES = 8
NUM_NEEDLES = 8  # evidence tokens in an example: 4 vote for its class, 2 for another, 1 each for two more
PAD_TOKEN = 256
READ_TOKEN = 257  # the first token of every example, whose output is the answer
_FIRST_NEEDLE = 258
_WORDS = 4  # tokens that vote for one class
VOCAB_SIZE = _FIRST_NEEDLE + NUM_CLASSES * _WORDS
_VOTES = (0, 0, 0, 0, 1, 1, 2, 3)  # which of four distinct classes each evidence token votes for; the first wins
_PADDING = (0.25, 0.75)  # range of the share of padding in the noise


@dataclass(frozen=True, slots=True)
class Needles:
    """A batch of examples of one length.

    Shape:
        tokens: [B, N + 1], the reading token first; answers: [B].
        key_mask: [B, N + 1], False for padding; noise: [B, N + 1], True for padding and text.
    """

    tokens: Tensor
    key_mask: Tensor
    noise: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(
            self.tokens.to(device), self.key_mask.to(device), self.noise.to(device), self.answers.to(device)
        )

    def first(self, num: int) -> Self:
        """The first examples alone."""
        return type(self)(self.tokens[:num], self.key_mask[:num], self.noise[:num], self.answers[:num])


def length_at(noise_share: float) -> int:
    """Tokens, the reading token not counted, of which this share is noise.

    Raises:
        ArgumentError: If the share is not in [0, 1).
    """
    if not 0 <= noise_share < 1:
        raise ArgumentError(f"noise_share must be in [0, 1); got {noise_share}. Evidence needs some room.")
    return round(NUM_NEEDLES / (1 - noise_share))


def plant_needles(text: Tensor, generator: torch.Generator) -> Needles:
    """Text with evidence at random places, cut at a different length in each example and padded from there.

    Everything that does not depend on the length is drawn first: generators that start alike plant the same evidence
    into texts of any length.

    Shape:
        text: [B, N] int64, bytes, N >= NUM_NEEDLES; what it leaves beside the evidence is the noise.

    Raises:
        ArgumentError: If the text is shorter than the evidence.
    """
    batch_size, length = text.shape
    if length < NUM_NEEDLES:
        raise ArgumentError(
            f"text must have at least {NUM_NEEDLES} tokens an example, one for each piece of evidence; got {length}. "
            "Use length_at(noise_share)."
        )
    answers, evidence = _evidence(batch_size, generator)
    low, high = _PADDING
    padded = low + (high - low) * torch.rand(batch_size, 1, generator=generator)
    num_real = length - ((length - NUM_NEEDLES) * padded).round().long()  # [B, 1]
    is_real = torch.arange(length) < num_real
    places = torch.rand(text.shape, generator=generator).masked_fill(~is_real, 2.0).argsort(dim=1)[:, :NUM_NEEDLES]
    tokens = text.masked_fill(~is_real, PAD_TOKEN).scatter(1, places, evidence)
    noise = torch.ones_like(is_real).scatter(1, places, torch.zeros_like(places, dtype=torch.bool))
    return Needles(
        tokens=pad(tokens, (1, 0), value=READ_TOKEN),
        key_mask=pad(is_real, (1, 0), value=True),
        noise=pad(noise, (1, 0), value=False),
        answers=answers,
    )


def _evidence(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes [B] and the evidence tokens for them, [B, NUM_NEEDLES]."""
    classes = torch.rand(batch_size, NUM_CLASSES, generator=generator).argsort(dim=1)
    votes = classes[:, list(_VOTES)]
    words = torch.randint(_WORDS, votes.shape, generator=generator)
    return classes[:, 0], _FIRST_NEEDLE + votes * _WORDS + words
