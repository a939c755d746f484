"""What happens beyond the length that the model was trained on?"""

from collections.abc import Mapping
from typing import get_args

import torch

from transformer_problems.checkpoints.checkup import Visit, estimate, exactly
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, NotApplicable, Remedy
from transformer_problems.core.records import Interval
from transformer_problems.problems.p09_length_generalization.beyond import (
    Losses,
    Stretch,
    foretold_losses,
    losses_beyond,
    rotary_parts,
    stretched,
)

_LONGEST, _TOKENS, _BUCKETS = 4_096, 1_536, 8  # all in tokens but the last
_LEAST_BEYOND = 16  # tokens, to speak of what comes beyond
_LEAST_EXTRA = 0.01  # nats: less is no more than one reading differs from the next


class LengthCheckup:
    """Loss on tokens from once to twice the trained length, read on, beside the same tokens read in pieces of it.

    The difference in nats of a token is what the length alone costs. Where positions end in a table, how much of it
    lies beyond the trained length tells whether longer texts are taken at all.
    """

    problem = 9
    not_for: Mapping[Kind, str] = {"image": "images are brought to the size that it was trained on"}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination | NotApplicable:
        subject, trained = visit.subject, visit.subject.trained_len
        if trained is None:
            return NotApplicable("neither its config nor its tokenizer says how long the texts of its training were")
        limit = subject.hard_limit
        length = min(2 * trained, limit or 2 * trained)
        headroom = {"length_headroom": exactly(limit / trained)} if limit else {}
        can_read_on = subject.has_loss and length - trained >= _LEAST_BEYOND and length <= _LONGEST
        if not can_read_on and not headroom:
            why = (
                "it predicts no tokens"
                if not subject.has_loss
                else f"{length:,} tokens take longer than a check-up may"
            )
            return NotApplicable(f"{why}, so that nothing tells how well it reads beyond {trained:,} tokens")
        if not can_read_on:
            beyond = f"it refuses text beyond {limit:,} tokens; it was trained on {trained:,}"
            return Examination(headroom, beyond, _remedies(subject, None, []))
        texts = visit.texts(max(2, min(6, _TOKENS // length)), length)["input_ids"]
        found = [losses_beyond(subject, text, trained) for text in texts]
        extra = estimate([one.extra for one in found])
        worth_it = extra.value > _LEAST_EXTRA and rotary_parts(subject)
        ways: tuple[Stretch, ...] = get_args(Stretch) if worth_it else ()
        tried = [(way, _extra_when(subject, way, texts, found, length / trained)) for way in ways]
        inside, outside = _means(found)
        return Examination(
            {"beyond_loss": extra} | headroom,
            _meaning(trained, length, extra, limit),
            _remedies(subject, (inside, outside), tried),
            _curve(found, trained),
            {
                "trained_tokens": trained,
                "read_tokens": length,
                "loss_read_on_nats": outside,
                "loss_in_pieces_nats": inside,
            },
        )


def _extra_when(subject: Subject, way: Stretch, texts: torch.Tensor, found: list[Losses], factor: float) -> float:
    """The reading with rotary angles stretched, tried on the same texts."""
    extras = []
    with stretched(subject, way, factor):
        for text, before in zip(texts, found, strict=True):
            num = len(before.in_pieces)
            extras.append((foretold_losses(subject, text, before.places)[-num:] - before.in_pieces).mean())
    return float(torch.stack(extras).mean())


def _means(found: list[Losses]) -> tuple[float, float]:
    """Nats a token beyond the trained length, read in pieces and read on."""
    pieces = torch.cat([one.in_pieces for one in found]).mean()
    read_on = torch.cat([one.read_on[-len(one.in_pieces) :] for one in found]).mean()
    return float(pieces), float(read_on)


def _meaning(trained: int, length: int, extra: Interval, limit: int | None) -> str:
    cost = f"{abs(extra.value):.2f} nats a token {'more' if extra.value > 0 else 'less'}"
    end = f"; beyond {limit:,} text is refused" if limit else ""
    return f"from {trained:,} to {length:,} tokens, reading on costs {cost} than reading in pieces{end}"


def _remedies(
    subject: Subject, losses: tuple[float, float] | None, tried: list[tuple[Stretch, float]]
) -> tuple[Remedy, ...]:
    """RoPE scaling by trying it; the others need training anew, at best for the loss that short pieces have now."""
    best: tuple[Remedy, ...] = ()
    if tried and losses:
        way, after = min(tried, key=lambda one: one[1])
        now = losses[1] - losses[0]
        left = f"{after:.2f}" if after > 0.005 else "none"
        best = (
            Remedy(
                "rope-scaling",
                f"tried on it: {way} leaves {left} of the {now:.2f} nats a token that reading on costs",
                max(now, _LEAST_EXTRA) / max(after, _LEAST_EXTRA),
            ),
        )
    hope = f"at best {losses[0]:.2f} nats a token beyond, not {losses[1]:.2f}" if losses else "no end at all"
    rows = subject.hard_limit
    freed = f"; {rows * subject.embed_dim:,} weights of its table go" if rows else ""
    return (
        *best,
        Remedy("alibi", f"trained anew with slopes by distance, {hope}{freed}"),
        Remedy("relative-pe", f"trained anew with one bias for all far distances, {hope}{freed}"),
        Remedy("length-extrapolation", f"trained anew on places drawn from twice as many, {hope}"),
    )


def _curve(found: list[Losses], trained: int) -> Curve:
    places, beyond = found[0].places, found[0].places[-len(found[0].in_pieces) :]
    read_on = torch.stack([one.read_on for one in found]).mean(dim=0)
    pieces = torch.stack([one.in_pieces for one in found]).mean(dim=0)
    return Curve(
        f"Loss by place in the text; trained on {trained:,} tokens",
        "tokens before",
        "nats a token",
        _bucketed(places, read_on),
        {"read in pieces": _bucketed(beyond, pieces)},
    )


def _bucketed(places: torch.Tensor, losses: torch.Tensor) -> tuple[tuple[float, float], ...]:
    pairs = zip(places.chunk(_BUCKETS), losses.chunk(_BUCKETS), strict=True)
    return tuple((float(place.double().mean()), float(loss.mean())) for place, loss in pairs)


CHECKUP = LengthCheckup()
