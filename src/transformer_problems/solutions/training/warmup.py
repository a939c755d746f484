"""Learning rate warmup, and the decay that follows it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from transformer_problems.core.arguments import require_not_negative, require_share
from transformer_problems.core.errors import UnknownNameError

Decay = Literal["cosine", "linear", "inverse_sqrt", "constant"]


@dataclass(frozen=True, slots=True)
class Warmup:
    """The factor on the learning rate at a step: up in a line over the first steps, then down.

    In its first steps Adam divides by an average of very few squared gradients, which can be near zero by chance; a
    small rate keeps those steps small until the average can be trusted.

    Args:
        num_steps: Steps of warmup; 0 for none.
        decay: What the rise is multiplied by: "cosine" or "linear", from 1 to `floor` over the whole training;
            "inverse_sqrt", 1 in the warmup and then sqrt(num_steps / n) at the n-th step of all; or "constant", 1.
        floor: Where "cosine" and "linear" end.

    Raises:
        ArgumentError: If `num_steps` is negative, or `decay` or `floor` is none of those.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 5.3 (inverse square root); Goyal et al. 2017,
        arXiv:1706.02677, section 2.2 (linear warmup); Loshchilov and Hutter 2016, arXiv:1608.03983 (cosine).
        Differs from common practice: "cosine" and "linear" fall from the first step on, not from the end of the warmup,
        so their peak lies a little below 1; the first step's rate is not 0.

    Example:
        >>> from transformer_problems import Warmup
        >>> schedule = Warmup(10)
        >>> [schedule(step, num_steps=100) for step in (0, 9)]
        [0.1, 0.9821...]
    """

    num_steps: int
    decay: Decay = "cosine"
    floor: float = 0.1

    def __post_init__(self) -> None:
        require_not_negative(num_steps=self.num_steps)
        if self.decay not in get_args(Decay):
            raise UnknownNameError("decay", str(self.decay), get_args(Decay))
        require_share(floor=self.floor)

    def __call__(self, step: int, num_steps: int) -> float:
        """The factor at a step, counted from 0, of a training of `num_steps`."""
        rising = min(1.0, (step + 1) / max(1, self.num_steps))
        return rising * self._decayed(step, num_steps)

    def _decayed(self, step: int, num_steps: int) -> float:
        done = min(1.0, step / num_steps)
        match self.decay:
            case "cosine":
                return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1 - (1 - self.floor) * done
            case "inverse_sqrt":
                return min(1.0, math.sqrt(max(1, self.num_steps) / (step + 1)))
            case "constant":
                return 1.0
