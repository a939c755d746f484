"""The commands that measure, draw and export."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from transformer_problems.catalogue import Catalogue, Problem, load_catalogue
from transformer_problems.cli.tables import measured_table, named_problem
from transformer_problems.core.errors import ArgumentError, OutputError, StoreError
from transformer_problems.core.records import Cell, Scale
from transformer_problems.core.summaries import ProblemSummary
from transformer_problems.lab.device import DeviceChoice, resolve_device
from transformer_problems.lab.engine import Done, Failed
from transformer_problems.lab.engine import Progress as CellProgress
from transformer_problems.lab.experiment import OwnData, ReadsData
from transformer_problems.lab.export import export_csv, export_json
from transformer_problems.lab.runner import Run, RunRequest
from transformer_problems.lab.store import Store
from transformer_problems.lab.summary import summarise
from transformer_problems.problems import experiment_of, has_experiment, load_experiment, room_of
from transformer_problems.report import write_report


def measure_problems(
    names: Sequence[str],
    scale: Scale,
    seeds: int | None,
    device: DeviceChoice,
    out: Path,
    data: Path | None = None,
    strict: bool = False,
) -> None:
    """Measure the named problems, or all that have an experiment (and read such data), and draw the report.

    Raises:
        Exit: With code 1, after all is written, if a problem was not measured, for all of it or its baseline failed.
    """
    catalogue = load_catalogue()
    problems = _chosen(catalogue, names)
    if data is not None and not names:
        problems = [problem for problem in problems if isinstance(load_experiment(problem), ReadsData)]
    resolve_device(device)
    rooms = {problem.number: room_of(problem).rpartition(".")[2] for problem in problems}
    request = RunRequest(
        rooms, experiment_of, scale, device, out, seeds, None if data is None else OwnData(data, strict)
    )
    _make_folder(out)
    with Store.open(request.store_path) as store:
        run = _planned(request, store)
        if not run.pending:
            typer.echo(f"all {len(run.planned)} cells are finished already")
        elif skipped := len(run.planned) - len(run.pending):
            typer.echo(f"{skipped} of {len(run.planned)} cells are finished already; going on with the rest")
        _show_progress(run, catalogue)
        summaries, unmeasured = _write(catalogue, store, out), run.unmeasured()
    for problem in problems:
        if problem.number in summaries:
            measured_table(problem, summaries[problem.number])
    typer.echo(f"\nwrote {out / 'index.html'}    (results: {request.store_path})")
    if unmeasured:
        told = "; ".join(f"problem {number:02d}, {why.rstrip('.')}" for number, why in unmeasured.items())
        typer.echo(f"transformer-problems: not measured: {told}. More is in {request.log}.", err=True)
        raise typer.Exit(1)


def redraw(folder: Path) -> None:
    """Draw a folder's pictures and pages again from its results."""
    with _open_existing(folder) as store:
        summaries = _write(load_catalogue(), store, folder)
    typer.echo(f"wrote {folder / 'index.html'}: {len(summaries)} problems measured")


def export_results(folder: Path, form: str) -> None:
    """Print every measurement of a folder."""
    with _open_existing(folder) as store:
        for piece in export_json(store) if form == "json" else export_csv(store):
            typer.echo(piece, nl=False)


def summaries_of(store: Store, catalogue: Catalogue) -> dict[int, ProblemSummary]:
    """The summary of every problem in a store, each at the scale it was measured at last."""
    found = {}
    for problem in catalogue.problems:
        scale = store.latest_scale(problem.number)
        if scale is None or not has_experiment(problem):
            continue
        environment = store.environments(problem.number, scale)[-1]
        newest = {environment.revision}  # numbers made by other code are never mixed in
        found[problem.number] = summarise(
            load_experiment(problem),
            catalogue,
            store.measurements(problem.number, scale, fingerprints=newest),
            store.failures(problem.number, scale, fingerprints=newest),
            scale,
            environment,
        )
    return found


def _chosen(catalogue: Catalogue, names: Sequence[str]) -> list[Problem]:
    if not names:
        return [problem for problem in catalogue.problems if has_experiment(problem)]
    problems = list(dict.fromkeys(named_problem(catalogue, name) for name in names))
    for problem in problems:
        if not has_experiment(problem):
            raise ArgumentError(
                f"problem {problem.number:02d} ({problem.title}) is planned: it has no experiment yet. "
                "`transformer-problems list` shows what is measured."
            )
    return problems


def _planned(request: RunRequest, store: Store) -> Run:
    """The run; what it warns of, such as files left out of the user's own data, is told in a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        run = Run(request, store)
    for warning in caught:
        typer.echo(f"note: {warning.message}", err=True)
    return run


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot make this folder ({error.strerror}). Choose another --out.") from error


def _open_existing(folder: Path) -> Store:
    path = folder / "results.sqlite"
    if not path.exists():
        raise StoreError(f"no results in {folder}. Measure first: transformer-problems measure --out {folder}")
    return Store.open(path, read_only=True)


def _write(catalogue: Catalogue, store: Store, folder: Path) -> dict[int, ProblemSummary]:
    summaries = summaries_of(store, catalogue)
    records = {
        n: store.measurements(n, summary.scale, fingerprints={summary.environment.revision})
        for n, summary in summaries.items()
    }
    write_report(folder, catalogue, summaries, records)
    return summaries


def _show_progress(run: Run, catalogue: Catalogue) -> None:
    """A bar with time left on a terminal, a line a cell elsewhere."""
    console = Console(stderr=True)
    if not run.pending:
        return
    total, done, started = len(run.pending), 0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total, left="")
        for outcome in run.outcomes():
            if isinstance(outcome, CellProgress):
                ahead = done + outcome.fraction
            else:
                done += 1
                ahead = done
                _note_finished(outcome, done, total, console)
            elapsed = time.monotonic() - started
            left = f"about {_duration(elapsed / ahead * (total - ahead))} left" if ahead >= 1 else ""
            bar.update(task, description=_describe(outcome.cell, catalogue), completed=ahead, left=left)


def _note_finished(outcome: Done | Failed, done: int, total: int, console: Console) -> None:
    name = f"{outcome.cell.problem:02d} {outcome.cell.arm}, seed {outcome.cell.seed}"
    if isinstance(outcome, Failed):
        console.print(f"{name}: {outcome.reason}", style="red")
    elif not console.is_terminal:
        console.print(f"[{done}/{total}] {name}: {outcome.seconds:.1f} s", markup=False)


def _describe(cell: Cell, catalogue: Catalogue) -> str:
    return f"{cell.problem:02d} {catalogue.problem(cell.problem).title}: {cell.arm}, seed {cell.seed}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
