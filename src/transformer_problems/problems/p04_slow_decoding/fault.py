"""A model that forgets what it has computed."""

from transformer_problems.checkpoints.decoding import without_cache
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError


class Forgetful:
    """Config and generation config say not to use the cache, so each new token reads the whole text again."""

    problem = 4
    name = "the cache is switched off in its config"

    def plant(self, subject: Subject, seed: int) -> Subject:
        if subject.kind != "causal":
            raise CombinationError(f"{subject.name} writes no text, so it has no cache to switch off.")
        return without_cache(subject)


FAULT = Forgetful()
