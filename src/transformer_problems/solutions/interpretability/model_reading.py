"""What is done to a model while it is read, and undone afterwards; where its logits are read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.inputs import check_tokens, shown


def check_in_vocabulary(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what are no tokens [B, N] of a vocabulary, one at least.

    Raises:
        ArgumentError: With the remedy.
    """
    check_tokens(tokens, name)
    if tokens.numel() == 0:
        raise ArgumentError(f"{name} must hold a token at least; got {list(tokens.shape)}. Leave empty inputs out.")
    if tokens.is_meta:
        raise ArgumentError(f"{name} must hold numbers; got {shown(tokens)} on meta, which holds none. Make them anew.")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise ArgumentError(
            f"{name} must be from 0 to {vocab_size - 1}; got {lowest if lowest < 0 else highest}. Use the "
            "tokenizer that belongs to the model."
        )


@contextmanager
def embedding_gives(embedding: nn.Module, tokens: Tensor, values: Tensor | None) -> Iterator[None]:
    """Inside, the embedding layer gives these values [B, N, C] for the tokens [B, N]; None leaves it alone.

    Raises:
        CombinationError: If the model does not call it exactly once, or with other tokens.
    """
    if values is None:
        yield
        return
    num_calls = 0

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if not torch.equal(inputs[0], tokens):
            raise CombinationError(
                f"a model must embed its tokens as they are to be explained by gradients; this one embeds "
                f"{list(inputs[0].shape)} in place of {list(tokens.shape)}, turned, padded or changed. Write its own "
                "Readable."
            )
        return values

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if num_calls != 1:
        raise CombinationError(
            f"a model must embed its tokens once to be explained by gradients; this one did {num_calls} times. Write "
            "its own Readable."
        )


def embedded(embedding: nn.Module, tokens: Tensor) -> Tensor:
    """What an embedding layer gives, without gradient history, [B, N, C]."""
    with torch.no_grad():
        x: Tensor = embedding(tokens)
    return x


def check_gradients(tokens: Tensor) -> None:
    """Refuse to take gradients where none are kept.

    Raises:
        CombinationError: Inside torch.inference_mode(), or of tokens made there.
    """
    if torch.is_inference_mode_enabled() or tokens.is_inference():
        raise CombinationError(
            "gradients cannot be taken of what belongs to torch.inference_mode(). Use torch.no_grad() instead."
        )


def slope_of(value: Tensor, inputs: Tensor) -> Tensor | None:
    """The gradient of a number with respect to inputs; None where it does not depend on them."""
    return torch.autograd.grad(value, inputs, allow_unused=True)[0] if value.requires_grad else None


def read_row(logits: Tensor, read_at: int, key_mask: Tensor | None) -> Tensor:
    """The logits at one position of each sequence, [B, N, K] -> [B, K]."""
    return logits[torch.arange(len(logits), device=logits.device), _positions(logits, read_at, key_mask)]


def reading_of(tokens: Tensor, read_at: int, key_mask: Tensor | None) -> Tensor:
    """All of the reading at one position of each sequence, [B, N]."""
    return nn.functional.one_hot(_positions(tokens, read_at, key_mask), tokens.shape[1]).to(torch.get_default_dtype())


def _positions(x: Tensor, read_at: int, key_mask: Tensor | None) -> Tensor:
    """[B]; the last real token's where read_at is -1."""
    num_sequences, num_tokens = x.shape[:2]
    if read_at >= num_tokens:
        raise ArgumentError(
            f"read_at must be a position of the {num_tokens} tokens; got {read_at}. Choose at most {num_tokens - 1}."
        )
    if read_at >= 0 or key_mask is None:
        return torch.full((num_sequences,), read_at % num_tokens, device=x.device)
    places = torch.arange(num_tokens, device=x.device)
    return (places * key_mask).amax(dim=1)
