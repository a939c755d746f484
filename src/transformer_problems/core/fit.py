"""Whether the parts of an attention layer go together, asked once, when it is built."""

from transformer_problems.core.errors import CombinationError
from transformer_problems.core.slots import AttentionOp, PositionEncoding


def check_attention_fit(op: AttentionOp, position: PositionEncoding | None, *, is_causal: bool) -> None:
    """Refuse an attention op and a position encoding that cannot work together.

    Raises:
        CombinationError: With the remedy.
    """
    op_name = type(op).__name__
    if is_causal and not getattr(op, "accepts_causal", True):
        raise CombinationError(
            f"{op_name} cannot be causal: it mixes whole sequences. Pass is_causal=False and use it in an encoder."
        )
    if position is None:
        return
    position_name = type(position).__name__
    if not position.attends:
        raise CombinationError(
            f"{position_name} adds to the embeddings, not inside attention. Pass it to the model instead: "
            f"Decoder(..., position={position_name}(...))."
        )
    if position.biases and not getattr(op, "accepts_bias", True):
        raise CombinationError(
            f"{position_name} adds a bias to the scores, which {op_name} never forms. Use RotaryEmbedding, or an "
            "encoding that is added to the embeddings."
        )


def check_streams(position: PositionEncoding | None) -> None:
    """Refuse to stream with an encoding that depends on the final length.

    Raises:
        CombinationError: With the remedy.
    """
    if position is not None and not position.streams:
        raise CombinationError(
            f"{type(position).__name__} depends on the final length, so its past cannot be cached. "
            "Call forward on the whole sequence, or choose an encoding with fixed scaling."
        )
