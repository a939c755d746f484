"""Steps that every attention layer takes around its op: into heads and back, and what positions add."""

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_floating, shown
from transformer_problems.core.slots import PositionBias, PositionEncoding


def split_heads(y: Tensor, num_heads: int) -> Tensor:
    """[..., N, H * D] -> [..., H, N, D]."""
    return y.reshape(*y.shape[:-1], num_heads, y.shape[-1] // num_heads).transpose(-3, -2)


def merge_heads(y: Tensor) -> Tensor:
    """[..., H, N, D] -> [..., N, H * D]."""
    return y.transpose(-3, -2).flatten(-2)


def check_key_mask(key_mask: Tensor | None, x: Tensor) -> None:
    """Refuse what is no key mask for x [B, N, ...].

    Raises:
        ArgumentError: Unless it is None, or bool [B, N] on x's device.
    """
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]:
        raise ArgumentError(
            f"key_mask must be bool {list(x.shape[:2])}, True for real tokens; got {shown(key_mask)}. "
            "Compare with the padding token: key_mask = tokens != padding."
        )
    if key_mask.device != x.device:
        raise ArgumentError(f"key_mask must be on {x.device}, as its tokens; got {key_mask.device}. Move one of them.")


def check_input(x: Tensor, key_mask: Tensor | None = None, *, embed_dim: int) -> None:
    """Refuse what is no batch of sequences of hidden states, or no key mask of them.

    Raises:
        ArgumentError: Unless x is floating point [B, N, embed_dim], and the mask None or bool [B, N].
    """
    check_floating("x", x)
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ArgumentError(f"x must be [B, N, {embed_dim}]; got {list(x.shape)}. Give one sequence as x[None].")
    check_key_mask(key_mask, x)


def mask_of_keys(key_mask: Tensor | None) -> Tensor | None:
    """A key mask [B, N] as a mask of scores, [B, 1, 1, N]."""
    return None if key_mask is None else key_mask[:, None, None, :]


def rotate(
    position: PositionEncoding | None, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, or as they are where nothing encodes positions."""
    return (q, k) if position is None else position.rotate(q, k, q_positions, k_positions)


def bias_of(
    position: PositionEncoding | None, q: Tensor, q_positions: Tensor, k_positions: Tensor
) -> PositionBias | None:
    """What the encoding adds to the scores, to be asked for by the op; None where it adds nothing."""
    if position is None or not position.biases:
        return None
    return PositionBias(position, q, q_positions, k_positions)
