"""Measurements of one problem, looked up by arm, metric and x."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from transformer_problems.core.records import Cell, Measurement

Samples = NDArray[np.float64]
"""[seeds, repeats]: paired between arms element by element."""


class Results:
    """The measurements of one problem at one scale.

    Args:
        records: As the store returns them.
    """

    def __init__(self, records: Iterable[tuple[Cell, Measurement]]) -> None:
        self._values: dict[tuple[str, str, float | None], dict[int, dict[int, float]]] = {}
        self._xs: dict[tuple[str, str], set[float]] = defaultdict(set)
        self._hardness_of: dict[str, dict[int, float]] = {}
        self.seeds: set[int] = set()
        for cell, m in records:
            by_seed = self._values.setdefault((cell.arm, m.metric, m.x), {})
            by_seed.setdefault(cell.seed, {})[m.repeat] = m.value
            if m.x is not None:
                self._xs[cell.arm, m.metric].add(m.x)
            self.seeds.add(cell.seed)

    def xs(self, arm: str, metric: str) -> list[float]:
        """Every x the metric was measured at, ascending."""
        return sorted(self._xs[arm, metric])

    def samples(self, arm: str, metric: str, x: float | None = None) -> Samples | None:
        """Values [seeds, repeats], or None where nothing was measured."""
        return self._stack(self._values.get((arm, metric, x)), None, None)

    def largest(self, arm: str, metric: str) -> float | None:
        """The largest value at any x, or None where nothing was measured."""
        found = [v for (a, m, _), seeds in self._values.items() if (a, m) == (arm, metric) for v in seeds.values()]
        return max((value for by_repeat in found for value in by_repeat.values()), default=None)

    def eased(self, arm: str, metric: str, x: float | None = None) -> Samples | None:
        """`samples` without what makes an example hard for every arm: its mean over arms, seeds and x, put to the
        mean of all examples. For metrics that every arm is measured by on the same examples.

        Source:
            Cousineau 2005, Confidence intervals in within-subject designs, doi:10.20982/tqmp.01.1.p042.
        """
        mine = self._values.get((arm, metric, x))
        if mine is None:
            return None
        hardness = self._hardness(metric)
        typical = float(np.mean(list(hardness.values())))
        eased = {s: {r: v - hardness[r] + typical for r, v in values.items()} for s, values in mine.items()}
        return self._stack(eased, None, None)

    def _hardness(self, metric: str) -> dict[int, float]:
        """Mean of each example over everything it was measured for."""
        if metric not in self._hardness_of:
            values: dict[int, list[float]] = defaultdict(list)
            for (_, name, _), by_seed in self._values.items():
                if name == metric:
                    for by_repeat in by_seed.values():
                        for repeat, value in by_repeat.items():
                            values[repeat].append(value)
            self._hardness_of[metric] = {repeat: float(np.mean(v)) for repeat, v in values.items()}
        return self._hardness_of[metric]

    def paired(self, arm: str, other: str, metric: str, x: float | None) -> tuple[Samples, Samples] | None:
        """Values of two arms for the seeds and repeats that both have."""
        mine, theirs = self._values.get((arm, metric, x)), self._values.get((other, metric, x))
        if mine is None or theirs is None:
            return None
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            return None
        repeats = set.intersection(*(set(mine[s]) & set(theirs[s]) for s in seeds))
        left, right = self._stack(mine, seeds, repeats), self._stack(theirs, seeds, repeats)
        return None if left is None or right is None else (left, right)

    @staticmethod
    def _stack(
        by_seed: dict[int, dict[int, float]] | None, seeds: list[int] | None, repeats: set[int] | None
    ) -> Samples | None:
        if not by_seed:
            return None
        seeds = sorted(by_seed) if seeds is None else seeds
        shared = set.intersection(*(set(by_seed[s]) for s in seeds)) if repeats is None else repeats
        if not shared:
            return None
        return np.array([[by_seed[s][r] for r in sorted(shared)] for s in seeds])
