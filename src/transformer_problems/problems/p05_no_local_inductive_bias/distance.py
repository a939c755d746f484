"""How far across an image attention looks."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention


@torch.no_grad()
def attention_distances(model: VisionTransformer, images: Tensor) -> list[float]:
    """Mean distance between a patch and the patches that it attends to, layer by layer, in shares of the image's side.

    Each distance counts with its attention weight; means are over heads, patches and images. Class tokens have no
    place and are left out, and the weights of the others are put to one. Weights are those of queries and keys alone,
    so for attention without biases.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and figure 11.
        Differs from the paper: means are over all heads and in shares, where it shows each head's in pixels.
    """
    apart = _distances(model, images)
    found: list[float] = []

    def look(op: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        q, k = (part[..., model.num_class_tokens :, :] for part in inputs[:2])
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        found.append(float((weights * apart).sum(dim=-1).mean()))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, SelfAttention):
                op = cast("nn.Module", module.op)
                hooks.enter_context(op.register_forward_pre_hook(look, with_kwargs=True))
        model(images)
    return found


def blind_distance(model: VisionTransformer, images: Tensor) -> float:
    """What `attention_distances` gives for attention that looks at every patch alike."""
    return float(_distances(model, images).mean())


def _distances(model: VisionTransformer, images: Tensor) -> Tensor:
    """Between the places of all patches, [N, N], in shares of the image's side."""
    rows, columns = model.patches.grid(*images.shape[-2:])
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).to(images.device)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")  # products would round zeros
