"""A memory bill: bytes by what they are for, measured beside predicted, and the longest text that a budget pays for."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from transformer_problems.core.records import Measurement

Part = Literal["weight", "gradient", "optimizer", "cache", "activation"]


@dataclass(frozen=True, slots=True)
class Bill:
    """Bytes at the worst moment.

    Args:
        measured: What was allocated; "activation" is all that is none of the other parts, scratch included.
        predicted: The same from sizes alone, where a formula says.
    """

    measured: Mapping[Part, int]
    predicted: Mapping[Part, int]

    @property
    def total(self) -> int:
        return sum(self.measured.values())

    def ratios(self) -> dict[Part, float]:
        """Predicted over measured."""
        return {part: num_bytes / self.measured[part] for part, num_bytes in self.predicted.items()}


def measurements_of(bills: Mapping[int, Bill], budget: int) -> Iterator[Measurement]:
    """What is recorded of the bills at several lengths.

    The peak at each; the parts at the longest; the predictions that are furthest off at any length, of the activations
    and of all else; and the tokens that fit the budget.
    """
    for length, bill in bills.items():
        yield Measurement("peak_memory_bytes", "bytes", bill.total, x=length, x_unit="tokens")
    longest = bills[max(bills)]
    yield Measurement("longest_peak_bytes", "bytes", longest.total)
    for part, num_bytes in longest.measured.items():
        yield Measurement(f"{part}_bytes", "bytes", num_bytes)
    ratios = [item for bill in bills.values() for item in bill.ratios().items()]
    for metric, chosen in (
        ("activation_ratio", [ratio for part, ratio in ratios if part == "activation"]),
        ("state_ratio", [ratio for part, ratio in ratios if part != "activation"]),
    ):
        if chosen:
            yield Measurement(metric, "1", max(chosen, key=lambda ratio: abs(math.log(ratio))))
    yield Measurement("budget_bytes", "bytes", budget)
    fit = longest_fit({length: bill.total for length, bill in bills.items()}, budget)
    if fit is not None:
        yield Measurement("longest_fit", "tokens", fit)


def longest_fit(peaks: Mapping[int, int], budget: int) -> float | None:
    """Tokens whose peak is the budget, between measured lengths on a straight line of logarithms.

    Nothing is said beyond what was measured: the longest length where all of them fit, None where none does.
    """
    lengths = sorted(peaks)
    if peaks[lengths[0]] > budget:
        return None
    if peaks[lengths[-1]] <= budget:
        return float(lengths[-1])
    sizes = [math.log(peaks[length]) for length in lengths]
    return float(np.exp(np.interp(math.log(budget), sizes, [math.log(length) for length in lengths])))
