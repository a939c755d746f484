"""Steps that every attention layer takes around its op: into heads and back, and what positions add."""

from torch import Tensor

from transformer_problems.core.slots import PositionBias, PositionEncoding


def split_heads(y: Tensor, num_heads: int) -> Tensor:
    """[..., N, H * D] -> [..., H, N, D]."""
    return y.reshape(*y.shape[:-1], num_heads, y.shape[-1] // num_heads).transpose(-3, -2)


def merge_heads(y: Tensor) -> Tensor:
    """[..., H, N, D] -> [..., N, H * D]."""
    return y.transpose(-3, -2).flatten(-2)


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
