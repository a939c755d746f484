"""From a request to finished cells in the store: plan, skip what is done, run, write down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Cell, Measurement, Scale
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.device import DeviceChoice, describe_environment, resolve_device
from transformer_problems.lab.engine import Done, Failed, LocalEngine, Outcome
from transformer_problems.lab.experiment import Bench, Experiment, OwnData, ReadsData
from transformer_problems.lab.fingerprint import folder_fingerprint, run_fingerprint
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.store import Store

ExperimentLoader = Callable[[int], Experiment]

_CELL_TIMEOUT_S: dict[Scale, float] = {"quick": 300, "standard": 3600, "full": 24 * 3600}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the user asked to have measured.

    Args:
        rooms: Problem number to room name, e.g. {1: "p01_quadratic_complexity"}.
        load: Gives a problem's experiment; a top-level function, so that a worker process can call it.
        seeds: Seeds an arm; None for what each experiment says.
        out: Folder that holds results.sqlite and the cache.
        data: A folder of the user's own data, which every experiment asked for must read.
    """

    rooms: Mapping[int, str]
    load: ExperimentLoader
    scale: Scale
    device: DeviceChoice
    out: Path
    seeds: int | None = None
    data: OwnData | None = None

    @property
    def store_path(self) -> Path:
        return self.out / "results.sqlite"

    @property
    def log(self) -> Path:
        return self.out / "worker.log"


class Run:
    """The cells of a request that are still to be measured; iterate `outcomes` to measure them."""

    def __init__(self, request: RunRequest, store: Store) -> None:
        self.request, self.store = request, store
        where, text = describe_environment(resolve_device(request.device), revision=""), load_text().source
        if request.data is not None:
            text = f"{text}\0{folder_fingerprint(request.data.folder)}"
        self.fingerprints = {number: run_fingerprint(room, where, text) for number, room in request.rooms.items()}
        self.planned = [cell for number in request.rooms for cell in self._cells(number)]
        finished = store.finished(set(self.fingerprints.values()))
        self.pending = [cell for cell in self.planned if cell not in finished]

    def outcomes(self) -> Iterator[Outcome]:
        """Measure what is pending; each finished or failed cell is in the store before it is yielded."""
        device = resolve_device(self.request.device)
        environments = {n: describe_environment(device, revision) for n, revision in self.fingerprints.items()}
        engine = LocalEngine(
            partial(
                measure_cell,
                self.request.load,
                self.request.out / "cache",
                self.request.device,
                self.fingerprints,
                self.request.data,
            ),
            timeout_s=_CELL_TIMEOUT_S[self.request.scale],
            log=self.request.log,
        )
        for outcome in engine.run(self.pending):
            if isinstance(outcome, Done):
                environment = environments[outcome.cell.problem]
                self.store.finish(outcome.cell, environment, outcome.measurements, outcome.seconds)
            elif isinstance(outcome, Failed):
                self.store.fail(outcome.cell, environments[outcome.cell.problem], outcome.reason)
            yield outcome

    def unmeasured(self) -> dict[int, str]:
        """The problems of which all cells failed, or the first seed of the baseline, without which there is no finding;
        each with what failed and why."""
        finished = self.store.finished(set(self.fingerprints.values()))
        failures = self.store.failures(fingerprints=set(self.fingerprints.values()))
        found = {}
        for number in self.request.rooms:
            baseline, *others = (cell for cell in self.planned if cell.problem == number)
            if baseline not in finished:
                which = "its baseline" if finished.intersection(others) else "every arm"
                found[number] = f"{which} failed: {failures.get(baseline, 'never run')}"
        return found

    def _cells(self, number: int) -> Iterator[Cell]:
        experiment, data = self.request.load(number), self.request.data
        chosen = None if data is None else _arms_for(experiment, data)
        for seed in range(self.request.seeds or experiment.num_seeds(self.request.scale)):
            for arm in experiment.arms:
                if chosen is not None and arm.slug not in chosen:
                    continue
                yield Cell(number, arm.slug, self.request.scale, seed)


def _arms_for(experiment: Experiment, data: OwnData) -> frozenset[str]:
    if not isinstance(experiment, ReadsData):
        raise ArgumentError(
            f"problem {experiment.problem:02d} reads no data of its user's; got {data.folder}. Leave the data out, "
            "or name the problems that do."
        )
    return experiment.arms_for(data)


def measure_cell(
    load: ExperimentLoader,
    cache: Path,
    device: DeviceChoice,
    fingerprints: Mapping[int, str],
    data: OwnData | None,
    cell: Cell,
    progress: Callable[[float], None],
) -> list[Measurement]:
    """Measure one cell; what the worker process runs."""
    bench = Bench(cell, resolve_device(device), ModelCache(cache, fingerprints[cell.problem]), progress, data)
    return list(load(cell.problem).measure(bench))
