"""What becomes of an input's tokens layer by layer: how far they are from all alike, and which heads matter."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention


def rank_one_distance(x: Tensor) -> Tensor:
    """|X - 1 m^T| / |X| with m the mean token, in the Frobenius norm: 0 where all tokens are one.

    Shape:
        x: [B, N, C]; output: [B].

    Source:
        Dong et al. 2021, arXiv:2103.03404, section 2.1. Differs from the paper: the Frobenius norm, for which the
        nearest matrix of equal rows is the mean's, in place of the geometric mean of the 1- and infinity-norm.
    """
    spread = x - x.mean(dim=1, keepdim=True)
    distance: Tensor = spread.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    return distance


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine between two different tokens of an input. x: [B, N, C], N >= 2; output: [B]."""
    directions = nn.functional.normalize(x, dim=-1)
    num_tokens = x.shape[1]
    total = directions.sum(dim=1).square().sum(dim=-1)  # of all pairs, each token with itself among them
    cosine: Tensor = (total - num_tokens) / (num_tokens * (num_tokens - 1))
    return cosine


@torch.no_grad()
def states_by_depth(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The embeddings and each layer's output, before the final norm, [B, N, C] each."""
    states: list[Tensor] = []
    with ExitStack() as hooks:
        first = model.blocks[0]
        hooks.enter_context(first.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])))
        for block in model.blocks:
            hooks.enter_context(block.register_forward_hook(lambda module, inputs, output: states.append(output)))
        model(images)
    return states


def head_importance(loss: Tensor, gates: list[Tensor]) -> Tensor:
    """How much the loss hangs on each head, |d loss / d gate| with a gate of one on each head's output, [L, H].

    Source:
        Michel et al. 2019, arXiv:1905.10650, section 2.3.
    """
    return torch.stack([gradient.abs() for gradient in torch.autograd.grad(loss, gates)])


def gated_heads(model: nn.Module, hooks: ExitStack) -> list[Tensor]:
    """Puts a gate of one on the output of every head while `hooks` is open; the gates of each layer, [H]."""
    gates = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            weight = module.out_proj.weight
            gate = torch.ones(module.num_heads, device=weight.device, dtype=weight.dtype, requires_grad=True)
            gates.append(gate)

            def scale(op: nn.Module, inputs: Any, heads: Tensor, gate: Tensor = gate) -> Tensor:
                return heads * gate[:, None, None]  # [B, H, N, D]

            hooks.enter_context(cast("nn.Module", module.op).register_forward_hook(scale))
    return gates
