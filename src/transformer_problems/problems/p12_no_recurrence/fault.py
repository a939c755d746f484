"""A model that starts over with each token of a stream."""

from transformer_problems.checkpoints.decoding import without_cache
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError


class StartsOver:
    """No state is carried from token to token: each one reads the whole history again."""

    problem = 12
    name = "each token reads the whole history again"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.kind != "causal":
            raise CombinationError(f"{subject.name} takes no stream, so it has no state to lose.")
        return without_cache(subject)


FAULT = StartsOver()
