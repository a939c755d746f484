"""How near do the model's heads look?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, NotApplicable, Remedy

_NUM_EXAMPLES, _LENGTH = 4, 128
_LOCAL = 4  # one in four heads: the most local ones are read, since it is enough that some look nearby
_KERNEL = 31  # tokens that Conformer's convolution spans
_STEM = 3  # pixels that a convolutional stem's filters span


class LocalityCheckup:
    """Mean distance that attention looks across, head by head, beside that of attention which looks everywhere alike.

    Distances are in tokens, or patches between the centres of patches, weighted by attention. What has no place is
    left out and the rest put to one: class tokens, and of text the first token, on which heads with nothing to look
    at rest. The most local quarter of all heads is read.

    Source:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5; Raghu et al. 2021, arXiv:2108.08810, section 4: what is
        trained on too little data lacks local heads.
    """

    problem = 5
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination | NotApplicable:
        subject = visit.subject
        side = getattr(subject.config, "window_size", None)
        if subject.kind == "image" and side is not None:
            return NotApplicable(
                f"its attention looks inside windows of {side} x {side} patches, so it is local by build"
            )
        inputs = visit.inputs(_NUM_EXAMPLES, _LENGTH)
        weights = subject.run(inputs, attentions=True).attentions
        apart = _distances(subject, inputs, weights[0].shape[-1])
        looked = torch.stack([_looked(layer, apart, subject.kind == "causal") for layer in weights])  # [L, B, H]
        blind = float(_looked(torch.ones_like(weights[0][:1, :1]), apart, subject.kind == "causal"))
        by_head = looked.transpose(1, 2).flatten(0, 1)  # [L * H, B]
        local = by_head[by_head.mean(dim=1).argsort()[: max(1, len(by_head) // _LOCAL)]].mean(dim=0)
        unit = "patches" if subject.kind == "image" else "tokens"
        share = estimate(local / blind)
        by_layer = looked.mean(dim=(1, 2)).tolist()
        meaning = (
            f"its most local heads look {float(local.mean()):.1f} {unit} away; blind ones would look {blind:.1f} away"
        )
        return Examination(
            {"local_distance_share": share},
            meaning,
            _remedies(subject, float(local.mean()), inputs),
            _curve(by_layer, blind, unit),
            {f"local_distance_{unit}": float(local.mean()), f"blind_distance_{unit}": blind},
        )


def _distances(subject: Subject, inputs: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """Between all that has a place, [N, N]."""
    if subject.kind != "image":
        places = torch.arange(num_tokens - 1.0)
        return (places[:, None] - places).abs()
    rows, columns = _grid(subject, inputs)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def _grid(subject: Subject, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    size = subject.config.patch_size
    size = int(size if isinstance(size, int) else size[0])
    height, width = inputs["pixel_values"].shape[-2:]
    return height // size, width // size


def _looked(weights: Tensor, apart: Tensor, is_causal: bool) -> Tensor:
    """Mean distance over all queries, [B, H]; weights: [B, H, N, N] with tokens of no place first."""
    num = len(apart)
    seen = weights[..., -num:, -num:].double().cpu()
    if is_causal:
        seen = seen.tril()
    seen = seen / seen.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return (seen * apart).sum(dim=-1).mean(dim=-1)


def _curve(by_layer: list[float], blind: float, unit: str) -> Curve:
    layers = range(1, len(by_layer) + 1)
    return Curve(
        "How far attention looks, by layer",
        "layer",
        f"mean distance in {unit}",
        tuple((float(layer), distance) for layer, distance in zip(layers, by_layer, strict=True)),
        {"blind": tuple((float(layer), blind) for layer in layers)},
    )


def _remedies(subject: Subject, now: float, inputs: Mapping[str, Tensor]) -> tuple[Remedy, ...]:
    """By how much nearer each looks whatever its weights: mean distance inside its window or filter, beside now."""
    if subject.kind != "image":
        near = _line(_KERNEL)
        promise = f"convolutions over {_KERNEL} tokens in each layer look {near:.1f} tokens away, untrained"
        return (Remedy("conformer", promise, max(1.0, now / near)),)
    rows, columns = _grid(subject, inputs)
    window = max(2, min(rows, columns) // 4)
    inside, filters = _square(window), _square(_STEM)
    size, kept = inputs["pixel_values"].shape[-2] // rows, window**2 / (rows * columns)
    return (
        Remedy(
            "cnn-transformer",
            f"a stem of {_STEM} x {_STEM} filters looks {filters:.1f} pixels away, within one patch of {size}",
            max(1.0, now * size / filters),
        ),
        Remedy(
            "swin",
            f"windows of {window} x {window} patches look {inside:.1f} patches away, by {kept:.0%} of the scores",
            max(1.0, now / inside),
        ),
        Remedy(
            "hierarchical-vit",
            f"stages from {rows * columns:,} patches to {max(1, rows * columns // 64):,}, fine first",
        ),
    )


def _line(num: int) -> float:
    """Mean distance between the middle of `num` tokens and all of them."""
    return float((torch.arange(num) - num // 2).abs().double().mean())


def _square(side: int) -> float:
    """Mean distance between two places of a square."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    return float(torch.cdist(places, places).mean())


CHECKUP = LocalityCheckup()
