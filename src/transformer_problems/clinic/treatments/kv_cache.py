"""The cache of keys and values, turned on in a checkpoint that is configured to do without."""

from copy import deepcopy
from typing import Any, cast

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.decoding import uses_cache
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.treatment import Treated


class KVCacheOn:
    """Sets `use_cache` in the config and in that of `generate`; the weights stay as they are."""

    solution = "kv-cache"
    claims = (4,)

    def refusal(self, subject: Subject) -> str | None:
        if subject.kind != "causal":
            return (
                f"it writes no text, and {type(subject.model).__name__} keeps no keys and values from token to token."
            )
        if uses_cache(subject):
            return "it is configured to use its cache already."
        return None

    def apply(self, visit: Visit) -> Treated:
        subject = visit.subject
        model = deepcopy(subject.model)
        cast("Any", model).config.use_cache = True
        cast("Any", model).generation_config.use_cache = True
        return Treated(subject.with_model(model), {"use_cache": True, "why": "the config turned it off"})
