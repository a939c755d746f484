"""Reads models of the transformers library, without importing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.interpretability.model_reading import (
    check_gradients,
    embedded,
    embedding_gives,
    read_row,
    reading_of,
    slope_of,
)


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model has the form of a transformers text model."""
    embeddings = getattr(model, "get_input_embeddings", None)
    return (
        callable(embeddings)
        and not getattr(getattr(model, "config", None), "is_encoder_decoder", True)
        and hasattr(embeddings(), "num_embeddings")
    )


class TransformersReader:
    """A `Readable` around a transformers model whose output has `logits`: [B, K] of classes, or [B, N, V] of tokens.

    A classifier finds the token that it reads by itself: some by the padding token's id, which a key mask does not
    change. Where it reads is found as the positions that its logits have a gradient at.

    Args:
        model: With a head for sequence classification, causal or masked language modelling.
        read_at: The position whose logits are explained, of logits for each token; -1 for the last real token.
    """

    def __init__(self, model: nn.Module, read_at: int | None) -> None:
        self.model, self.read_at = model, read_at
        self.embedding: nn.Module = cast("Any", model).get_input_embeddings()

    @property
    def vocab_size(self) -> int:
        return cast("int", self.embedding.num_embeddings)

    def embed(self, tokens: Tensor) -> Tensor:
        return embedded(self.embedding, tokens)

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        # The tokens go in beside their embeddings, for some models find padding or positions by the tokens.
        with embedding_gives(self.embedding, tokens, embeddings):
            logits = self._run(tokens, key_mask).logits
        if logits.dim() == 2:
            self._check_no_choice()
            return cast("Tensor", logits)
        return read_row(logits, self._position, key_mask)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        with torch.no_grad(), eager_attention(self.model):
            found = getattr(self._run(tokens, key_mask, output_attentions=True), "attentions", None)
        num_layers = getattr(cast("Any", self.model).config, "num_hidden_layers", None)
        if not found or any(weights is None for weights in found) or len(found) != num_layers:
            raise CombinationError(
                f"a model must give the attention weights of all its layers; {type(self.model).__name__} does not. Use "
                "a gradient method such as GradientXInput."
            )
        return list(found)

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        check_gradients(tokens)
        with torch.enable_grad():
            embeddings = self.embed(tokens).requires_grad_()
            with embedding_gives(self.embedding, tokens, embeddings):
                output = self._run(tokens, key_mask, output_hidden_states=True)
            if output.logits.dim() == 3:
                return reading_of(tokens, self._position, key_mask)
            self._check_no_choice()
            # Unequal weights, or logits of classes that mirror each other would add up to a gradient of zero.
            weighted = output.logits @ torch.linspace(1.0, 2.0, output.logits.shape[1]).to(output.logits)
            slope = slope_of(weighted.sum(), output.hidden_states[-1])
        share = tokens.new_zeros(tokens.shape) if slope is None else slope.norm(dim=-1)
        if not bool((share.sum(dim=1) > 0).all()):
            raise CombinationError(
                f"where {type(self.model).__name__} reads its answer cannot be found. Use a gradient method such as "
                "GradientXInput."
            )
        return share / share.sum(dim=1, keepdim=True)

    @property
    def _position(self) -> int:
        return -1 if self.read_at is None else self.read_at

    def _check_no_choice(self) -> None:
        if self.read_at is not None:
            raise ArgumentError(
                f"read_at must be left out for {type(self.model).__name__}, which gives one row of logits a sequence; "
                f"got {self.read_at}. Leave it out."
            )

    def _run(self, tokens: Tensor, key_mask: Tensor | None, **wanted: bool) -> Any:
        mask = torch.ones_like(tokens) if key_mask is None else key_mask.to(tokens.dtype)
        if "use_cache" in signature(self.model.forward).parameters:  # states kept for decoding, some changed in place
            wanted = {**wanted, "use_cache": False}
        with evaluating(self.model):
            output = self.model(input_ids=tokens, attention_mask=mask, return_dict=True, **wanted)
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise ArgumentError(
                f"model must have a head that gives logits; {type(self.model).__name__} has none. Load it as "
                "AutoModelForSequenceClassification, AutoModelForCausalLM or AutoModelForMaskedLM."
            )
        return output


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside, attention is computed the way that keeps its weights; afterwards as before."""
    config, choose = cast("Any", model).config, getattr(model, "set_attn_implementation", None)
    before = getattr(config, "_attn_implementation", None)
    if choose is None or before == "eager":
        yield
        return
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        # such as Falcon, which asks its config at each pass; given a mask for a fused kernel, it would look ahead
        def choose(name: str | None) -> None:
            config._attn_implementation = name

    choose("eager")
    try:
        yield
    finally:
        choose(before)
