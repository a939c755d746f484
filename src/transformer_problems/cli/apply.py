"""The command that treats a checkpoint: what has to hold, clause by clause, and the treated folder where it helps."""

from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.treated import require_free
from transformer_problems.cli.diagnose import NARROW, print_head, require_writable
from transformer_problems.cli.json_files import write_json
from transformer_problems.clinic.contract import Clause, State, Verdict
from transformer_problems.clinic.diagnose import caution_of, describe, material_for
from transformer_problems.clinic.treat import Outcome, chosen_treatments, prove
from transformer_problems.clinic.treatment import Treatment, require_applicable
from transformer_problems.clinic.treatments.rope_scaling import RoPEScaling
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.records import Interval
from transformer_problems.lab.device import DeviceChoice, resolve_device
from transformer_problems.report.formatting import format_number

_STYLES: dict[State | Verdict, str] = {
    "kept": "green",
    "broken": "bold red",
    "not sure": "yellow",
    "helps": "bold green",
    "no effect": "yellow",
    "hurts": "bold red",
    "inconclusive": "yellow",
}
_NOT_WRITTEN = 1  # exit code where the verdict was not "helps", and nothing was to be written anyway


@dataclass(frozen=True, slots=True)
class TreatmentRequest:
    """What the user asked for."""

    solutions: tuple[str, ...]
    model: str
    out: Path
    data: Path | None
    device: DeviceChoice
    seed: int
    factor: float | None
    json_file: Path | None
    write_anyway: bool
    allow_pickle: bool
    tokenizer: Path | None


def treat_model(request: TreatmentRequest) -> None:
    """Treat a model, tell what came of it, and write it where that helps.

    Raises:
        Exit: With code 1, after all is told, if the treated model was not written.
    """
    console = Console()
    treatments = _with_factor(chosen_treatments(request.solutions), request.factor)
    require_free(request.out)
    require_writable(request.json_file)
    _keep_apart(request)
    subject = load_subject(
        request.model,
        device=resolve_device(request.device),
        allow_pickle=request.allow_pickle,
        tokenizer=request.tokenizer,
    )
    for treatment in treatments:
        require_applicable(treatment, subject)
    visit = Visit(subject, material_for(subject, request.data), request.seed)
    print_head(console, describe(subject), caution_of(visit), visit)
    with Console(stderr=True).status("") as status:  # drawn on a terminal alone
        outcome = prove(
            visit,
            treatments,
            out=request.out,
            write_anyway=request.write_anyway,
            on_clause=lambda clause: _print_clause(console, clause),
            on_step=status.update,
        )
    _print_end(console, outcome)
    write_json(request.json_file, outcome.receipt.to_json())
    if request.json_file is not None:
        console.print(f"wrote {request.json_file}", soft_wrap=True)
    if outcome.receipt.written is None:
        raise typer.Exit(_NOT_WRITTEN)


def _keep_apart(request: TreatmentRequest) -> None:
    """That nothing is written over, or into, what is read.

    Raises:
        OutputError: If it were.
    """
    source, data = Path(request.model).expanduser(), request.data
    places = {"--out": request.out, "--json": request.json_file}
    for option, place in places.items():
        if place is None:
            continue
        if source.is_dir() and place.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{option} must be outside of the model's folder; got {place}. Name another place.")
        if data is not None and data.exists() and place.resolve() == data.resolve():
            raise OutputError(f"{option} must not be what --data names; got {place}. Name another place.")
    if request.json_file is not None and request.json_file.resolve().is_relative_to(request.out.resolve()):
        raise OutputError(f"--json must be outside of --out, which is a folder of its own; got {request.json_file}.")


def _with_factor(treatments: list[Treatment], factor: float | None) -> list[Treatment]:
    if factor is None:
        return treatments
    if not any(isinstance(treatment, RoPEScaling) for treatment in treatments):
        raise ArgumentError(f"--factor is for rope-scaling, which is not asked for; got {factor:g}. Leave it out.")
    return [replace(one, factor=factor) if isinstance(one, RoPEScaling) else one for one in treatments]


def _print_clause(console: Console, clause: Clause) -> None:
    left = f"; what is left is {clause.left}" if clause.left in ("mild", "severe") else ""
    told = Text.assemble(clause.label, "  ", *_change(clause), (left, "yellow"), (f"   ({clause.rule})", "dim"))
    number = "" if clause.problem is None else f"{clause.problem:02d}"
    word = (clause.state, _STYLES[clause.state])
    if console.width < NARROW:
        console.print(Text.assemble(word, f"  {number}"))
        console.print(Padding(told, (0, 0, 0, 4), expand=False))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=8)
    table.add_column(width=2)
    table.add_column(ratio=1)
    table.add_row(Text(*word), number, told)
    console.print(table)


def _change(clause: Clause) -> tuple[str, ...]:
    """Before and after with the effect and its interval; where it was counted, without."""
    effect, unit = clause.effect, f" {clause.unit}" if clause.unit != "1" else ""
    if clause.before is None or clause.after is None:
        return (f"{_interval(effect, '.4g')}{unit}",)
    ends = f"{format_number(clause.before.value, 4)} → {format_number(clause.after.value, 4)}{unit}"
    if clause.compare == "ratio":
        return ends, f", {_interval(effect, '.2f')}x"
    return ends, f", {_interval(effect, '+.3f')}"


def _interval(value: Interval, form: str) -> str:
    middle = f"{value.value:{form}}"
    return middle if value.low == value.high else f"{middle} (95%: {value.low:{form}} to {value.high:{form}})"


def _print_end(console: Console, outcome: Outcome) -> None:
    receipt, record = outcome.receipt, outcome.subject.record
    for solution, settings in receipt.settings.items():
        if why := settings.get("why"):
            console.print(Text(f"{solution}: {why}", style="dim"))
    names = " and ".join(load_catalogue().solution(slug).name for slug in receipt.solutions)
    console.print(
        Text.assemble(f"\n{names}: ", (receipt.verdict, _STYLES[receipt.verdict]), f"      {receipt.seconds:.0f} s")
    )
    if receipt.on_foreign_texts and receipt.verdict == "inconclusive":
        console.print("these texts cannot tell more: see the caution above", style="yellow")
    if receipt.written is None:
        console.print("nothing was written; to write it all the same, add --write-anyway", style="yellow")
        return
    console.print(f"wrote {receipt.written}", soft_wrap=True)
    has_codes = record is not None and record.holds_codes
    reader = "transformer_problems.load_subject(FOLDER).model" if has_codes else "from_pretrained of transformers"
    for told in (f"load it: {reader}", f"examine it: transformer-problems diagnose {receipt.written}"):
        console.print(Text(told, style="dim"), soft_wrap=True)
