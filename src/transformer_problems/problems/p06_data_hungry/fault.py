"""A model whose training is lost."""

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p06_data_hungry.untrained import untrained


class TrainingLost:
    """All weights are drawn again at random."""

    problem = 6
    name = "all weights are drawn again"

    def plant(self, subject: Subject, seed: int) -> Subject:
        return untrained(subject, seed + 1)


FAULT = TrainingLost()
