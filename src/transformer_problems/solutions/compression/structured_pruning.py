"""Structured pruning: whole heads and neurons leave, so that smaller dense matrices remain."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_share_below_one
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import TransformKind, treated_copy

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Identity, nn.Dropout)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class StructuredPruning:
    """Removes the heads and feed-forward neurons that weigh least, in every layer the same share.

    Attention is any module with linear layers q_proj, k_proj, v_proj and out_proj and the numbers num_heads,
    num_kv_heads and head_dim, as SelfAttention; a feed-forward network any with linear layers up and down, with or
    without a gate beside them, or an nn.Sequential that begins with a linear layer, an activation and a linear layer.
    Heads that share keys and values leave together.

    A head's weight is the norm of what it can add to the output, |W_v| |W_out|, times that of its scores, |W_q| |W_k|;
    a neuron's |W_up| |W_down|, and |W_gate|. What remains computes what the model would with the others' outputs at
    zero, so quality falls until the model is fine-tuned.

    Args:
        heads: Share of the heads (groups of heads, where they share keys and values) to remove.
        neurons: Share of the feed-forward neurons to remove.

    Raises:
        ArgumentError: If a share is not from 0 to below 1, there is nothing to prune, or weights are not finite or
            belong to another layer too; a block that runs in several places, as ShareLayers leaves them, is pruned
            once for all.
        CombinationError: If an op or position encoding is built for the number of heads, or the model was fused,
            rounded or adapted before.

    Source:
        Michel et al. 2019, arXiv:1905.10650, section 4, for heads; Li et al. 2017, arXiv:1608.08710, section 3.1, for
        ranking by norms. Differs from the papers: heads are ranked without data, and layer by layer.

    Example:
        >>> from transformer_problems import Decoder, SelfAttention, StructuredPruning
        >>> model = Decoder(256, 64, num_layers=2, mixer=lambda: SelfAttention(64, num_heads=8))
        >>> pruned = StructuredPruning(heads=0.5, neurons=0.75)(model)
        >>> pruned.body.blocks[0].mixer.num_heads, pruned.body.blocks[0].feed_forward.up.out_features
        (4, 64)
    """

    kind: TransformKind = "prune"

    def __init__(self, *, heads: float = 0.5, neurons: float = 0.5) -> None:
        require_share_below_one(heads=heads, neurons=neurons)
        self.heads, self.neurons = heads, neurons

    def __call__(self, model: nn.Module) -> nn.Module:
        pruned = treated_copy(model, self)
        _check_plain(pruned)
        found, shared = 0, _shared(pruned)
        parts: list[tuple[str, Any]] = list(pruned.named_modules())
        for path, part in parts:
            if _is_attention(part):
                keep = _heaviest(_group_weights(part), self.heads)
                if len(keep) < part.num_kv_heads:
                    _check_free(path, part)
                    _check_unshared([getattr(part, name) for name in _PROJECTIONS], shared, "heads=0")
                    _keep_heads(part, keep)
                    part.made_by = self.kind
            elif (pair := _feed_forward(part)) is not None:
                keep = _heaviest(_neuron_weights(*pair), self.neurons)
                if len(keep) < pair[1].in_features:
                    _check_unshared([*pair[0], pair[1]], shared, "neurons=0")
                    _keep_neurons(*pair, keep)
                    part.made_by = self.kind
            else:
                continue
            found += 1
        if not found:
            raise ArgumentError(
                "model must hold attention with q_proj, k_proj, v_proj and out_proj, or a feed-forward network with up "
                f"and down; this {type(model).__name__} has neither."
            )
        return pruned

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def __repr__(self) -> str:
        return f"StructuredPruning(heads={self.heads:g}, neurons={self.neurons:g})"


def _check_plain(model: nn.Module) -> None:
    """Refuse layers that keep something of the size of their weight beside it."""
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear) and (hasattr(part, "keep") or hasattr(part, "input_scale")):
            raise CombinationError(
                f"layers must be plain to become smaller; {path} is a {type(part).__name__}. Remove heads and neurons "
                "first."
            )


def _is_attention(part: nn.Module) -> bool:
    has_sizes = all(isinstance(getattr(part, name, None), int) for name in ("num_heads", "num_kv_heads", "head_dim"))
    return has_sizes and all(isinstance(getattr(part, name, None), nn.Linear) for name in _PROJECTIONS)


def _check_free(path: str, attention: Any) -> None:
    """Refuse what would not fit fewer heads."""
    for name in ("op", "position"):
        part = getattr(attention, name, None)
        if part is not None and getattr(part, "num_heads", None) is not None:
            raise CombinationError(
                f"{type(part).__name__} of {path} is built for {part.num_heads} heads, of which none can leave. Pass "
                "heads=0."
            )


def _shared(model: nn.Module) -> dict[int, str]:
    """Layers whose weight or bias is used elsewhere, by id: where, in words; a block that runs twice stands once."""
    places = {id(p): ["the model"] for p in model.parameters(recurse=False)}
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children leaves out a child's second name
            for p in () if child is None else child.parameters(recurse=False):
                places.setdefault(id(p), []).append(f"{prefix}.{name}" if prefix else name)
    layers = [(id(part), id(p)) for part in model.modules() for p in part.parameters(recurse=False)]
    return {layer: " and ".join(places[p]) for layer, p in layers if len(places[p]) > 1}


def _check_unshared(layers: Sequence[nn.Linear], shared: Mapping[int, str], remedy: str) -> None:
    """Refuse layers that would lose what they share with others, or take from others what those need."""
    for layer in layers:
        if id(layer) in shared:
            raise ArgumentError(
                f"weights must belong to one layer to become smaller; {shared[id(layer)]} share theirs. Untie them, or "
                f"pass {remedy}."
            )


def _feed_forward(part: nn.Module) -> tuple[tuple[nn.Linear, ...], nn.Linear] | None:
    """The layers into the neurons, two where one is a gate, and the layer out of them."""
    ups: tuple[Any, ...] = (getattr(part, "up", None),)
    down = getattr(part, "down", None)
    if getattr(part, "gate", None) is not None:
        ups = (part.gate, *ups)
    elif isinstance(part, nn.Sequential) and len(part) >= 3 and isinstance(part[1], _ELEMENTWISE):
        ups, down = (part[0],), part[2]
    if not isinstance(down, nn.Linear):
        return None
    if all(isinstance(up, nn.Linear) and up.out_features == down.in_features for up in ups):
        return ups, down
    return None


@torch.no_grad()
def _group_weights(attention: Any) -> Tensor:
    """How much each group of heads can matter, [G]."""
    groups = attention.num_kv_heads
    norms = [getattr(attention, name).weight.float().view(groups, -1).norm(dim=1) for name in _PROJECTIONS[:3]]
    out = attention.out_proj.weight.float()
    norms.append(out.view(out.shape[0], groups, -1).transpose(0, 1).flatten(1).norm(dim=1))
    return torch.stack(norms).log().sum(dim=0)


@torch.no_grad()
def _neuron_weights(ups: tuple[nn.Linear, ...], down: nn.Linear) -> Tensor:
    """How much each neuron can matter, [F]."""
    weights: Tensor = down.weight.float().norm(dim=0)
    for up in ups:
        weights = weights * up.weight.float().norm(dim=1)
    return weights


def _heaviest(weights: Tensor, removed: float) -> Tensor:
    """Indices of those that stay, in their order; one at least."""
    num = max(1, len(weights) - int(removed * len(weights)))
    return weights.topk(num).indices.sort().values


def _keep_heads(attention: Any, groups: Tensor) -> None:
    per_group = attention.num_heads // attention.num_kv_heads * attention.head_dim  # query channels
    queries = _channels(groups, per_group)
    keys = _channels(groups, attention.head_dim)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        _keep_outputs(getattr(attention, name), rows)
    _keep_inputs(attention.out_proj, queries)
    attention.num_heads = len(queries) // attention.head_dim
    attention.num_kv_heads = len(groups)


def _keep_neurons(ups: tuple[nn.Linear, ...], down: nn.Linear, neurons: Tensor) -> None:
    for up in ups:
        _keep_outputs(up, neurons)
    _keep_inputs(down, neurons)


def _channels(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def _keep_outputs(layer: nn.Linear, rows: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[rows].clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows].clone(), requires_grad=layer.bias.requires_grad)
    layer.out_features = len(rows)


def _keep_inputs(layer: nn.Linear, columns: Tensor) -> None:
    weight = layer.weight.detach()[:, columns].contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.in_features = len(columns)
