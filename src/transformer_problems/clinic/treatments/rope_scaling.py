"""Rotary positions, slowed down so that a checkpoint reads beyond its trained length."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.contract import MOST_LOSS
from transformer_problems.clinic.excerpts import losses_by_text, to_choose, within
from transformer_problems.clinic.treatment import Treated
from transformer_problems.core.arguments import require_finite
from transformer_problems.core.errors import ArgumentError
from transformer_problems.problems.p09_length_generalization.beyond import foretold_losses

LONGEST = 4_096  # tokens that are read to see how a model does beyond its trained length
_TOKENS = 3_072  # of all texts that settings are tried on


@dataclass(frozen=True, slots=True)
class _Tried:
    """One way to scale, and what it gave on texts that nothing is proved on."""

    way: str
    subject: Subject
    beyond: float
    growth: float


@dataclass(frozen=True, slots=True)
class RoPEScaling:
    """Tries the ways to scale that transformers knows, and writes the best as a standard config.

    Best is the lowest loss on tokens beyond the trained length, among those that cost at most 0.02 nats a token within
    it; if each costs more, among all. "linear" and "yarn" turn every text otherwise; "dynamic" (NTK-aware) leaves texts
    within the trained length as they are, but keys that are in a cache keep the angles of when they were put there.

    Args:
        factor: How many times the trained length is to be read.

    Raises:
        ArgumentError: If the factor is not more than 1.
    """

    factor: float = 2.0
    solution = "rope-scaling"
    claims = (9,)

    def __post_init__(self) -> None:
        require_finite(factor=self.factor)
        if not self.factor > 1:
            raise ArgumentError(f"factor must be more than 1, times the trained length; got {self.factor:g}. Take 2.")

    def refusal(self, subject: Subject) -> str | None:
        scaling = getattr(subject.config, "rope_parameters", None)
        if isinstance(scaling, dict) and "rope_type" not in scaling:
            return "its kinds of layers have rotary positions of their own each, which is not supported."
        if not isinstance(scaling, dict) or not _rotary_parts(subject.model):
            return "it has no rotary positions (rope_parameters in its config)."
        if scaling["rope_type"] != "default":
            return f"its rotary positions are scaled already (rope_type {scaling['rope_type']!r} in its config)."
        if not subject.has_loss:
            return "it predicts no tokens, so that nothing tells which scaling is best."
        if subject.trained_len is None:
            return "its config does not say how long the texts of its training were. Add max_position_embeddings."
        if 2 * subject.trained_len > LONGEST:
            most = f"{LONGEST // 2:,}"
            return f"it was trained on {subject.trained_len:,} tokens, and texts beyond {most} take too long to try."
        return None

    @torch.no_grad()
    def apply(self, visit: Visit) -> Treated:
        subject, trained = visit.subject, visit.subject.trained_len
        assert trained is not None  # or it would have been refused
        length = 2 * trained
        far = to_choose(visit, max(3, _TOKENS // length), length)
        near = to_choose(visit, *within(visit))
        before, near_before = _beyond(subject, far, trained), losses_by_text(subject, near, visit)
        tried = []
        for way in ("linear", "dynamic", "yarn"):
            scaled = scaled_copy(subject, way, self.factor)
            growth = float((losses_by_text(scaled, near, visit) - near_before).mean())
            tried.append(_Tried(way, scaled, _beyond(scaled, far, trained), growth))
        best = min(tried, key=lambda one: (one.growth > MOST_LOSS, one.beyond))
        settings = {
            "rope_parameters": dict(best.subject.config.rope_parameters),
            "max_position_embeddings": best.subject.config.max_position_embeddings,
            "trained_tokens": trained,
            "tried": {
                "untreated": {"loss_beyond_nats": before, "growth_within_nats": 0.0},
                **{one.way: {"loss_beyond_nats": one.beyond, "growth_within_nats": one.growth} for one in tried},
            },
            "why": _why(best, trained, length),
        }
        # a new copy: transformers' dynamic RoPE keeps the length of the longest text that it met
        return Treated(scaled_copy(subject, best.way, self.factor), settings)


def _why(best: _Tried, trained: int, length: int) -> str:
    among = (
        f"among those that cost at most {MOST_LOSS:g} within {trained:,}"
        if best.growth <= MOST_LOSS
        else f"though each costs more than {MOST_LOSS:g} within {trained:,}"
    )
    kept = "; keys in a cache keep the angles of when they were put there" if best.way == "dynamic" else ""
    return f"{best.way} has the lowest loss from {trained:,} to {length:,} tokens {among}{kept}"


def scaled_copy(subject: Subject, way: str, factor: float) -> Subject:
    """A copy whose config says how its rotary positions are scaled, and whose angles transformers made from it."""
    model = deepcopy(subject.model)
    config, trained = cast("Any", model).config, cast("int", subject.trained_len)
    scaling = {**config.rope_parameters, "rope_type": way, "factor": float(factor)}
    if way == "yarn":
        scaling["original_max_position_embeddings"] = trained
    # dynamic scaling counts from max_position_embeddings, which has to stay the trained length then
    config.max_position_embeddings = trained if way == "dynamic" else int(factor * trained)
    config.rope_parameters = scaling
    if getattr(config, "head_dim", 0) is None:  # Mixtral's, of which transformers scales by none but "linear"
        config.head_dim = subject.embed_dim // subject.num_heads
    for path in _rotary_parts(model):
        old = model.get_submodule(path)
        new = cast("Any", type(old))(config).to(next(model.parameters()).device)
        model.set_submodule(path, new.train(old.training))
    return subject.with_model(model)


def _rotary_parts(model: nn.Module) -> list[str]:
    """Paths of the modules that transformers makes the angles of a config's rope_parameters in."""
    return [path for path, part in model.named_modules() if hasattr(part, "inv_freq") and hasattr(part, "rope_type")]


def _beyond(subject: Subject, texts: Tensor, trained: int) -> float:
    """Nats a token beyond the trained length, of a causal model each and of a masked one every seventh."""
    step = 1 if subject.kind == "causal" else 7
    places = torch.arange(trained, texts.shape[1] - 1, step)
    return float(torch.stack([foretold_losses(subject, text, places).mean() for text in texts]).mean())
