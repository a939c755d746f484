"""Does the model need as many patches as it cuts an image into?"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.problems.p16_dense_inputs.detail import coarser

_NUM_IMAGES = 16
_FACTORS = (2, 4, 8)
_ALIKE = 0.95  # cosine from which two tokens are told as mergeable


class DetailCheckup:
    """Takes away half of the resolution and looks how far the output moves, as a share of what another image does.

    An image of half the width and height fits into a quarter of the tokens. Where the output hardly moves, because
    the model has not learned to use detail or the images hold none, three quarters of the tokens are for nothing.
    Unlike the similarity of tokens inside, this does not depend on how a model scales or shifts its states.
    """

    problem = 16
    not_for: Mapping[Kind, str] = {
        "causal": "text comes in tokens that were chosen to say much each, not in pixels",
        "encoder": "text comes in tokens that were chosen to say much each, not in pixels",
    }

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, pixels = visit.subject, visit.images(_NUM_IMAGES)["pixel_values"]
        seen = subject.run({"pixel_values": pixels}, states=True)
        output = _rows(seen.output)
        moves = {factor: _moved(output, _rows(_run(subject, coarser(pixels, factor)))) for factor in _FACTORS}
        moved = estimate(moves[2])
        num_tokens, width = seen.states[0].shape[1:]
        flops = count_flops(lambda: _run(subject, pixels[:1]))
        remedies, fewer = _remedies(subject, num_tokens, width, flops)
        return Examination(
            {"detail_change": moved},
            f"at half the resolution the output moves by {moved.value:.0%} of what another image does "
            f"({num_tokens:,} tokens)",
            remedies,
            Curve(
                "How far the output moves with less detail",
                "times coarser",
                "share of what another image does",
                tuple((factor, float(change.mean())) for factor, change in moves.items()),
                x_log=True,
            ),
            {
                "tokens": num_tokens,
                "flops_per_image": flops,
                "flops_with_a_quarter_of_the_tokens": fewer,
                "mergeable_tokens_share": _mergeable(seen.states),
            },
        )


def _run(subject: Subject, pixels: Tensor) -> Tensor:
    return subject.run({"pixel_values": pixels}).output


def _rows(output: Tensor) -> Tensor:
    """[B, everything else]"""
    return output.float().flatten(1)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Distance of each output from what it was, over the mean distance between those of two images, [B]."""
    apart = torch.cdist(before, before).sum() / (len(before) * (len(before) - 1))
    moved: Tensor = (after - before).norm(dim=1) / apart.clamp(min=1e-30)
    return moved


def _mergeable(states: tuple[Tensor, ...]) -> float:
    """Share of the tokens that have one alike, by cosine, a third of the way up, where ToMe has begun to merge."""
    x = normalize(states[len(states) // 3].float(), dim=-1)
    nearest = (x @ x.mT - 2 * torch.eye(x.shape[1], device=x.device)).amax(dim=-1)
    return float((nearest > _ALIKE).float().mean())


def _remedies(subject: Subject, num_tokens: int, width: int, flops: int) -> tuple[tuple[Remedy, ...], float]:
    """And the FLOPs with a quarter of the tokens: what is linear in them falls by 4, attention between all by 16."""
    window = getattr(subject.config, "window_size", None)
    # scores and weighted sums of every layer, 2 products of N x N x C of 2 FLOPs each; in windows they are linear
    attention = 0 if window else subject.num_layers * 4 * num_tokens**2 * width
    linear = flops - attention
    fewer = linear / 4 + attention / 16
    patches = Remedy(
        "patch-embedding",
        f"patches twice as wide: {num_tokens // 4:,} tokens, {flops / fewer:.1f}x less",
        flops / fewer,
    )
    if window:
        return (patches,), fewer
    pyramid = flops / ((flops + fewer) / 2)
    windowed = flops / (linear + attention * min(1.0, 49 / num_tokens))
    return (
        patches,
        Remedy("hierarchical-vit", f"a quarter of the tokens from mid-depth on: {pyramid:.1f}x less", pyramid),
        Remedy("swin", f"attention in windows of 7 x 7: {windowed:.1f}x less arithmetic", windowed),
    ), fewer


CHECKUP = DetailCheckup()
