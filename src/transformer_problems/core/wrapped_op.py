"""Attention ops around an attention op: what they say of themselves is what the op inside says."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.fit import check_built_for
from transformer_problems.core.slots import AttentionOp, StreamingOp


class WrappedOp(nn.Module):
    """An op that changes what goes into another one or what comes out. Abstract: define `forward` and `stream`.

    It takes over every optional attribute of `AttentionOp`, and streams itself where the op inside does.

    Args:
        op: The op inside.
        num_heads: H, for a wrapper with something of its own for each head. Default what the op inside is built for.

    Raises:
        ArgumentError: If num_heads is not positive.
        CombinationError: If the op is a class, or built for another number of heads.
    """

    def __init__(self, op: AttentionOp, *, num_heads: int | None = None) -> None:
        super().__init__()
        check_built_for(op)
        if num_heads is not None:
            require_positive_int(num_heads=num_heads)
            check_built_for(op, num_heads=num_heads)
        self.op = op
        self.num_heads: int | None = getattr(op, "num_heads", None) if num_heads is None else num_heads
        self.head_dim: int | None = getattr(op, "head_dim", None)
        self.accepts_bias: bool = getattr(op, "accepts_bias", True)
        self.accepts_causal: bool = getattr(op, "accepts_causal", True)
        self.ignores_norms: bool = getattr(op, "ignores_norms", False)
        self.lookback: int | None = getattr(op, "lookback", None)
        self.num_sinks: int = getattr(op, "num_sinks", 0)

    @property
    def initial_state(self) -> Callable[[int], Any]:
        """That of the op inside. Absent where that has none, which is how `streams_itself` tells."""
        return self._streaming_op.initial_state

    @property
    def _streaming_op(self) -> StreamingOp:
        return cast("StreamingOp", self.op)
