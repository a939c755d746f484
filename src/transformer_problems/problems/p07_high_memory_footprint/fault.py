"""A model that holds all scores of a context far longer than it was made for."""

from typing import Any, cast

from transformer_problems.checkpoints.stretching import stretched
from transformer_problems.checkpoints.subject import Subject

_FACTOR = 16


class EagerScores:
    """Attention that keeps its N x N scores, at sixteen times the length."""

    problem = 7
    name = "attention keeps all scores, and the context is stretched 16 times"

    def plant(self, subject: Subject, seed: int) -> Subject:
        ill = stretched(subject, _FACTOR)
        cast("Any", ill.model).set_attn_implementation("eager")
        return ill


FAULT = EagerScores()
