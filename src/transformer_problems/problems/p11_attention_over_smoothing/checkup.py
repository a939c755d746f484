"""Do the tokens stay distinct from layer to layer?"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.problems.p11_attention_over_smoothing.depth import mean_cosine, rank_one_distance

_NUM_EXAMPLES, _LENGTH = 8, 128
_NUM_ATTENDED = 2  # examples whose attention weights are looked at
_BRANCH = 0.1  # what LayerScale starts each branch with


class SmoothingCheckup:
    """How far the tokens of an input are from all alike, in the last layer relative to the embedding.

    Tokens count by their direction alone: a few tokens of huge norm, as the first one of many causal models, would
    otherwise hide that all others are alike. Of a causal model the last quarter is compared: its first tokens see
    few others that they could be averaged with.
    """

    problem = 11
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        inputs = visit.inputs(_NUM_EXAMPLES, _LENGTH)
        seen = slice(-(_LENGTH // 4), None) if visit.subject.kind == "causal" else slice(None)
        states = [normalize(x[:, seen].float(), dim=-1) for x in visit.subject.run(inputs, states=True).states]
        distances = [rank_one_distance(x) for x in states]
        cosines = [float(mean_cosine(x).mean()) for x in states]
        kept = estimate(distances[-1] / distances[0])
        return Examination(
            {"rank_distance": kept},
            f"the last layer keeps {kept.value:.0%} of the difference between tokens (their cosine: {cosines[-1]:.2f})",
            _remedies(visit.subject, inputs, states),
            Curve(
                "What is left of the difference between tokens",
                "layer",
                "distance from all tokens alike",
                tuple((depth, float(distance.mean())) for depth, distance in enumerate(distances)),
                {"cosine between tokens": tuple(enumerate(cosines))},
            ),
            {"cosine_first_layer": cosines[0], "cosine_last_layer": cosines[-1]},
        )


def _remedies(subject: Subject, inputs: Inputs, states: list[Tensor]) -> tuple[Remedy, ...]:
    """Predicted on these very states, as if the layers gave what they give now."""
    drop = Remedy("drophead", "work spreads over all heads; does not keep tokens apart by itself", 1)
    found = [drop, *_cooled(subject, inputs)]
    first, last = states[0], states[-1]
    if first.shape == last.shape:  # not so where stages have widths of their own
        joined, scaled = first + last, first + _BRANCH * (last - first)
        found.append(_apart("skip-connections", "a long skip from the embedding", joined, last))
        found.append(_apart("residual-scaling", f"branches scaled by {_BRANCH}, trained anew", scaled, last))
    return tuple(found)


def _apart(solution: str, how: str, then: Tensor, now: Tensor) -> Remedy:
    before, after = (float(rank_one_distance(x).mean()) for x in (now, then))
    return Remedy(solution, f"{how}: distance {after:.2g} in the last layer in place of {before:.2g}", after / before)


def _cooled(subject: Subject, inputs: Inputs) -> list[Remedy]:
    """Half the temperature squares the weights: what that does to the number of tokens that a token averages."""
    few = {name: values[:_NUM_ATTENDED] for name, values in inputs.items()}
    try:
        layers = subject.run(few, attentions=True).attentions
    except CombinationError:
        return []
    now = sum(float(_num_averaged(weights.float())) for weights in layers) / len(layers)
    then = sum(float(_num_averaged(weights.float().square())) for weights in layers) / len(layers)
    told = f"at half the temperature a token averages {then:.1f} tokens in place of {now:.1f}"
    return [Remedy("attention-temperature-control", told, now / then)]


def _num_averaged(weights: Tensor) -> Tensor:
    """exp of the mean entropy, of weights that need not sum to one."""
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    number: Tensor = torch.special.entr(shares).sum(dim=-1).mean().exp()
    return number


CHECKUP = SmoothingCheckup()
