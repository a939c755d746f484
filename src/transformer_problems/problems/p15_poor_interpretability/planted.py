"""Real text with evidence planted in it: some tokens tell the answer, fewer tell two other classes, text says nothing.

Evidence is made of tokens outside the bytes, so that text can never be taken for it. Other than in `lab.data.needles`,
each planted token is marked by what it tells, and no example is padded.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

NUM_CLASSES = 8
VOTES = (4, 3, 2)  # planted tokens that tell the answer, a second class and a third
BLANK_TOKEN = 256  # in place of text in training, so that the model knows a token that says nothing
READ_TOKEN = 257  # the first token of every example, whose output is the answer
_FIRST_WORD = 258
_WORDS = 4  # tokens that tell one class
VOCAB_SIZE = _FIRST_WORD + NUM_CLASSES * _WORDS


@dataclass(frozen=True, slots=True)
class Planted:
    """A batch of examples of one length.

    Shape:
        tokens: [B, N + 1], the reading token first; answers: [B].
        planted: [B, N + 1], True for planted tokens; evidence: [B, N + 1], True for those that tell the answer.
        other_text: [B, N + 1], the reading token and another text, with nothing planted.
    """

    tokens: Tensor
    answers: Tensor
    planted: Tensor
    evidence: Tensor
    other_text: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def candidates(self) -> Tensor:
        """What may be named as evidence: all but the reading token, [B, N + 1]."""
        return self.tokens != READ_TOKEN

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(*(part.to(device) for part in self._parts()))

    def rows(self, start: int, stop: int) -> Self:
        """The examples from one to before another."""
        return type(self)(*(part[start:stop] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.answers, self.planted, self.evidence, self.other_text


def plant(text: Tensor, draws: torch.Generator) -> Planted:
    """Evidence at random places of each text; the text of the example before stands beside.

    Shape:
        text: [B, N] int64, bytes; B >= 2, and N >= 9, the number of planted tokens.
    """
    num, length = text.shape
    classes = torch.rand(num, NUM_CLASSES, generator=draws).argsort(dim=1)
    votes = classes[:, : len(VOTES)].repeat_interleave(torch.tensor(VOTES), dim=1)
    words = _FIRST_WORD + votes * _WORDS + torch.randint(_WORDS, votes.shape, generator=draws)
    places = torch.rand(num, length, generator=draws).argsort(dim=1)[:, : sum(VOTES)]
    nowhere = torch.zeros(num, length, dtype=torch.bool)
    planted, evidence = (nowhere.scatter(1, places[:, :many], value=True) for many in (sum(VOTES), VOTES[0]))
    return Planted(
        tokens=pad(text.scatter(1, places, words), (1, 0), value=READ_TOKEN),
        answers=classes[:, 0],
        planted=pad(planted, (1, 0), value=False),
        evidence=pad(evidence, (1, 0), value=False),
        other_text=pad(text.roll(1, dims=0), (1, 0), value=READ_TOKEN),
    )


def blanked(text: Tensor, draws: torch.Generator) -> Tensor:
    """Text with a share of its tokens blank, another share in each example, from none to all. text: [B, N]."""
    shares = torch.rand(len(text), 1, generator=draws)
    return text.masked_fill(torch.rand(text.shape, generator=draws) < shares, BLANK_TOKEN)
