"""How a model of any kind is run, and which part of its output is the answer."""

from inspect import signature

from torch import Tensor, nn

from transformer_problems.core.errors import CombinationError


def call(model: nn.Module, tokens: Tensor, key_mask: Tensor | None = None) -> object:
    """Run a model that takes its key mask by this package's name or by transformers'."""
    if key_mask is None:
        return model(tokens)
    parameters = signature(model.forward).parameters
    if "key_mask" in parameters:
        return model(tokens, key_mask=key_mask)
    if "attention_mask" in parameters:
        return model(tokens, attention_mask=key_mask.long())
    raise CombinationError(
        f"a model must take key_mask or attention_mask to be given one; {type(model).__name__} takes neither. Leave "
        "the key mask out and run sequences of one length."
    )


def answer(output: object) -> Tensor:
    """The tensor in a model's output: itself, its `logits`, or the first of a tuple.

    Raises:
        CombinationError: If there is none.
    """
    for found in (output, getattr(output, "logits", None), output[0] if isinstance(output, tuple) and output else None):
        if isinstance(found, Tensor):
            return found
    raise CombinationError(
        f"a model must give a tensor, or have it as `logits`; got {type(output).__name__}. Wrap the model so that it "
        "gives a tensor."
    )
