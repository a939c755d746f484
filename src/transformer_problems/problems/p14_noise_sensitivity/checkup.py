"""Does padding change what the model makes of a text, and how much does irrelevant text?"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, NotApplicable, Remedy
from transformer_problems.problems.p14_noise_sensitivity.surroundings import Surrounded, Texts, excerpts

_NUM_TEXTS, _LENGTH, _PADDING = 8, 32, 91  # odd, so that sums are taken in another order than alone
_AMOUNTS = (0.25, 0.5, 1.0, 2.0)  # of noise, in lengths of the text
_BATCH, _MOST_TOKENS = 16, 256
_ROUNDING = 0.01  # what bfloat16 can do by itself


class NoiseCheckup:
    """A text alone, padded, and with unrelated text at its side, and how far that moves what the model makes of it.

    That is the last token's state of a causal model, and the mean over the text's own tokens of an encoder. Both
    changes are told beside that from one text to another: padding should do nothing beyond rounding, and a model
    that weighs text and noise alike, as a plain mean of both does, is moved half as far.
    """

    problem = 14
    not_for: Mapping[Kind, str] = {"image": "an image is not padded, and which of its patches are noise is not known"}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination | NotApplicable:
        subject = visit.subject
        drawn = excerpts(visit, 3 * _NUM_TEXTS, 2 * _LENGTH)  # in one go, so that no two read the same place
        own, other, noise = drawn.bodies.chunk(3)
        texts, others = (replace(drawn, bodies=bodies[:, :_LENGTH]) for bodies in (own, other))
        alone, padded = (_states(subject, given) for given in (texts.alone(), texts.padded(_PADDING)))
        told = _told(subject, alone)
        apart = (_told(subject, _states(subject, others.alone())) - told).norm(dim=1)
        differ = apart > 0
        if 2 * int(differ.sum()) < len(apart):
            return NotApplicable(
                "the texts repeat themselves, so that one part in place of another changes nothing. Give more of them"
            )

        def moved(states: Tensor) -> Tensor:
            change: Tensor = (_told(subject, states) - told).norm(dim=1)
            beside: Tensor = (change / apart)[differ]
            return beside

        padding = estimate(moved(padded))
        by_noise = [moved(_states(subject, texts.among(noise[:, : int(share * _LENGTH)]))) for share in _AMOUNTS]
        by_amount = {amount: float(change.mean()) for amount, change in zip(_AMOUNTS, by_noise, strict=True)}
        change = estimate(by_noise[_AMOUNTS.index(1.0)])
        on_noise = _attention_on_noise(texts, noise[:, :_LENGTH])
        idle = _idle_share(visit) if visit.material.own else None
        return Examination(
            {"padding_change": padding, "distractor_share": change},
            f"padding moves its output by {padding.value:.1%}, as much unrelated text by {change.value:.0%}, of what "
            "another text would",
            _remedies(subject, padding.value, by_amount, on_noise, idle),
            Curve(
                "What unrelated text beside it does to a text's output",
                "noise, in lengths of the text",
                "change, in shares of another text's",
                tuple(by_amount.items()),
                {"a plain mean of both": tuple((amount, amount / (1 + amount)) for amount in _AMOUNTS)},
            ),
            {"attention_on_noise_percent": 100 * on_noise}
            | ({} if idle is None else {"padding_in_a_batch_percent": 100 * idle}),
        )


def _states(subject: Subject, given: Surrounded) -> Tensor:
    """Last states of the text's own tokens, [B, N, C]."""
    return subject.body.run(given.inputs).output[:, given.first : given.first + _LENGTH].double().cpu()


def _told(subject: Subject, states: Tensor) -> Tensor:
    """What is read of them, [B, C]."""
    return states[:, -1] if subject.kind == "causal" else states.mean(dim=1)


def _attention_on_noise(texts: Texts, noise: Tensor) -> float:
    """Share of the attention of the text's tokens that lands on as much noise, over all layers and heads."""
    among = texts.among(noise)
    start = among.first - _LENGTH if texts.subject.kind == "causal" else among.first + _LENGTH
    own = slice(among.first, among.first + _LENGTH)
    weights = texts.subject.body.run(among.inputs, attentions=True).attentions
    return float(torch.stack([layer[..., own, start : start + _LENGTH].sum(dim=-1).mean() for layer in weights]).mean())


def _idle_share(visit: Visit) -> float:
    """Share of padding in a batch of the texts, each cut at what the model takes."""
    rows = visit.short_texts(_BATCH, min(visit.subject.trained_len or _MOST_TOKENS, _MOST_TOKENS))
    lengths = torch.tensor([float(len(row)) for row in rows])
    return 1 - float(lengths.mean() / lengths.max())


def _remedies(
    subject: Subject, padding: float, by_amount: Mapping[float, float], on_noise: float, idle: float | None
) -> tuple[Remedy, ...]:
    """A mask leaves rounding of what padding does; less noise was tried; where attention goes was seen."""
    rounding = torch.finfo(subject.dtype).eps * subject.num_layers
    saved = "it is not computed" if idle is None else f"a batch of the texts is {idle:.0%} smaller"
    half = by_amount[1.0] / max(by_amount[0.5], 1e-9)
    return (
        Remedy(
            "attention-masking",
            f"padding moves nothing, and packed {saved}",
            max(1.0, padding / rounding) if padding > _ROUNDING else 1.0,
        ),
        Remedy(
            "token-pruning",
            f"with half of the noise dropped, it moves the output by {by_amount[0.5]:.0%}, not {by_amount[1.0]:.0%}",
            max(1.0, half),
        ),
        Remedy("sparse-attention", f"weak weights become zero; {on_noise:.0%} of the attention lands on noise now"),
        Remedy("gating-mechanisms", f"heads may stay silent; {on_noise:.0%} of the attention lands on noise now"),
    )


CHECKUP = NoiseCheckup()
