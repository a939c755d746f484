"""A model whose attention tells nothing."""

from copy import deepcopy

from transformer_problems.checkpoints.even_attention import drop_distance_bias, zero_queries
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError


class UniformAttention:
    """Queries are zeroed, and biases by distance: every token attends to all it sees alike."""

    problem = 15
    name = "every token attends to all others alike"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        if not zero_queries(model, subject.num_heads):
            raise CombinationError(f"the queries of {type(model).__name__} cannot be found, to zero them.")
        drop_distance_bias(model)
        return subject.with_model(model)


FAULT = UniformAttention()
