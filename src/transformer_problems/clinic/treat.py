"""Applies solutions to a checkpoint, proves what they did, and writes the treated one where they help."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from torch import nn

from transformer_problems import __version__
from transformer_problems.catalogue import Problem, load_catalogue
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.foreign import caution_about
from transformer_problems.checkpoints.loading import load_subject, subject_of
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.checkpoints.treated import finish, require_free, unfinished_folder, write_treated
from transformer_problems.clinic.claims import CLAIMS
from transformer_problems.clinic.contract import Clause, quality, read_back, verdict
from transformer_problems.clinic.diagnose import caution_of, describe, examine, material_for
from transformer_problems.clinic.receipts import Receipt
from transformer_problems.clinic.treatment import Treatment, applied, load_treatment
from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.device import DeviceChoice, describe_environment, resolve_device
from transformer_problems.problems import load_checkup


@dataclass(frozen=True, slots=True)
class Outcome:
    """A treated copy, and the proof of what the treatment did."""

    subject: Subject
    receipt: Receipt


def treat(
    model: nn.Module | str | Path,
    solutions: Sequence[str | Treatment],
    tokenizer: Any = None,
    *,
    out: Path | str | None = None,
    data: Path | str | None = None,
    device: DeviceChoice = "cpu",
    seed: int = 0,
    write_anyway: bool = False,
) -> Outcome:
    """Apply solutions to a transformers model and measure, before and after, what they did.

    Args:
        model: A model of transformers in memory, a checkpoint's folder, or an id; it stays as it was.
        solutions: Slugs such as "rope-scaling", or treatments with settings of their own, in order.
        tokenizer: Of a model of text in memory.
        out: A new folder for the treated checkpoint, written if the verdict is "helps". Default none.
        data: A text file, a folder of them, or of images. Default what every machine has.
        device: Of a checkpoint; a model in memory stays where it is.
        seed: Of all draws.
        write_anyway: Write whatever the verdict.

    Raises:
        CheckpointError: If the model cannot be examined.
        ArgumentError: If there is no such solution, it cannot be applied to this model, or the data cannot be read.
        OutputError: If `out` exists or cannot be written.

    Example:
        >>> from transformer_problems import bundled, treat
        >>> outcome = treat(bundled("draft"), ["quantization"])
        >>> outcome.receipt.clauses[0].state
        'kept'
    """
    if device not in get_args(DeviceChoice):
        raise ArgumentError(f"device must be one of {', '.join(get_args(DeviceChoice))}; got {device!r}.")
    treatments = chosen_treatments(solutions)
    if out is not None and not isinstance(out, str | Path):
        raise ArgumentError(f"out must be the path of a new folder; got {out!r}. Leave it out to write nothing.")
    target = None if out is None else Path(out)
    if target is not None:
        require_free(target)
    if isinstance(model, nn.Module):
        subject = subject_of(model, tokenizer)
    else:
        subject = load_subject(model, device=resolve_device(device))
    visit = Visit(subject, material_for(subject, None if data is None else Path(data)), seed)
    return prove(visit, treatments, out=target, write_anyway=write_anyway)


def chosen_treatments(solutions: Sequence[str | Treatment]) -> list[Treatment]:
    """The treatments of these solutions, in order.

    Raises:
        ArgumentError: If there is none, one is named twice, or it cannot be applied to a checkpoint.
    """
    if isinstance(solutions, str) or not solutions:
        raise ArgumentError(
            f"solutions must be a list of one solution or more, as ['rope-scaling']; got {solutions!r}."
        )
    if strange := next((one for one in solutions if not isinstance(one, str) and not hasattr(one, "claims")), None):
        raise ArgumentError(f"solutions must be names or treatments, as 'rope-scaling'; got {strange!r}.")
    found = [load_treatment(one) if isinstance(one, str) else one for one in solutions]
    slugs = [treatment.solution for treatment in found]
    if twice := next((slug for slug in slugs if slugs.count(slug) > 1), None):
        raise ArgumentError(f"solutions must name each once; {twice} is named {slugs.count(twice)} times.")
    return found


def prove(
    visit: Visit,
    treatments: Sequence[Treatment],
    *,
    out: Path | None = None,
    write_anyway: bool = False,
    on_clause: Callable[[Clause], None] = lambda clause: None,
    on_step: Callable[[str], None] = lambda told: None,
) -> Outcome:
    """See `treat`.

    Args:
        on_clause: Called with each clause as it is measured.
        on_step: Called with what is done next.
    """
    started = perf_counter()
    after = visit
    for treatment in treatments:
        on_step(f"applying {treatment.solution}")
        after = applied(treatment, after)
    on_step("measuring before and after")
    problems = _claimed_problems(visit.subject, treatments)
    clauses = []
    with unfinished_folder(out) as folder:
        write_treated(after.subject, folder)
        for clause in _clauses(visit, after, problems, folder):
            clauses.append(clause)
            on_clause(clause)
        is_foreign = caution_about(visit) is not None
        word = verdict(clauses, on_foreign_texts=is_foreign)
        on_step("examining for the problems it is to ease")
        before_found, after_found = (tuple(examine(each, problems)) for each in (visit, after))
        written = out is not None and (word == "helps" or write_anyway)
        if written and out is not None:
            finish(folder, out)
    record = after.subject.record
    steps = record.steps[-len(treatments) :] if record is not None else ()
    receipt = Receipt(
        model=describe(visit.subject),
        treated=describe(after.subject),
        solutions=tuple(step.solution for step in steps),
        settings={step.solution: step.settings for step in steps},
        material=visit.material.source,
        seed=visit.seed,
        clauses=tuple(clauses),
        verdict=word,
        on_foreign_texts=is_foreign,
        findings_before=before_found,
        findings_after=after_found,
        environment=describe_environment(visit.subject.device, __version__),
        seconds=perf_counter() - started,
        written=str(out) if written else None,
        caution=caution_of(visit),
    )
    return Outcome(after.subject, receipt)


def _clauses(before: Visit, after: Visit, problems: Sequence[Problem], folder: Path) -> Iterator[Clause]:
    yield quality(before, after)
    for problem in problems:
        yield from CLAIMS[problem.number](before, after)
    yield read_back(after, load_subject(folder, device=after.subject.device))


def _claimed_problems(subject: Subject, treatments: Sequence[Treatment]) -> list[Problem]:
    """What the treatments are to ease, of problems that a model of this kind can have."""
    numbers = sorted({number for treatment in treatments for number in treatment.claims})
    problems = [load_catalogue().problem(number) for number in numbers]
    return [problem for problem in problems if subject.kind not in load_checkup(problem).not_for]
