"""A model whose context was stretched until attention is nearly all of its cost."""

from transformer_problems.checkpoints.stretching import stretched
from transformer_problems.checkpoints.subject import Subject

_FACTOR = 16


class Stretched:
    """Sixteen times the length that the model was made for, with attention as before."""

    problem = 1
    name = "the context is stretched 16 times"

    def plant(self, subject: Subject, seed: int) -> Subject:
        return stretched(subject, _FACTOR)


FAULT = Stretched()
