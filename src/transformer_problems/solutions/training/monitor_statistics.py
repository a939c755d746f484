"""What a training monitor measures of a layer: norms, its attention, and how alike its tokens have become."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.heads import split_heads
from transformer_problems.core.slots import PositionBias

_MAX_EXAMPLES, _MAX_QUERIES = 2, 64  # of one attention call, spread over the sequence: bounds what a sample costs
_HIDDEN = -1e4  # a finite number added to a score to hide a key; the exponential of what is left of it is zero


@dataclass(frozen=True, slots=True)
class AttentionStatistics:
    """What one call of attention looks like.

    Args:
        largest_logit: Largest |q k^T| * scale over the keys that a query may see, without any position bias.
        entropy: Mean entropy of the weights in nats, over queries that may see two keys or more; None without any.
        entropy_share: Mean of each entropy's share of its maximum, log of the number of keys that the query may see.
    """

    largest_logit: float
    entropy: float | None
    entropy_share: float | None


AttentionReader = Callable[..., AttentionStatistics | None]
"""Takes the arguments of a call of attention; None if no query may see any key."""


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all the numbers in them, summed in float32 or wider."""
    norms = (torch.linalg.vector_norm(x.detach(), dtype=_wide_dtype(x)) for x in tensors)
    return math.hypot(*(float(norm) for norm in norms))


def holds_tokens(layer: nn.Module, output: object) -> bool:
    """Whether a layer's output is evidently one of tokens, and not of examples [B, C] or of channels [B, C, N].

    So it is where the layer holds attention, and where it is [B, N, C] and a matrix among the layer's parameters has
    rows of C numbers. The weights of convolutions are no matrices.
    """
    if any(isinstance(module, nn.MultiheadAttention) for module in layer.modules()) or any(attention_readers(layer)):
        return True
    hidden = _hidden(output)
    if hidden is None or hidden.dim() != 3:
        return False
    return any(parameter.dim() == 2 and parameter.shape[1] == hidden.shape[-1] for parameter in layer.parameters())


@torch.no_grad()
def token_similarity(output: object, *, batch_first: bool = True) -> float | None:
    """Mean cosine between different tokens of the first example; None if the output holds no two tokens.

    Shape:
        output: [B, N, C], [N, B, C] unless `batch_first`, or [N, C]; or a tuple that starts with such a tensor.
    """
    hidden = _hidden(output)
    if hidden is None or hidden.dim() not in (2, 3) or not hidden.is_floating_point():
        return None
    if hidden.dim() == 3:
        hidden = hidden[:1].squeeze(0) if batch_first else hidden[:, :1].squeeze(1)
    num_tokens = hidden.shape[0]
    if num_tokens < 2 or hidden.dim() != 2:
        return None
    directions = nn.functional.normalize(hidden.to(_wide_dtype(hidden)), dim=-1)
    # the squared norm of the sum holds every pair twice, and each token once with itself
    pairs = directions.sum(dim=0).square().sum() - directions.square().sum()
    return float(pairs) / (num_tokens * (num_tokens - 1))


def _hidden(output: object) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def attention_readers(layer: nn.Module) -> Iterator[tuple[nn.Module, AttentionReader]]:
    """The modules inside a layer whose calls are attention, each with what reads their arguments.

    They are the `op` of any module where it takes (q, k, v, *, bias, mask, is_causal), the innermost of nested ones,
    and nn.MultiheadAttention, except where it adds keys of its own.
    """
    for module in layer.modules():
        op = getattr(module, "op", None)
        if isinstance(module, nn.MultiheadAttention):
            if module.bias_k is None and not module.add_zero_attn:
                yield module, partial(multihead_statistics, module)
        elif isinstance(op, nn.Module) and not hasattr(op, "op") and _takes_heads(op):
            yield op, op_statistics


@torch.no_grad()
def op_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: PositionBias | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> AttentionStatistics | None:
    """Statistics of softmax attention with the arguments of an attention op, whatever the op makes of them.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: broadcastable to [..., H, N, M].
    """
    num_dims, rows = q.dim(), _spread(q.shape[-2])

    def few(x: Tensor, missing_dims: int = 0) -> Tensor:
        """The first examples, where x has the leading dimension of q."""
        return x[:_MAX_EXAMPLES] if num_dims > 3 and x.dim() == num_dims - missing_dims else x

    added = None
    if bias is not None:
        positions = few(bias.q_positions, 2), few(bias.k_positions, 2)
        added = PositionBias(bias.encoding, few(bias.q), *positions).tile(rows, slice(None))
    with torch.autocast(q.device.type, enabled=False):  # which would round the scores
        scores = _scores(few(q)[..., rows, :], few(k))
        allowed = None if mask is None else _rows_of(few(mask), rows)
        if is_causal:
            row = torch.arange(q.shape[-2], device=q.device)[rows, None]
            causal = torch.arange(k.shape[-2], device=q.device) <= row + k.shape[-2] - q.shape[-2]
            allowed = causal if allowed is None else allowed & causal
        return _summarized(scores, added, allowed)


@torch.no_grad()
def multihead_statistics(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> AttentionStatistics | None:
    """Statistics of nn.MultiheadAttention with the arguments of its call, all of which it takes.

    Shape:
        query: [B, N, C], [N, B, C] unless `module.batch_first`, or [N, C]; key: the same with M and kdim;
        key_padding_mask: [B, M] or [M]; attn_mask: [N, M] or [B * H, N, M], PyTorch's way: True may not attend.
    """
    if query.dim() == 2:
        query, key = query[None], key[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    rows = _spread(query.shape[1])
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores
        (q_weight, q_bias), (k_weight, k_bias) = _projections(module)
        q = split_heads(_linear(query[:_MAX_EXAMPLES, rows], q_weight, q_bias), module.num_heads)
        k = split_heads(_linear(key[:_MAX_EXAMPLES], k_weight, k_bias), module.num_heads)
        scores, added, allowed = _scores(q, k), torch.zeros((), device=q.device), None
        masks = []
        if attn_mask is not None:
            by_head = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, module.num_heads))
            masks.append(_rows_of(by_head if by_head.dim() == 2 else by_head[:_MAX_EXAMPLES], rows))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:_MAX_EXAMPLES, None, None, :])
        for mask in masks:
            visible = ~mask if mask.dtype == torch.bool else mask > _HIDDEN
            allowed = visible if allowed is None else allowed & visible
            added = added if mask.dtype == torch.bool else added + mask
        return _summarized(scores, added, allowed)


def _projections(module: nn.MultiheadAttention) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Weight and bias of the queries, then of the keys."""
    packed: Tensor | None = module.in_proj_weight  # None where keys or values are of another width
    weights = (module.q_proj_weight, module.k_proj_weight) if packed is None else packed.chunk(3)[:2]
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    return (weights[0], biases[0]), (weights[1], biases[1])


def _summarized(scores: Tensor, added: Tensor | None, allowed: Tensor | None) -> AttentionStatistics | None:
    """scores, and what else enters the softmax: broadcastable to [..., H, n, M]."""
    visible = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
    if not bool(visible.any()):
        return None
    largest = float(scores.abs().masked_fill(~visible, 0.0).max())
    num_keys = visible.sum(dim=-1)
    chooses = num_keys > 1  # a query that sees one key has no entropy to lose
    if not bool(chooses.any()):
        return AttentionStatistics(largest, None, None)
    logits = scores if added is None else scores + added
    weights = logits.masked_fill(~visible, float("-inf"))[chooses].softmax(dim=-1)
    entropies = torch.special.entr(weights).sum(dim=-1)
    shares = entropies / num_keys[chooses].to(entropies.dtype).log()
    return AttentionStatistics(largest, float(entropies.mean()), float(shares.mean()))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[..., H, n, D] and [..., G, M, D] -> [..., H, n, M], in float32 or wider."""
    dtype = _wide_dtype(q)
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores: Tensor = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
    return scores


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 or wider: under autocast, inputs and weights may be of different dtypes."""
    dtype = _wide_dtype(x)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _spread(num_queries: int) -> slice:
    """At most so many queries as a sample takes, evenly spread, the last one among them."""
    step = max(1, math.ceil(num_queries / _MAX_QUERIES))
    return slice((num_queries - 1) % step, num_queries, step)


def _rows_of(mask: Tensor, rows: slice) -> Tensor:
    """[..., N or 1, M] -> [..., n or 1, M]."""
    return mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]


def _takes_heads(op: nn.Module) -> bool:
    return list(inspect.signature(op.forward).parameters)[:3] == ["q", "k", "v"]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
