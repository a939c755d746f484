"""Queries that are changed before an op sees them, for ops that control how sharp attention is."""

from collections.abc import Callable

from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias


def change_queries(
    change: Callable[[Tensor], Tensor], q: Tensor, bias: PositionBias | None
) -> tuple[Tensor, PositionBias | None]:
    """The queries changed, also where a bias reads them; a bias that does not read them stays as it is.

    Shape:
        q: [..., H, N, D], as after rotation; those of the bias are as before it.
    """
    if bias is not None:
        bias = PositionBias(bias.encoding, change(bias.q), bias.q_positions, bias.k_positions)
    return change(q), bias


def check_num_heads(q: Tensor, num_heads: int | None) -> None:
    """Refuse queries of another number of heads than an op is built for, which might broadcast without a word.

    Raises:
        ArgumentError: If H differs.
    """
    if q.shape[-3] != num_heads:
        raise ArgumentError(
            f"num_heads must equal the number of query heads; got {num_heads} and {q.shape[-3]}. "
            f"Build the op with num_heads={q.shape[-3]}."
        )
