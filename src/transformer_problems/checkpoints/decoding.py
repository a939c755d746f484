"""A causal model that writes: token by token beside its cache, or as its checkpoint is configured to."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.modes import evaluating
from transformer_problems.lab.meters.flops import count_flops


class CachedText:
    """A text that the model has read, with its keys and values; more can be read one step after the other.

    Shape:
        tokens: [1, N].

    Raises:
        CombinationError: If the model keeps no cache.
    """

    def __init__(self, subject: Subject, tokens: Tensor) -> None:
        self._subject = subject
        self._cache: Any = None
        self.read(tokens)
        if self._cache is None:
            raise CombinationError(f"{type(subject.model).__name__} keeps no cache of keys and values.")

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits of the next tokens, [1, n, V]; tokens: [1, n]."""
        with evaluating(self._subject.model):
            output = self._subject.model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        return cast("Tensor", output.logits)

    @property
    def state_bytes(self) -> int:
        """Bytes of what is kept between tokens."""
        kept = [getattr(layer, name, None) for layer in self._cache.layers for name in ("keys", "values")]
        return sum(part.nbytes for part in kept if isinstance(part, Tensor))


def cache_bytes(subject: Subject, tokens: Tensor) -> float:
    """Bytes that each of these tokens [1, N] leaves in the cache of all layers; none of a model that keeps none.

    N must stay below the windows of layers that have some, since they keep no more.
    """
    try:
        return CachedText(subject, tokens).state_bytes / tokens.shape[1]
    except CombinationError:
        return 0.0


def uses_cache(subject: Subject) -> bool:
    """Whether the model writes with a cache where nobody says otherwise."""
    configured = cast("Any", subject.model).generation_config.use_cache
    return bool(getattr(subject.config, "use_cache", True) if configured is None else configured)


def without_cache(subject: Subject) -> Subject:
    """A copy that is configured to read the whole text again for each token that it writes."""
    model = deepcopy(subject.model)
    cast("Any", model).config.use_cache = False
    cast("Any", model).generation_config.use_cache = False
    return subject.with_model(model)


def next_token_flops(subject: Subject, tokens: Tensor) -> int:
    """FLOPs of one further token as `generate` writes it: what two tokens take beyond one.

    Args:
        tokens: The history, [1, N]; the last of it stands for the first token that is written.
    """
    return count_flops(lambda: _write(subject, tokens[:, :-1], 2)) - count_flops(
        lambda: _write(subject, tokens[:, :-1], 1)
    )


@torch.no_grad()
def _write(subject: Subject, tokens: Tensor, num: int) -> None:
    with evaluating(subject.model):
        cast("Any", subject.model).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num,
            min_new_tokens=num,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
