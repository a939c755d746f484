"""What an explainer needs of a model, and the models that give it."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.interpretability.model_reading import check_in_vocabulary
from transformer_problems.solutions.interpretability.stack_reader import StackReader, is_stack
from transformer_problems.solutions.interpretability.transformers_reader import TransformersReader, is_pretrained


@runtime_checkable
class Readable(Protocol):
    """A classifier or language model as an explainer sees it: one row of logits for each sequence.

    Every method answers as the model does in evaluation, and leaves it as it was.

    Shape:
        tokens: [B, N] int; key_mask: [B, N] bool, True for real tokens; embeddings: [B, N, C].
    """

    @property
    def vocab_size(self) -> int:
        """V: tokens are whole numbers from 0 to V - 1."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """What the embedding layer gives, before positions are added, [B, N, C]; without gradient history."""
        ...

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Logits [B, K]; embeddings, where they are given, stand in for those of the tokens and pass gradients."""
        ...

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        """Attention weights of each layer from the first on, [B, H, N, N], without gradient history."""
        ...

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Which positions of the last layer the logits are read at: shares [B, N] that sum to one."""
        ...


def readable(model: nn.Module | Readable, *, read_at: int | None = None) -> Readable:
    """The model as explainers read it.

    This package's token models (`Encoder`, `Decoder`, `LlamaDecoder`) and those of transformers with a head for
    sequence classification, causal or masked language modelling; anything that is `Readable` stays as it is.

    Args:
        read_at: Of a model that gives logits for each token, whose are explained: -1 for the last real token of each
            sequence, or a position from 0, such as that of a class or mask token. Default -1. A model that gives one
            row a sequence chooses itself.

    Raises:
        ArgumentError: If the model cannot be read, or `read_at` is no position or not for this model.

    Example:
        >>> import torch
        >>> from transformer_problems import Encoder, GradientXInput, SelfAttention, readable
        >>> model = Encoder(100, 32, 2, lambda: SelfAttention(32, 4, is_causal=False), num_outputs=3)
        >>> tokens = torch.tensor([[7, 42, 3, 9]])
        >>> GradientXInput().explain(readable(model, read_at=0), tokens).scores.shape
        torch.Size([1, 4])
    """
    if read_at is not None and (isinstance(read_at, bool) or not isinstance(read_at, int) or read_at < -1):
        raise ArgumentError(
            f"read_at must be a position from 0, or -1 for the last real token; got {read_at!r}. Leave it out for -1."
        )
    if isinstance(model, Readable):
        if read_at is not None:
            raise ArgumentError(
                f"read_at must be left out for a model that chooses itself; got {read_at}. Leave it out."
            )
        return model
    if isinstance(model, nn.Module) and is_stack(model):
        return StackReader(model, -1 if read_at is None else read_at)
    if isinstance(model, nn.Module) and is_pretrained(model):
        return TransformersReader(model, read_at)
    raise ArgumentError(
        f"model must be an Encoder, Decoder or LlamaDecoder, a transformers model with a head for sequence "
        f"classification, causal or masked language modelling, or have the methods of Readable; got "
        f"{type(model).__name__}. Wrap it in a class with these methods."
    )


def check_model_input(name: str, inputs: Tensor, model: object) -> None:
    """Refuse inputs that a model which `readable` can read has no embeddings for; others are known to the model alone.

    Raises:
        ArgumentError: If they are no tokens [B, N] of its vocabulary, one at least.
    """
    if isinstance(model, nn.Module) and (is_stack(model) or is_pretrained(model)):
        check_in_vocabulary(name, inputs, readable(model).vocab_size)
