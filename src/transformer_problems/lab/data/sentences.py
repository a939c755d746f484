"""Generated sentences whose meaning is their word order.

Two questions with a chance level of one half for a reader who sees only which words occur:
who did it ("the dog chased the man", "the man was chased by the dog"), and does a precede b.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NOUNS = 24
_VERBS = 12
_PAD, _THE, _BY, _WAS, _END, _ASK, _A, _B = range(8)
_FIRST_NOUN = 8
_FIRST_VERB = _FIRST_NOUN + _NOUNS
VOCAB_SIZE = _FIRST_VERB + _VERBS
NUM_ANSWERS = _NOUNS + 2  # an agent, or no / yes
_LENGTH = 9


@dataclass(frozen=True, slots=True)
class Questions:
    """A batch of sentences that end in the token whose output is the answer.

    Shape:
        tokens: [B, 9]; key_mask: [B, 9]; last: [B], index of the asking token; answers: [B].
        candidates: [B, 2], the two answers a reader blind to order cannot choose between.
    """

    tokens: Tensor
    key_mask: Tensor
    last: Tensor
    answers: Tensor
    candidates: Tensor

    def read(self, outputs: Tensor) -> Tensor:
        """The outputs at the asking tokens, [B, N, A] -> [B, A]."""
        return outputs[torch.arange(len(outputs), device=outputs.device), self.last.to(outputs.device)]


def who_did_what(num: int, generator: torch.Generator) -> Questions:
    """Active and passive sentences; the answer is the one who acts."""
    rows, answers, candidates = [], [], []
    agents, patients = _two_distinct(num, generator)
    verbs = torch.randint(_VERBS, (num,), generator=generator)
    passive = torch.rand(num, generator=generator) < 0.5
    for a, p, v, is_passive in zip(agents.tolist(), patients.tolist(), verbs.tolist(), passive.tolist(), strict=True):
        agent, patient, verb = _FIRST_NOUN + a, _FIRST_NOUN + p, _FIRST_VERB + v
        active = [_THE, agent, verb, _THE, patient, _END]
        rows.append([_THE, patient, _WAS, verb, _BY, _THE, agent, _END] if is_passive else active)
        answers.append(a)
        candidates.append([a, p])
    return _questions(rows, answers, candidates)


def which_comes_first(num: int, generator: torch.Generator) -> Questions:
    """Eight words, two of which are a and b: does a precede b?"""
    rows, answers = [], []
    for _ in range(num):
        row = (_FIRST_NOUN + torch.randint(_NOUNS, (_LENGTH - 1,), generator=generator)).tolist()
        i, j = torch.randperm(len(row), generator=generator)[:2].tolist()
        row[i], row[j] = _A, _B
        rows.append(row)
        answers.append(_NOUNS + int(i < j))
    return _questions(rows, answers, [[_NOUNS, _NOUNS + 1]] * num)


def _two_distinct(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = torch.randint(_NOUNS, (num,), generator=generator)
    step = torch.randint(1, _NOUNS, (num,), generator=generator)
    return first, (first + step) % _NOUNS


def _questions(rows: list[list[int]], answers: list[int], candidates: list[list[int]]) -> Questions:
    tokens = torch.full((len(rows), _LENGTH), _PAD)
    for i, row in enumerate(rows):
        tokens[i, : len(row) + 1] = torch.tensor([*row, _ASK])
    last = torch.tensor([len(row) for row in rows])
    return Questions(tokens, tokens != _PAD, last, torch.tensor(answers), torch.tensor(candidates))
