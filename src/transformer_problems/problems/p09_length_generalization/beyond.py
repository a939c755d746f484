"""What a model loses on tokens beyond its trained length, beside the same tokens with a history inside it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Subject

_EVERY = 7  # of a masked model, one token in seven is hidden, about as many as in its training
_MOST_LOGITS = 2**24  # computed at once

Stretch = Literal["linear", "ntk"]


@dataclass(frozen=True, slots=True)
class Losses:
    """Nats a token of one text, by place.

    Args:
        places: Of the tokens that were foretold, [n]; from the trained length on they are beyond it.
        read_on: With all that stands before, [n].
        in_pieces: Of the last ones, those beyond the trained length, with a history that fits it.
    """

    places: Tensor
    read_on: Tensor
    in_pieces: Tensor

    @property
    def extra(self) -> float:
        return float((self.read_on[-len(self.in_pieces) :] - self.in_pieces).mean())


def losses_beyond(subject: Subject, tokens: Tensor, trained_len: int) -> Losses:
    """Read one text [N] whole, and what is beyond in two pieces of the trained length.

    Pieces have the text's special tokens around them. Those of a causal model end with what is foretold, so that at
    least half of the trained length stands before it; those of a masked model have it in their middle.
    """
    front, back = _frame(subject, tokens)
    body = tokens[front : len(tokens) - back]
    room, begin = trained_len - front - back, trained_len - front  # body[begin] stands at the trained length
    step = _step(subject, len(tokens))
    foretold = torch.arange(1 if subject.kind == "causal" else step // 2, len(body), step)
    read_on = foretold_losses(subject, tokens, foretold + front)
    beyond = foretold[foretold >= begin]
    pieces = []
    for part in beyond.chunk(2):
        first, last = int(part[0]), int(part[-1]) + 1
        end = last if subject.kind == "causal" else min(len(body), (first + last + room) // 2)
        piece = torch.cat([tokens[:front], body[end - room : end], tokens[len(tokens) - back :]])
        pieces.append(foretold_losses(subject, piece, part - (end - room) + front))
    return Losses(foretold + front, read_on, torch.cat(pieces))


def foretold_losses(subject: Subject, tokens: Tensor, places: Tensor) -> Tensor:
    """Nats of the tokens at those places of a text [N], in float64 on the CPU."""
    places = places.to(tokens.device)
    row = tokens[None]
    if subject.kind == "causal":
        given = {"input_ids": row, "attention_mask": torch.ones_like(row), "logits_to_keep": places - 1}
        logits = subject.run(given).output[0]
    else:
        hidden = row.clone()
        hidden[0, places] = subject.mask_id
        logits = subject.run({"input_ids": hidden, "attention_mask": torch.ones_like(row)}).output[0, places]
    return nn.functional.cross_entropy(logits.float(), tokens[places], reduction="none").double().cpu()


@contextmanager
def stretched(subject: Subject, stretch: Stretch, factor: float) -> Iterator[None]:
    """Inside, rotary angles are those of a text `factor` times shorter; afterwards as before.

    Source:
        linear: Chen et al. 2023, arXiv:2306.15595; ntk: Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """
    parts = rotary_parts(subject)
    before = [part.clone() for part in parts]
    try:
        for part in parts:
            num = len(part)
            powers = torch.ones(num) if stretch == "linear" else torch.arange(num) / max(1, num - 1)
            part.copy_(part / factor ** powers.to(part.device))
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            part.copy_(values)


def rotary_parts(subject: Subject) -> Sequence[Tensor]:
    """The frequencies of the model's rotary embeddings, each [D / 2]; none where it has other positions."""
    found = (getattr(part, "inv_freq", None) for part in subject.model.modules())
    return [part for part in found if isinstance(part, Tensor) and part.dim() == 1]


def _frame(subject: Subject, tokens: Tensor) -> tuple[int, int]:
    """How many special tokens stand before and after the text."""
    special = [token in set(subject.tokenizer.all_special_ids) for token in (int(tokens[0]), int(tokens[-1]))]
    first, last = (int(found) for found in special)
    return (first, last) if subject.num_special else (0, 0)


def _step(subject: Subject, length: int) -> int:
    if subject.kind == "encoder":
        return _EVERY
    return ceil(length * int(subject.config.vocab_size) / _MOST_LOGITS)
