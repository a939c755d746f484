"""The texts of a treatment: it chooses by one half of them, and is judged by the other."""

from dataclasses import replace

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import ArgumentError

_LONGEST = 256  # tokens of a text by which the loss within the trained length is read
_NUM, _FEWEST = 16, 4
_CHARACTERS_A_TOKEN = 32  # texts of more than this need no counting


def to_choose(visit: Visit, num: int, length: int) -> Tensor:
    """Excerpts to try settings on, [at most num, length]: of the first half of the texts."""
    return _excerpts(_half(visit, 0), num, length)


def to_judge(visit: Visit, num: int, length: int) -> Tensor:
    """Excerpts that nothing was chosen by, [at most num, length]: of the second half of the texts."""
    return _excerpts(_half(visit, 1), num, length)


def _half(visit: Visit, which: int) -> Visit:
    text = "\n".join(visit.material.texts)
    middle = len(text) // 2
    return replace(visit, material=replace(visit.material, texts=(text[:middle] if which == 0 else text[middle:],)))


def _excerpts(visit: Visit, num: int, length: int) -> Tensor:
    """As many as stand clear of each other.

    Raises:
        ArgumentError: If there are not enough, to tell how much they differ.
    """
    (text,) = visit.material.texts
    fewest = min(num, _FEWEST)
    if len(text) < _CHARACTERS_A_TOKEN * num * length:
        num_tokens = len(visit.subject.tokenizer(text, truncation=True, max_length=2 * num * length)["input_ids"])
        num = min(num, num_tokens // (2 * length))  # `Visit.texts` lets them begin in the first half of a short text
        if num < fewest:
            raise ArgumentError(
                f"--data must hold about {4 * fewest * length:,} tokens or more, a half to choose by and a half to "
                f"judge by; half of {visit.material.source} gave {num_tokens:,}. Add text, or leave --data out."
            )
    return visit.texts(num, length)["input_ids"]


def within(visit: Visit) -> tuple[int, int]:
    """How many texts are read for the loss within the trained length, and of how many tokens each.

    One token less than that length: outside of this package transformers' dynamic RoPE, once it has met a longer text,
    takes back what it did only below it.
    """
    return _NUM, min((visit.subject.trained_len or _LONGEST + 1) - 1, _LONGEST)


@torch.no_grad()
def losses_by_text(subject: Subject, texts: Tensor, visit: Visit) -> Tensor:
    """Nats a predicted token of each text [n, N], [n] in float64; tokens that a masked model is asked for are the same
    in every call."""
    found = []
    for number, text in enumerate(texts):
        inputs = {"input_ids": text[None], "attention_mask": torch.ones_like(text[None])}
        losses = subject.losses(inputs, generator=visit.generator("losses", number)).double()
        asked = losses.numel() if subject.kind == "causal" else int((losses != 0).sum())
        found.append(losses.sum() / max(asked, 1))
    return torch.stack(found).cpu()
