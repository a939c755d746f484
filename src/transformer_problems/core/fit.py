"""Whether the parts of a layer or a model go together, asked once, when it is built."""

from collections.abc import Iterable, Sequence
from inspect import signature

from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.inputs import shown
from transformer_problems.core.slots import AttentionOp, Cache, PositionEncoding


def check_attention_fit(
    op: AttentionOp, position: PositionEncoding | None, *, num_heads: int, head_dim: int, is_causal: bool
) -> None:
    """Refuse an attention op and a position encoding that cannot work together, or not in heads of these sizes.

    Raises:
        CombinationError: With the remedy.
    """
    for part in (op, position):
        check_built_for(part, num_heads=num_heads, head_dim=head_dim)
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
    if not position.keeps_norms and getattr(op, "ignores_norms", False):
        raise CombinationError(
            f"{position_name} changes the norms of queries and keys, which {op_name} ignores. Use RotaryEmbedding or "
            "ALiBi, or an encoding that is added to the embeddings."
        )


def check_built_for(part: object, **sizes: int) -> None:
    """Refuse a part that is a class in place of an instance, or that is built for other sizes than these.

    A part says what it is built for in attributes of these names; None, or no such attribute, means any size.

    Raises:
        CombinationError: With the remedy.
    """
    if isinstance(part, type):
        raise CombinationError(f"{part.__name__} is a class, not an instance. Pass {part.__name__}(...).")
    for name, size in sizes.items():
        own = getattr(part, name, None)
        if own is not None and own != size:
            part_name = type(part).__name__
            raise CombinationError(
                f"{part_name} is built for {name}={own}, but its place here has {name}={size}. "
                f"Build {part_name} for {name}={size}."
            )


def check_mixer_fit(mixer: object, *, embed_dim: int) -> None:
    """Refuse what is no token mixer of this width, such as the function that would make one.

    Raises:
        CombinationError: If it is a class, or built for another width.
        ArgumentError: If it is anything else, with the remedy.
    """
    check_built_for(mixer, embed_dim=embed_dim)
    if not callable(mixer) or not hasattr(mixer, "is_causal"):
        raise ArgumentError(
            f"mixer must be a token mixer, which says is_causal; got {shown(mixer)}. Pass e.g. "
            f"SelfAttention({embed_dim}, num_heads=...), or of a function what it makes."
        )


def check_makes_layers(name: str, makes: object, part: str) -> None:
    """Refuse what is no function without arguments that makes a part of each layer.

    Args:
        name: The parameter's.
        part: What it makes, e.g. "a layer's mixer".

    Raises:
        ArgumentError: With the remedy.
    """
    if isinstance(makes, nn.Module):
        made = type(makes).__name__
        raise ArgumentError(
            f"{name} must be a function that makes {part}; got the {made} itself, which all layers would share. "
            f"Pass {name}=lambda: {made}(...)."
        )
    if not callable(makes):
        raise ArgumentError(
            f"{name} must be a function that makes {part}; got {shown(makes)}. Pass {name}=lambda: ..., which is "
            "called once a layer."
        )
    try:
        signature(makes).bind()
    except TypeError as error:
        own = getattr(makes, "__name__", type(makes).__name__)
        made = "function" if own == "<lambda>" else own
        raise ArgumentError(
            f"{name} must be callable without arguments; {made} is not: {error}. Pass {name}=lambda: {made}(...)."
        ) from error


_EMBEDDINGS = {2: "PatchEmbedding(64, patch_size=4)", 3: "TubeletEmbedding(64, patch_size=4, tubelet_len=2)"}


def check_embedding_fit(name: str, embedding: object, sizes: Sequence[int]) -> None:
    """Refuse what does not make tokens on a grid of inputs with that many sizes: two of images, three of clips.

    Args:
        name: The parameter's.

    Raises:
        CombinationError: If it is a class, or makes them of inputs with other axes.
        ArgumentError: If it makes no tokens on a grid at all, or says no positive width.
    """
    check_built_for(embedding)
    remedy = f"Pass e.g. {_EMBEDDINGS.get(len(sizes), 'an embedding of such inputs')}."
    grid = getattr(embedding, "grid", None)
    if not callable(embedding) or not callable(grid) or not hasattr(embedding, "embed_dim"):
        raise ArgumentError(
            f"{name} must be what makes tokens and says `embed_dim` and `grid`; got {shown(embedding)}. {remedy}"
        )
    require_positive_int(embed_dim=embedding.embed_dim)
    try:
        signature(grid).bind(*sizes)
    except TypeError as error:
        raise CombinationError(
            f"{name} must make tokens on a grid of {len(sizes)} axes; {type(embedding).__name__} does not. {remedy}"
        ) from error


def check_dtype_fit(weight: Tensor, parts: Iterable[object]) -> None:
    """Refuse parts none of whose floating-point parameters has the dtype of the model that they are built into.

    Raises:
        CombinationError: With the remedy.
    """
    for part in parts:
        own = {p.dtype for p in part.parameters() if p.is_floating_point()} if isinstance(part, nn.Module) else None
        if own and weight.dtype not in own:
            name, dtypes = type(part).__name__, ", ".join(sorted(map(str, own)))
            raise CombinationError(
                f"{name} has weights of {dtypes}, but the model is built in {weight.dtype}. Build {name} with "
                f"dtype={weight.dtype}, or pass dtype to the model, which converts all of its parts."
            )


def check_skips_fit(skips: object, **sizes: int) -> None:
    """Refuse what are no long skips, or built for other sizes; None is none.

    Raises:
        CombinationError: If it is a class, or built for other sizes.
        ArgumentError: If it is anything else that cannot be called.
    """
    check_built_for(skips, **sizes)
    if skips is not None and not callable(skips):
        raise ArgumentError(
            f"skips must say what a layer reads of earlier ones; got {shown(skips)}. Use None for none."
        )


def check_cache_fit(op: AttentionOp, cache: Cache) -> None:
    """Refuse a cache that forgets keys which the op can still see.

    Raises:
        CombinationError: With the remedy.
    """
    kept, kept_sinks = getattr(cache, "lookback", None), getattr(cache, "num_sinks", 0)
    seen, seen_sinks = getattr(op, "lookback", None), getattr(op, "num_sinks", 0)
    if kept is None or (seen is not None and kept >= seen and kept_sinks >= seen_sinks):
        return
    op_name, cache_name = type(op).__name__, type(cache).__name__
    sees = "every key" if seen is None else f"{seen} keys before a query's own and the first {seen_sinks}"
    raise CombinationError(
        f"{op_name} can see {sees}; the {cache_name} keeps {kept} and the first {kept_sinks}. "
        f"Make it with lookback={seen}{f' and num_sinks={seen_sinks}' if seen_sinks else ''}."
    )


def check_start(batch_size: int, position: PositionEncoding | None = None, *, is_causal: bool = True) -> None:
    """Refuse to start a stream of such a number of sequences, or in a layer that cannot stream.

    Raises:
        ArgumentError: If the number is none, or a token sees the future.
        CombinationError: If the encoding cannot be streamed.
    """
    require_not_negative(batch_size=batch_size)
    if not is_causal:
        raise ArgumentError("is_causal must be True to stream: a token that sees the future cannot be final.")
    check_streams(position)


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


def check_same_batch(chunk: Tensor, batch_size: int) -> None:
    """Refuse a chunk [B, ...] of other sequences than its state has followed.

    Raises:
        ArgumentError: If the numbers of sequences differ.
    """
    if len(chunk) != batch_size:
        raise ArgumentError(
            f"a chunk must have the batch size of its state, {batch_size}; got {len(chunk)}. "
            f"Start with initial_state({len(chunk)})."
        )
