"""Measurements of one problem, looked up by arm, metric and x."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from transformer_problems.core.records import Cell, Measurement, Scale

Samples = NDArray[np.float64]
"""[seeds, repeats]: paired between arms element by element."""


class Results:
    """The measurements of one problem at one scale.

    A seed whose values of a metric at one x are not all finite has diverged there: it is left out of the samples and
    counted by `diverged`.

    Args:
        records: As the store returns them.
    """

    def __init__(self, records: Iterable[tuple[Cell, Measurement]]) -> None:
        self._values: dict[tuple[str, str, float | None], dict[int, dict[int, float]]] = {}
        self._xs: dict[tuple[str, str], set[float]] = defaultdict(set)
        self._hardness_of: dict[str, dict[int, float]] = {}
        self._diverged: dict[tuple[str, str, float | None], set[int]] = defaultdict(set)
        self._range_of: dict[str, tuple[float, float]] = {}
        self.seeds: set[int] = set()
        self._scales: set[Scale] = set()
        for cell, m in records:
            by_seed = self._values.setdefault((cell.arm, m.metric, m.x), {})
            by_seed.setdefault(cell.seed, {})[m.repeat] = m.value
            if m.x is not None:
                self._xs[cell.arm, m.metric].add(m.x)
            self.seeds.add(cell.seed)
            self._scales.add(cell.scale)
            if not math.isfinite(m.value):
                self._diverged[cell.arm, m.metric, m.x].add(cell.seed)
        for key, seeds in self._diverged.items():
            for seed in seeds:
                del self._values[key][seed]

    @property
    def scale(self) -> Scale:
        """The scale of the measurements, of which there must be some."""
        (scale,) = self._scales
        return scale

    def with_fewer_seeds(self, metrics: Iterable[str]) -> dict[str, int]:
        """Those of some metrics that were measured with fewer seeds than there are, and with how many."""
        seeds: dict[str, set[int]] = defaultdict(set)
        for (_, metric, _), by_seed in (*self._values.items(), *self._diverged.items()):
            seeds[metric].update(by_seed)
        counts = {metric: len(seeds[metric]) for metric in metrics}
        return {metric: num for metric, num in counts.items() if 0 < num < len(self.seeds)}

    def seeds_of(self, arm: str) -> set[int]:
        """The seeds that anything was measured with of an arm, diverged ones included."""
        measured = {seed for key, by_seed in self._values.items() if key[0] == arm for seed in by_seed}
        return measured.union(*(seeds for key, seeds in self._diverged.items() if key[0] == arm))

    def diverged(self, arm: str, metric: str | None = None, x: float | None = None) -> str:
        """In how many seeds an arm diverged, e.g. "diverged in 1 of 3 seeds"; empty where it did in none.

        Args:
            metric: The metric asked for, at x; None asks for anything measured of the arm.
        """
        seeds: set[int] = set()
        for key, lost in self._diverged.items():
            if key[0] == arm and (metric is None or key[1:] == (metric, x)):
                seeds |= lost
        num = len(self.seeds_of(arm))
        return f"diverged in {len(seeds)} of {num} seed{'s' if num > 1 else ''}" if seeds else ""

    def xs(self, arm: str, metric: str) -> list[float]:
        """Every x the metric was measured at, ascending."""
        return sorted(self._xs[arm, metric])

    def samples(self, arm: str, metric: str, x: float | None = None) -> Samples | None:
        """Values [seeds, repeats], or None where nothing was measured."""
        return self._stack(self._values.get((arm, metric, x)), None, None)

    def mean(self, arm: str, metric: str, x: float | None = None) -> float:
        """Over all seeds and repeats.

        Raises:
            KeyError: If it was not measured.
        """
        samples = self.samples(arm, metric, x)
        if samples is None:
            raise KeyError(f"{arm} has no {metric} at {x}")
        return float(samples.mean())

    def largest(self, arm: str, metric: str) -> float | None:
        """The largest value at any x, infinite where it diverged, or None where nothing was measured."""
        if any(key[:2] == (arm, metric) for key in self._diverged):
            return math.inf
        found = [v for (a, m, _), seeds in self._values.items() if (a, m) == (arm, metric) for v in seeds.values()]
        return max((value for by_repeat in found for value in by_repeat.values()), default=None)

    def eased(self, arm: str, metric: str, x: float | None = None) -> Samples | None:
        """`samples` without what makes an example hard for every arm: its mean over arms, seeds and x, put to the
        mean of the arm's examples. For metrics that arms are measured by on the same examples, by the same repeats.

        An arm whose samples are all the same stays as it is: for it no example is harder than another.

        Source:
            Cousineau 2005, Confidence intervals in within-subject designs, doi:10.20982/tqmp.01.1.p042.
        """
        mine = self._values.get((arm, metric, x), {})
        if len({value for by_repeat in mine.values() for value in by_repeat.values()}) <= 1:
            return self.samples(arm, metric, x)
        hardness = self._hardness(metric)
        typical = float(np.mean([hardness[r] for r in set().union(*mine.values())]))
        eased = {s: {r: v - hardness[r] + typical for r, v in values.items()} for s, values in mine.items()}
        return self._stack(eased, None, None)

    def range(self, metric: str) -> tuple[float, float]:
        """The smallest and the largest value that any arm was measured at."""
        if metric not in self._range_of:
            found = [value for _, value in self._examples(metric)]
            self._range_of[metric] = min(found), max(found)
        return self._range_of[metric]

    def _hardness(self, metric: str) -> dict[int, float]:
        """Mean of each example over everything it was measured for."""
        if metric not in self._hardness_of:
            values: dict[int, list[float]] = defaultdict(list)
            for repeat, value in self._examples(metric):
                values[repeat].append(value)
            self._hardness_of[metric] = {repeat: float(np.mean(v)) for repeat, v in values.items()}
        return self._hardness_of[metric]

    def _examples(self, metric: str) -> Iterator[tuple[int, float]]:
        """Every value of a metric with its repeat, over arms, seeds and x."""
        for (_, name, _), by_seed in self._values.items():
            if name == metric:
                for by_repeat in by_seed.values():
                    yield from by_repeat.items()

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
