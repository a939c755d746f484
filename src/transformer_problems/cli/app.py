"""The commands and their options; each answers from the catalogue or hands on to the lab and the report."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from transformer_problems import __version__
from transformer_problems.catalogue import Problem, load_catalogue
from transformer_problems.core.errors import ArgumentError

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _folder(name: str | Path) -> Path:
    """A folder as an argument; an empty name, such as an unset variable gives, is not taken for the present one."""
    if not str(name):
        raise typer.BadParameter("the name of the folder is empty. Name one, such as report.")
    return Path(name)


class ScaleOption(StrEnum):
    quick = "quick"
    standard = "standard"
    full = "full"


class DeviceOption(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class FailOnOption(StrEnum):
    mild = "mild"
    severe = "severe"


class FormatOption(StrEnum):
    json = "json"
    csv = "csv"


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """See 18 limitations of Transformers measured on your own machine, each with its tested solutions."""
    if version:
        typer.echo(f"transformer-problems {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list")
def list_problems(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """List the 18 problems and their solutions, with the verdicts of the published measurements."""
    from transformer_problems.cli.tables import catalogue_table, problems_as_json

    catalogue = load_catalogue()
    if as_json:
        typer.echo(json.dumps(problems_as_json(catalogue), indent=2, ensure_ascii=False))
    else:
        catalogue_table(catalogue)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A problem's number (01) or slug (quadratic_complexity), or a solution's name (swin).")
    ],
) -> None:
    """Explain one problem and what each solution does, or one solution and what it does for each problem."""
    from transformer_problems.cli.tables import named_entry, show_problem, show_solution

    catalogue = load_catalogue()
    entry = named_entry(catalogue, name)
    if isinstance(entry, Problem):
        show_problem(catalogue, entry)
    else:
        show_solution(catalogue, entry)


@app.command()
def measure(
    problems: Annotated[
        list[str] | None, typer.Argument(help="Numbers or slugs; all that have an experiment if none is given.")
    ] = None,
    scale: Annotated[ScaleOption, typer.Option(help="quick: minutes; standard: the published one; full.")] = (
        ScaleOption.quick
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds an arm, if not the scale's own number.")] = None,
    device: Annotated[DeviceOption, typer.Option(help="auto takes a GPU where there is one.")] = DeviceOption.auto,
    out: Annotated[
        Path, typer.Option(parser=_folder, metavar="DIR", help="Folder for results, pictures and pages.")
    ] = Path("report"),
    data: Annotated[
        Path | None,
        typer.Option(
            parser=_folder,
            metavar="DIR",
            help="Your own images or recordings, for problem 05: a sub-folder of files for each class, or idx files.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what of --data would be left out or cut, rather than tell of it.")
    ] = False,
) -> None:
    """Measure problems and their solutions side by side on this machine, then draw what was measured.

    Stop it at any time; the same command goes on where it stopped.
    """
    from transformer_problems.cli.measure import measure_problems

    measure_problems(problems or [], scale.value, seeds, device.value, out, data, strict)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(parser=_folder, metavar="DIR", help="Folder that `measure` wrote.")],
) -> None:
    """Draw the pictures and pages of a folder again from its results."""
    from transformer_problems.cli.measure import redraw

    redraw(folder)


@app.command()
def diagnose(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint's folder or Hugging Face id; the bundled model if none is given."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="01,07", help="Numbers or slugs of problems; all by default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(parser=_folder, metavar="PATH", help="Your own text, or folder of texts or images.")
    ] = None,
    device: Annotated[DeviceOption, typer.Option(help="auto takes a GPU where there is one.")] = DeviceOption.auto,
    budget_s: Annotated[
        float | None, typer.Option(min=0.0, metavar="S", help="Begin no further check-up after so many seconds.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws: the same gives the same numbers, but for seconds.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=_folder, metavar="FILE", help="Write the findings for programs.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", parser=_folder, metavar="FILE", help="Write a page with plots.")
    ] = None,
    fail_on: Annotated[
        FailOnOption | None, typer.Option(help="Exit with code 1 if a finding is as bad as this or worse.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights from a pickle, as plain tensors only.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=_folder, metavar="DIR", help="Folder of the tokenizer, if not the model's.")
    ] = None,
) -> None:
    """Examine a real checkpoint for the 18 problems: what it suffers from, and what would help.

    Works offline, but for an id that is not on this machine. Never runs code that comes with a checkpoint.
    """
    from transformer_problems.cli.diagnose import DiagnosisRequest, diagnose_model

    diagnose_model(
        DiagnosisRequest(
            model,
            only,
            data,
            device.value,
            budget_s,
            seed,
            json_file,
            html_file,
            None if fail_on is None else fail_on.value,
            allow_pickle,
            tokenizer,
        )
    )


@app.command()
def apply(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="SOLUTION... MODEL",
            help="rope-scaling, quantization, kv-cache, in the order in which to apply them; then a checkpoint's "
            "folder or Hugging Face id.",
        ),
    ],
    out: Annotated[Path, typer.Option(parser=_folder, metavar="DIR", help="New folder for the treated checkpoint.")],
    data: Annotated[
        Path | None, typer.Option(parser=_folder, metavar="PATH", help="Your own text, or folder of texts or images.")
    ] = None,
    device: Annotated[DeviceOption, typer.Option(help="auto takes a GPU where there is one.")] = DeviceOption.auto,
    seed: Annotated[int, typer.Option(help="Of all draws: the same gives the same numbers, but for seconds.")] = 0,
    factor: Annotated[
        float | None,
        typer.Option(metavar="X", help="Of rope-scaling: how many times the trained length; 2 if not given."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=_folder, metavar="FILE", help="Write the receipt for programs.")
    ] = None,
    write_anyway: Annotated[
        bool, typer.Option("--write-anyway", help="Write the treated checkpoint even if it does not help.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights from a pickle, as plain tensors only.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=_folder, metavar="DIR", help="Folder of the tokenizer, if not the model's.")
    ] = None,
) -> None:
    """Treat a checkpoint, and prove what that did: quality kept, the problem eased, the folder read back alike.

    The treated checkpoint is written only if the treatment helps; else the exit code is 1.
    """
    from transformer_problems.cli.apply import TreatmentRequest, treat_model

    *solutions, model = names
    if not solutions:
        raise typer.BadParameter(
            f"a solution and then a model are needed, as in apply rope-scaling ./my-model; got {model}."
        )
    if Path(solutions[0]).exists():
        raise ArgumentError(f"solutions come first, and the model last; {solutions[0]} is a place on this disk.")
    treat_model(
        TreatmentRequest(
            tuple(solutions),
            model,
            out,
            data,
            device.value,
            seed,
            factor,
            json_file,
            write_anyway,
            allow_pickle,
            tokenizer,
        )
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(parser=_folder, metavar="DIR", help="Folder that `measure` wrote.")],
    format: Annotated[FormatOption, typer.Option("--format", help="Form of the output.")] = FormatOption.json,
) -> None:
    """Print every measurement of a folder, with its unit and environment."""
    from transformer_problems.cli.measure import export_results

    export_results(folder, format.value)
