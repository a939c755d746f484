"""How long the user's texts are beside what a model reads."""

from dataclasses import dataclass

import torch

from transformer_problems.checkpoints.checkup import estimate
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.records import Interval

_MOST_TEXTS = 256
_COUNTED = 20_000  # characters of a text whose tokens are counted; of the rest they are estimated from these


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a model of a set window would leave out.

    Args:
        unread: Share of all tokens that stand beyond the window in their text.
        longest: Tokens of the longest text.
        total: Tokens of all texts.
    """

    unread: Interval
    longest: int
    total: int


def measure_lengths(subject: Subject, texts: tuple[str, ...], window: int) -> Lengths:
    """Of all texts, or of 256 of them spread over all."""
    num = min(len(texts), _MOST_TEXTS)
    chosen = [texts[len(texts) * number // num] for number in range(num)]
    counts = torch.tensor([_num_tokens(subject, text) for text in chosen])
    beyond = (counts - window).clamp_min(0)
    return Lengths(
        estimate(beyond / counts.mean()),  # whose mean over texts is the share of all their tokens
        int(counts.max()),
        int(counts.mean() * len(texts)),
    )


def _num_tokens(subject: Subject, text: str) -> float:
    begun = text[:_COUNTED]
    counted = len(subject.tokenizer(begun, truncation=False, verbose=False)["input_ids"])
    return counted * len(text) / len(begun)
