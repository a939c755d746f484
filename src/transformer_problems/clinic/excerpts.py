"""The texts of a treatment: it chooses by one half of them, and is judged by the other."""

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Subject

_LONGEST = 256  # tokens of a text by which the loss within the trained length is read
_NUM = 16


def to_choose(visit: Visit, num: int, length: int) -> Tensor:
    """Excerpts to try settings on, [num, length]."""
    return visit.texts(2 * num, length)["input_ids"][0::2]


def to_judge(visit: Visit, num: int, length: int) -> Tensor:
    """Excerpts from between those, [num, length]; short material makes them overlap."""
    return visit.texts(2 * num, length)["input_ids"][1::2]


def within(visit: Visit) -> tuple[int, int]:
    """How many texts are read for the loss within the trained length, and of how many tokens each.

    One token less than that length: transformers' dynamic RoPE, once it has met a longer text, takes back what it did
    only below it.
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
