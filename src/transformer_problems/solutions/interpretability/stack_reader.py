"""Reads this package's own token models: embeddings put in by a hook, attention weights asked of the ops."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import CombinationError
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.interpretability.model_reading import (
    embedded,
    embedding_gives,
    read_row,
    reading_of,
)


def is_stack(model: nn.Module) -> bool:
    """Whether a model embeds tokens and runs blocks with a mixer each, as Encoder, Decoder and LlamaDecoder do."""
    body = getattr(model, "body", model)
    blocks = getattr(body, "blocks", ())
    return (
        hasattr(getattr(body, "embedding", None), "num_embeddings")
        and isinstance(blocks, nn.ModuleList)
        and all(hasattr(block, "mixer") for block in blocks)
    )


class StackReader:
    """A `Readable` around a model that gives logits for each token.

    Attention weights are what each op does: its output is a weighted sum of values, so that with the unit vectors as
    values it gives the weights themselves, whatever their pattern, bias or kernel. Costs N / D more calls of each op.

    Args:
        model: Encoder, Decoder, LlamaDecoder, or one of their form.
        read_at: The position whose logits are explained; -1 for the last real token.

    Raises:
        CombinationError: If a layer has no attention op, or one that is no weighted sum of values.
    """

    def __init__(self, model: nn.Module, read_at: int) -> None:
        self.model, self.read_at = model, read_at
        body = cast("Any", getattr(model, "body", model))
        self.embedding: nn.Module = body.embedding
        self.blocks: nn.ModuleList = body.blocks

    @property
    def vocab_size(self) -> int:
        return cast("int", self.embedding.num_embeddings)

    def embed(self, tokens: Tensor) -> Tensor:
        return embedded(self.embedding, tokens)

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        with evaluating(self.model), embedding_gives(self.embedding, tokens, embeddings):
            logits: Tensor = self.model(tokens, key_mask=key_mask)
        return read_row(logits, self.read_at, key_mask)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        found: list[Tensor] = []

        def read(op: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor) -> None:
            found.append(_weights(op, inputs, options, output))

        ops = {id(op): op for op in (_op_of(block) for block in self.blocks)}
        handles = [op.register_forward_hook(read, with_kwargs=True) for op in ops.values()]
        try:
            with torch.no_grad(), evaluating(self.model):
                self.model(tokens, key_mask=key_mask)
        finally:
            for handle in handles:
                handle.remove()
        if len(found) != len(self.blocks):
            raise CombinationError(
                f"each layer must call its attention op once to have one map of weights; {len(self.blocks)} layers "
                f"called theirs {len(found)} times. Use a gradient method such as GradientXInput."
            )
        return found

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return reading_of(tokens, self.read_at, key_mask)


def _op_of(block: nn.Module) -> nn.Module:
    mixer = cast("nn.Module", block.mixer)
    op = getattr(mixer, "op", None)
    if not isinstance(op, nn.Module):
        raise CombinationError(
            f"a layer must attend through an op to have weights to read; {type(mixer).__name__} does not. Use "
            "SelfAttention, or a gradient method such as GradientXInput."
        )
    return op


def _weights(op: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor) -> Tensor:
    """What an op multiplies the values by, [B, H, N, M], in float32 or wider."""
    q, k, v = inputs
    num_keys, head_dim = v.shape[-2:]
    units = torch.eye(num_keys, dtype=v.dtype, device=v.device)
    units = nn.functional.pad(units, (0, -num_keys % head_dim))  # as wide as values are: not every op takes others
    parts = [op.forward(q, k, part.expand_as(v), **options) for part in units.split(head_dim, dim=-1)]
    weights = torch.cat(parts, dim=-1)[..., :num_keys]
    weights = weights if weights.dtype == torch.float64 else weights.float()
    values = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3).to(weights.dtype)
    # Both sides round weights and sums to the values' dtype; kernels other than softmax err by some more.
    tolerance = (16 * torch.finfo(v.dtype).eps + 1e-4) * values.abs().amax()
    if weights.shape[-2] != num_keys or bool(((weights @ values - output).abs() > tolerance).any()):
        raise CombinationError(
            f"an op must give weighted sums of values to have weights to read; {type(op).__name__} does not. Use a "
            "gradient method such as GradientXInput."
        )
    return weights
