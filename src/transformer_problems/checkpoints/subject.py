"""A model of transformers as the clinic sees it: what it is, what it takes, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.record import TreatmentRecord
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.modes import evaluating
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.solutions.interpretability.transformers_reader import eager_attention

Kind = Literal["causal", "encoder", "image"]
Inputs = Mapping[str, Tensor]
"""What a pass takes: input_ids and attention_mask [B, N] of text, or pixel_values [B, 3, height, width]."""

_FIELDS_OF_LENGTH = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
_FIELDS_OF_WINDOWS = ("sliding_window", "attention_chunk_size")
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "position_embedding", "positions_embed")
_CODED = ("codes", "bias")  # buffers of a layer in int8 that were parameters
_LAYER_LISTS = ("layers", "layer", "h", "blocks", "albert_layer_groups")


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass gave.

    Args:
        output: Logits [B, N, V] or [B, K]; the last hidden states [B, N, C] of a model without a head.
        states: Where they were asked for, the hidden states after the embedding and after each layer, [B, N, C].
        attentions: Where they were asked for, the weights of each layer, [B, H, N, N].
    """

    output: Tensor
    states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A model with what is needed to run it; every pass is in evaluation and leaves the model as it was.

    Args:
        name: What the reader calls it.
        kind: "causal" writes text, "encoder" reads text, "image" reads images.
        model: A transformers model.
        tokenizer: A transformers tokenizer; of an image model its image processor, or none, which takes means and
            deviations of 0.5.
        caution: What the reader has to know of how it was loaded, before the findings.
        record: What was done to it before, if anything was.
        folder: Where it was read from; None of a model that was in memory.
    """

    name: str
    kind: Kind
    model: nn.Module
    tokenizer: Any = None
    caution: str | None = None
    record: TreatmentRecord | None = None
    folder: Path | None = None

    @property
    def config(self) -> Any:
        return cast("Any", self.model).config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """Numbers that were learned, those that are stored as codes by now among them."""
        codes = (dict(part.named_buffers(recurse=False)).get(name) for part in self._quantized for name in _CODED)
        counted = sum(tensor.numel() for tensor in codes if tensor is not None)
        return counted + sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all that is stored of it, the scales of codes among them."""
        return stored_bytes(self.model)

    @property
    def holds_codes(self) -> bool:
        """Whether layers of it are quantized."""
        return bool(self._quantized)

    @property
    def num_layers(self) -> int:
        return int(self._configured("num_hidden_layers", "n_layer", "num_layers"))

    @property
    def num_heads(self) -> int:
        heads = self._configured("num_attention_heads", "n_head", "num_heads")
        return int(heads if isinstance(heads, int) else heads[0])

    @property
    def embed_dim(self) -> int:
        return int(self._configured("hidden_size", "n_embd", "dim"))

    @cached_property
    def trained_len(self) -> int | None:
        """Tokens that the model was trained to take, as its config or tokenizer says; of an image model none."""
        if self.kind == "image":
            return None
        for source, names in ((self.config, _FIELDS_OF_LENGTH), (self.tokenizer, ("model_max_length",))):
            for name in names:
                found = getattr(source, name, None)
                if isinstance(found, int) and 1 < found < 10_000_000:
                    return min(found, self.hard_limit or found)
        return self.hard_limit

    @cached_property
    def hard_limit(self) -> int | None:
        """Tokens beyond which the model has no positions and fails; None where it takes any number."""
        if self.kind == "image":
            return None
        if self.config.model_type == "mpt":  # its biases by distance are made for so many keys
            return int(self.config.max_seq_len)
        for path, part in self.model.named_modules():
            if isinstance(turns := getattr(part, "embed_positions", None), Tensor):  # GPT-J's sines and cosines
                return len(turns)
            if path.rpartition(".")[2] in POSITION_TABLES and isinstance(part, nn.Embedding):
                skipped = 2 if hasattr(part, "offset") else 0  # OPT's first rows stand for no position
                if part.padding_idx is not None:  # RoBERTa counts from the row after that of padding
                    skipped = part.padding_idx + 1
                return part.num_embeddings - skipped
        return None

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, how many keys a token sees at most, itself included; None where it sees all there are.

        GPT-Neo's count as none: its cache and its attention hold all keys, and mask what is far.
        """
        config, num_layers = self.config, self.num_layers
        sizes = [size for name in _FIELDS_OF_WINDOWS if isinstance(size := getattr(config, name, None), int)]
        if self.kind == "image" or not sizes or not getattr(config, "use_sliding_window", True):
            return (None,) * num_layers
        seen = sizes[0] if self.kind == "causal" else 2 * sizes[0] + 1
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
        return tuple(None if kind == "full_attention" else seen for kind in kinds)

    @property
    def narrowest(self) -> int | None:
        """The fewest keys that a layer is held to; None where all see everything."""
        return min((window for window in self.windows if window is not None), default=None)

    def keys_met(self, length: float) -> float:
        """How many of `length` keys a token sees, on average over the layers."""
        return sum(min(length, window or length) for window in self.windows) / len(self.windows)

    @property
    def num_special(self) -> int:
        """Tokens such as [CLS] that the tokenizer puts around a text."""
        return int(self.tokenizer.num_special_tokens_to_add()) if self.tokenizer is not None else 0

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, first to last.

        Raises:
            CombinationError: If they cannot be told apart, as where all share one set of weights.
        """
        for path, part in self.model.named_modules():
            fits = isinstance(part, nn.ModuleList) and len(part) == self.num_layers
            if fits and path.rpartition(".")[2] in _LAYER_LISTS:
                return list(cast("nn.ModuleList", part))
        raise CombinationError(f"the layers of {type(self.model).__name__} cannot be told apart.")

    @property
    def has_loss(self) -> bool:
        """Whether the model predicts tokens: a causal model, or an encoder with the head of a masked one."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return self.kind == "causal" or (self.kind == "encoder" and head is not None)

    @property
    def body(self) -> "Subject":
        """The same without a head: its passes give the last hidden states, and no logits of a large vocabulary."""
        return self.with_model(cast("Any", self.model).base_model)

    def run(self, inputs: Inputs, *, states: bool = False, attentions: bool = False) -> Pass:
        """One pass. Gradients flow unless the caller turns them off.

        Raises:
            CombinationError: If attention weights are asked of a model that gives none.
        """
        wanted: dict[str, Any] = {"output_hidden_states": states, "return_dict": True}
        if self.kind == "causal":
            wanted["use_cache"] = False
        if not attentions:
            output = self._called(inputs, wanted)
            return Pass(_answer(output), tuple(output.hidden_states) if states else ())
        with eager_attention(self.model):
            output = self._called(inputs, {**wanted, "output_attentions": True})
        weights = tuple(output.attentions or ())
        if not weights or any(layer is None for layer in weights):
            raise CombinationError(f"{type(self.model).__name__} does not give its attention weights.")
        return Pass(_answer(output), tuple(output.hidden_states) if states else (), weights)

    def losses(self, inputs: Inputs, *, generator: torch.Generator | None = None) -> Tensor:
        """Nats of each predicted token, [B, N - 1]; of a masked model those of 15% of the tokens, the others zero.

        Args:
            generator: Of a masked model, draws which tokens are hidden.

        Raises:
            CombinationError: If the model predicts no tokens.
        """
        if not self.has_loss:
            raise CombinationError(f"{type(self.model).__name__} predicts no tokens, so it has no loss on text.")
        tokens = inputs["input_ids"]
        if self.kind == "causal":
            logits = self.run(inputs).output[:, :-1].float()
            return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        hidden = torch.rand(tokens.shape, generator=generator).to(tokens.device) < 0.15
        hidden &= inputs["attention_mask"].bool()
        masked = {**inputs, "input_ids": tokens.masked_fill(hidden, self.mask_id)}
        logits = self.run(masked).output.float()
        every = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return (every * hidden)[:, 1:]

    @property
    def mask_id(self) -> int:
        """The token that hides another, of a masked model."""
        found = getattr(self.tokenizer, "mask_token_id", None)
        if found is None:
            raise CombinationError(f"the tokenizer of {self.name} has no mask token, which a masked model needs.")
        return int(found)

    def with_model(self, model: nn.Module) -> "Subject":
        """The same around another model."""
        return replace(self, model=model)

    @property
    def _quantized(self) -> list[nn.Module]:
        return [part for part in self.model.modules() if getattr(part, "made_by", None) == "quantize"]

    def _called(self, inputs: Inputs, wanted: Mapping[str, Any]) -> Any:
        _forget_longer_texts(self.model)
        with evaluating(self.model):
            return self.model(**inputs, **wanted)

    def _configured(self, *names: str) -> Any:
        for name in names:
            found = getattr(self.config, name, None)
            if found is not None:
                return found
        raise ArgumentError(f"the config of {self.name} must say {names[0]}; it does not. Add it to config.json.")


def _forget_longer_texts(model: nn.Module) -> None:
    """Give dynamic RoPE of transformers its first angles: those of the longest text it met would stay for shorter ones.

    It takes them back by itself only for texts below the trained length.
    """
    for part in model.modules():
        if getattr(part, "rope_type", None) == "dynamic" and isinstance(first := part.original_inv_freq, Tensor):
            part.get_buffer("inv_freq").copy_(first)
            cast("Any", part).max_seq_len_cached = cast("Any", part).original_max_seq_len


def _answer(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return cast("Tensor", output.last_hidden_state if logits is None else logits)
