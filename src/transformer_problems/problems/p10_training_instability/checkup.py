"""Would further training of this model be steady?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import ceil, exp, log

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, estimate, exactly
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.problems.p10_training_instability.scores import ScoresSeen
from transformer_problems.solutions.interpretability.transformers_reader import eager_attention

_NUM_EXAMPLES, _LENGTH = 8, 64
_DEAD = 1e-3  # a layer that changes its input by less, relative to it, might as well not be there
_HELD = 100.0  # where Kimi K2 holds attention scores in training
_LARGEST_RATIO = 1e12  # what a gradient that vanishes, or is not finite, is told as
_RATE, _DECAY, _STEPS = 1e-4, 0.1, 10_000  # of a fine-tuning


class StabilityCheckup:
    """Attention scores, the gradient that reaches each depth, and layers that do nothing.

    Scores that grow make attention pick one token, which then passes no gradient to queries and keys. The gradient is
    that of a fixed random direction of the last states with regard to those of each depth, times their size: what a
    relative change there would do. Unlike a plain gradient it does not depend on how large the states are, which
    differs by factors of 50 between the layers of healthy models.
    """

    problem = 10
    not_for: Mapping[Kind, str] = {}
    needs_floats = "its linear layers hold int8 codes, through which no gradients flow"

    def examine(self, visit: Visit) -> Examination:
        inputs = visit.inputs(_NUM_EXAMPLES, _LENGTH)
        scores = _largest_scores(visit.subject, inputs)  # [B]
        effects, changes = _through_depth(visit, inputs)  # [depth, B], of each layer
        largest, least = effects.amax(dim=0), effects.amin(dim=0)
        ratios = (largest / least).nan_to_num(_LARGEST_RATIO, _LARGEST_RATIO).clamp(max=_LARGEST_RATIO)
        num_dead = sum(change < _DEAD for change in changes)
        readings = {
            "largest_logit": estimate(scores),
            "gradient_ratio": estimate(ratios),
            "dead_layers": exactly(num_dead / max(1, len(changes))),
        }
        score, ratio = readings["largest_logit"].value, readings["gradient_ratio"].value
        dead = f", {num_dead} of {len(changes)} layers do nothing" if num_dead else ""
        told = f"attention scores reach {score:,.0f} (Kimi K2 holds them below 100), "
        meaning = f"{told}gradients differ {ratio:.2g}x by depth{dead}"
        last = effects.shape[0] - 1
        means = effects.mean(dim=1).nan_to_num(0.0, 0.0)
        return Examination(
            readings,
            meaning,
            _remedies(score, ratio, effects[0]),
            Curve(
                "Gradient by layer, times the size of the states",
                "layer",
                "gradient, last layer = 1",
                tuple((depth, float(means[depth] / means[last])) for depth in range(last + 1)),
                y_log=bool((means > 0).all()),
            ),
            {"least_change_share": min(changes, default=0.0)},
        )


@torch.no_grad()
def _largest_scores(subject: Subject, inputs: Inputs) -> Tensor:
    """Of each example, over all layers, [B]."""
    num_examples = len(next(iter(inputs.values())))
    with eager_attention(subject.model), ScoresSeen(num_examples) as seen:
        subject.run(inputs)
    if not seen.largest:
        raise CombinationError(f"{type(subject.model).__name__} does not show its attention scores.")
    return torch.stack(seen.largest).amax(dim=0)


def _through_depth(visit: Visit, inputs: Inputs) -> tuple[Tensor, list[float]]:
    """Gradient times state in each depth, [L + 1, B], and how much each layer changes its input, relative to it.

    Layers that change the width, as between the stages of Swin, are left out of the second.
    """
    with _learning(visit.subject.model), torch.enable_grad():
        states = visit.subject.run(inputs, states=True).states
        direction = torch.randn(states[-1].shape, generator=visit.generator("direction")).to(states[-1])
        gradients = torch.autograd.grad((direction * states[-1]).float().sum(), states)
    states = tuple(x.detach() for x in states)
    effects = [
        (gradient.float().norm(dim=-1) * x.float().norm(dim=-1)).norm(dim=1)
        for gradient, x in zip(gradients, states, strict=True)
    ]
    changes = [
        float(((after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-30)).median())
        for before, after in pairwise(states)
        if before.shape == after.shape
    ]
    return torch.stack(effects).double().cpu(), changes


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through every parameter, frozen or not; afterwards as before."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _remedies(score: float, ratio: float, gradients: Tensor) -> tuple[Remedy, ...]:
    # clipped at the median of these examples, the largest gradient of them becomes the median
    spike = float((gradients.max() / gradients.median()).nan_to_num(1.0, 1.0))
    # decay takes rate * decay of queries and of keys in each step, so scores fall as exp(-2 * rate * decay * steps)
    decayed = exp(2 * _RATE * _DECAY * _STEPS) if score > _HELD else 1.0
    steps = ceil(log(max(score, _HELD) / _HELD) / (2 * _RATE * _DECAY))
    told = f"decay {_DECAY} at rate {_RATE} takes scores down {decayed:.2f}x in {_STEPS:,} steps, to 100 in {steps:,}"
    return (
        Remedy("gradient-clipping", f"clipped at the median, the largest gradient is {spike:.1f}x smaller", spike),
        Remedy("adamw", told if steps else f"decay holds scores below {_HELD:.0f}", decayed),
        Remedy("learning-rate-warmup", "the first steps, taken on few gradients, become small", 1),
        Remedy("pre-layernorm", f"for a model trained anew: gradients alike by depth, now {ratio:.2g}x apart", 1),
    )


CHECKUP = StabilityCheckup()
