"""What an experiment is: arms, a chart, a table and a way to measure one arm."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from transformer_problems.core.records import Cell, Measurement, Scale
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results


@dataclass(frozen=True, slots=True)
class OwnData:
    """A folder of the user's own data.

    Args:
        strict: Refuse what would else be left out or cut.
    """

    folder: Path
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Bench:
    """What one cell is given to measure with.

    Args:
        data: The user's own data, which the experiment said it reads; None for its built-in sets.
    """

    cell: Cell
    device: torch.device
    models: ModelCache
    progress: Callable[[float], None]
    data: OwnData | None = None


class Experiment(Protocol):
    """One problem's experiment. Declares what it compares and shows as data; draws and stores nothing."""

    problem: int
    arms: tuple[Arm, ...]
    chart: Chart
    columns: tuple[Column, ...]
    gains: tuple[Effect, ...]  # words for whatever metric the catalogue's criterion names, own baseline first
    costs: tuple[Effect, ...]  # what a solution may cost, the most telling first
    shared_examples: frozenset[str]  # metrics that every arm is measured by on the same examples

    def num_seeds(self, scale: Scale) -> int:
        """Seeds measured at a scale unless the user says otherwise."""
        ...

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        """Everything about one arm with one seed."""
        ...

    def finding(self, results: Results) -> str:
        """What the baseline showed, in one plain sentence with its figures, and what a verdict alone would hide."""
        ...


@runtime_checkable
class HasNotes(Protocol):
    """An experiment that tells what a reader must know beside the figures: limits of the method, lines to compare."""

    def notes(self, results: Results) -> tuple[str, ...]:
        """One plain paragraph each; of a run that is not complete, what can be said of it. `results` are not empty."""
        ...


@runtime_checkable
class ReadsData(Protocol):
    """An experiment that takes a folder of the user's own data in place of its built-in sets."""

    def arms_for(self, data: OwnData) -> frozenset[str]:
        """Slugs of the arms that such data is for. Warns of what will be left out of it.

        Raises:
            ArgumentError: If the folder holds nothing to read, too little to measure with, or, in strict mode,
                anything that would be left out.
        """
        ...

    def not_asked(self, results: Results) -> Mapping[str, str]:
        """Slugs of the arms that the data behind these results is not for, each with what it is for."""
        ...
