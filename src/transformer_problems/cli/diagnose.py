"""The command that examines a checkpoint: findings as they are made, a report for people, one for programs."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from transformer_problems.catalogue import Problem, load_catalogue
from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.cli.json_files import write_json
from transformer_problems.cli.tables import named_problem
from transformer_problems.clinic.diagnose import begin, examine, finished, material_for
from transformer_problems.clinic.diagnosis import Description, Diagnosis, failing
from transformer_problems.clinic.treatment import treatable
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.findings import SEVERITIES, Finding, Severity
from transformer_problems.lab.device import DeviceChoice, resolve_device
from transformer_problems.report.diagnosis import write_diagnosis
from transformer_problems.report.formatting import format_amount, format_count

_STYLES: dict[Severity, str] = {
    "severe": "bold red",
    "mild": "yellow",
    "ok": "green",
    "not applicable": "dim",
    "not examined": "magenta",
}
_SHORT: dict[Severity, str] = {"not applicable": "-", "not examined": "?"}
_FEW_REMEDIES = 2
NARROW = 72  # columns: on fewer the last of four would be a ribbon of three words a line
_FOUND, _INTERRUPTED = 1, 130  # exit codes: a check-up failed or --fail-on found something; Ctrl-C, as the shell has it


@dataclass(frozen=True, slots=True)
class DiagnosisRequest:
    """What the user asked for."""

    model: str | None
    only: str | None
    data: Path | None
    device: DeviceChoice
    budget_s: float | None
    seed: int
    json_file: Path | None
    html_file: Path | None
    fail_on: Literal["mild", "severe"] | None
    allow_pickle: bool
    tokenizer: Path | None


def diagnose_model(request: DiagnosisRequest) -> None:
    """Examine a model and tell of it.

    Raises:
        Exit: With code 1, after all is told and written, if a check-up failed or --fail-on met a finding.
    """
    console = Console()
    problems = _chosen(request.only)
    for file in (request.json_file, request.html_file):
        require_writable(file)
    named = [file.resolve() for file in (request.json_file, request.html_file) if file is not None]
    if len(set(named)) < len(named):
        raise ArgumentError(f"--json and --html must name two files; got {request.json_file} twice. Rename one.")
    subject = load_subject(
        bundled("base") if request.model is None else request.model,
        device=resolve_device(request.device),
        allow_pickle=request.allow_pickle,
        tokenizer=request.tokenizer,
    )
    visit = Visit(subject, material_for(subject, request.data), request.seed)
    found, started = begin(visit), perf_counter()
    print_head(console, found.model, found.caution, visit)
    try:
        for finding in _with_progress(visit, problems, request.budget_s):
            found = found.with_finding(finding, perf_counter() - started)
            _print_finding(console, finding)
            write_json(request.json_file, found.to_json())
        found = finished(found)
    except KeyboardInterrupt:
        _keep(console, found, request, subject)
        sys.exit(_INTERRUPTED)
    _keep(console, found, request, subject)
    bad = failing(found.findings, request.fail_on) if request.fail_on else []
    if bad or (request.budget_s is None and found.count("not examined")):
        raise typer.Exit(_FOUND)


def _keep(console: Console, found: Diagnosis, request: DiagnosisRequest, subject: Subject) -> None:
    """Write and tell what was found, be it all that was asked for or what was finished when the user stopped it."""
    write_json(request.json_file, found.to_json())
    if request.html_file is not None:
        write_diagnosis(request.html_file, found, load_catalogue())
    _print_end(console, found, request)
    _print_hint(console, found, request, subject)


def _chosen(only: str | None) -> Sequence[Problem]:
    catalogue = load_catalogue()
    if only is None:
        return catalogue.problems
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise ArgumentError(f"--only must name problems, such as 01,07; got {only!r}.")
    return sorted({named_problem(catalogue, name) for name in names}, key=lambda problem: problem.number)


def require_writable(file: Path | None) -> None:
    """That a file, where one is named, can be written.

    Raises:
        OutputError: If it cannot.
    """
    if file is None:
        return
    if file.is_dir():
        raise OutputError(f"cannot write {file}: it is a folder. Name a file.")
    if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise OutputError(f"cannot write {file}: its folder is missing or may not be written to. Choose another.")


def _with_progress(visit: Visit, problems: Sequence[Problem], budget_s: float | None) -> Iterator[Finding]:
    """The findings; on a terminal, a line below them says what is being looked at."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        now = ""

        def begin_one(problem: Problem) -> None:
            nonlocal now
            now = f"{problem.number:02d} {problem.title.lower()}  ({problems.index(problem) + 1} of {len(problems)})"
            bar.update(task, description=now)

        def go_on(share: float) -> None:
            bar.update(task, description=f"{now}  {share:.0%}")

        yield from examine(replace(visit, progress=go_on), problems, budget_s=budget_s, on_start=begin_one)


def print_head(console: Console, model: Description, caution: str | None, visit: Visit) -> None:
    """Which model it is, where it runs, and what it is examined on."""
    facts = [model.architecture, f"{format_amount(model.num_parameters)} parameters", model.dtype]
    if model.trained_len is not None:
        facts.append(f"{model.trained_len:,} positions")
    device = visit.subject.device
    where = f"{device.type}, {format_count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
    console.print(Text.assemble((model.name, "bold"), f"  {', '.join(facts)}  ", (where, "dim")))
    console.print(Text(f"examined on {visit.material.source}", style="dim"))
    if caution is not None:
        console.print(Text(f"caution: {caution}", style="yellow"))


def _print_finding(console: Console, finding: Finding) -> None:
    title = load_catalogue().problem(finding.problem).title.lower()
    told = [Text.assemble("→ ", (remedy.solution, "bold"), f"  {remedy.promise}") for remedy in finding.remedies]
    word, style = _SHORT.get(finding.severity, finding.severity), _STYLES[finding.severity]
    meaning = Text(finding.meaning, "dim" if word == "-" else "")
    if console.width < NARROW:
        console.print(Text.assemble(f"{finding.problem:02d}  {title}  ", (word, style)))
        for line in (meaning, *told[:_FEW_REMEDIES]):
            console.print(Padding(line, (0, 0, 0, 4), expand=False))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=2)
    table.add_column(width=28, no_wrap=True)
    table.add_column(width=6)
    table.add_column(ratio=1)
    table.add_row(f"{finding.problem:02d}", title, Text(word, style), meaning)
    for line in told[:_FEW_REMEDIES]:
        table.add_row("", "", "", line)
    console.print(table)


def _print_end(console: Console, found: Diagnosis, request: DiagnosisRequest) -> None:
    counts = [f"{found.count(severity)} {severity}" for severity in SEVERITIES if found.count(severity)]
    console.print(f"\n{format_count(len(found.findings), 'check')}, {', '.join(counts)}      {found.seconds:.0f} s")
    if not found.complete:
        console.print("stopped before the end; the findings above are kept", style="yellow")
    for file in (request.html_file, request.json_file):
        if file is not None:
            console.print(f"wrote {file}", soft_wrap=True)
    if found.count("severe") or found.count("mild"):
        worst = found.worst_first()[0].problem
        console.print(f"read more: transformer-problems show {worst:02d}", style="dim")
    if request.html_file is None:
        console.print("with plots: add --html FILE", style="dim")


def _print_hint(console: Console, found: Diagnosis, request: DiagnosisRequest, subject: Subject) -> None:
    """How to try a remedy that can be applied to the model as it is."""
    solution = treatable(found.worst_first(), subject)
    if solution is not None:
        data = "" if request.data is None else f" --data {shlex.quote(str(request.data))}"
        model = shlex.quote(str(bundled("base") if request.model is None else request.model))
        told = f"try it: transformer-problems apply {solution} {model} --out DIR{data}"
        console.print(Text(told, style="dim"), soft_wrap=True)
