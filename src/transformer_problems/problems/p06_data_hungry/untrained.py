"""What a model is worth by its architecture alone."""

from copy import deepcopy
from typing import Any, cast

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.seeding import seeded


def untrained(subject: Subject, seed: int) -> Subject:
    """The same architecture with weights drawn as its own class draws them before training."""
    model = cast("Any", subject.model)
    with seeded(seed, "untrained"):
        fresh = type(model)._from_config(deepcopy(model.config), dtype=subject.dtype)
    return subject.with_model(fresh.to(subject.device).eval())
