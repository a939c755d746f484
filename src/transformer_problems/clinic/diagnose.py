"""Examines a model for the 18 problems, one after the other."""

import ctypes
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
from torch import nn

from transformer_problems import __version__
from transformer_problems.catalogue import Problem, load_catalogue
from transformer_problems.catalogue.checkups import CheckupEntry, load_checkups
from transformer_problems.checkpoints.checkup import NeedsFloats, Visit
from transformer_problems.checkpoints.foreign import caution_about, require_known
from transformer_problems.checkpoints.loading import load_subject, subject_of
from transformer_problems.checkpoints.material import (
    Material,
    machines_images,
    machines_texts,
    own_images,
    own_texts,
)
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.diagnosis import Description, Diagnosis
from transformer_problems.core.errors import ArgumentError, TransformerProblemsError
from transformer_problems.core.findings import SEVERITIES, Examination, Finding, NotApplicable, Reading
from transformer_problems.lab.device import DeviceChoice, describe_environment, resolve_device
from transformer_problems.problems import has_checkup, load_checkup

_LOG = logging.getLogger(__name__)


def diagnose(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    *,
    data: Path | str | None = None,
    only: Collection[int] | None = None,
    device: DeviceChoice = "cpu",
    seed: int = 0,
    budget_s: float | None = None,
    on_finding: Callable[[Finding], None] | None = None,
) -> Diagnosis:
    """Examine a transformers model for the 18 problems.

    Args:
        model: A model of transformers in memory, a checkpoint's folder, or an id.
        tokenizer: Of a model of text in memory.
        data: A text file, a folder of them, or for a model of images a folder of images. Default what every machine
            has: the standard library's sources, or scikit-learn's two photographs.
        only: Numbers of problems. Default all.
        device: Of a checkpoint; a model in memory stays where it is.
        seed: Of all draws; the same seed gives the same numbers on one machine, but for seconds.
        budget_s: After so many seconds no further check-up begins.
        on_finding: Called with each finding as it is made.

    Raises:
        CheckpointError: If the model cannot be examined.
        ArgumentError: If there is no such problem, device or budget, or the data cannot be read.

    Example:
        >>> from transformer_problems import bundled, diagnose
        >>> found = diagnose(bundled("base"), only=[2])
        >>> found.findings[0].problem, found.findings[0].severity
        (2, 'ok')
    """
    problems = chosen_problems(only)
    if budget_s is not None and not (isinstance(budget_s, Real) and budget_s >= 0):
        raise ArgumentError(f"budget_s must be a number of seconds, zero or more; got {budget_s!r}.")
    if device not in get_args(DeviceChoice):
        raise ArgumentError(f"device must be one of {', '.join(get_args(DeviceChoice))}; got {device!r}.")
    if isinstance(model, nn.Module):
        subject = subject_of(model, tokenizer)
    else:
        subject = load_subject(model, device=resolve_device(device))
    visit = Visit(subject, material_for(subject, None if data is None else Path(data)), seed)
    found = begin(visit)
    started = perf_counter()
    for finding in examine(visit, problems, budget_s=budget_s):
        found = found.with_finding(finding, perf_counter() - started)
        if on_finding is not None:
            on_finding(finding)
    return finished(found)


def chosen_problems(only: Collection[int] | None) -> list[Problem]:
    """The problems of these numbers, all by default.

    Raises:
        ArgumentError: If there is none of a number.
    """
    problems = load_catalogue().problems
    numbers = [problem.number for problem in problems]
    if only is not None:
        if isinstance(only, str) or not isinstance(only, Collection) or not only:
            raise ArgumentError(f"only must be a list of numbers of problems, such as [2, 9]; got {only!r}.")
        if unknown := [number for number in only if number not in numbers]:
            raise ArgumentError(f"only must hold numbers of problems, 1 to {numbers[-1]}; got {unknown[0]!r}.")
    return [problem for problem in problems if only is None or problem.number in only]


def material_for(subject: Subject, data: Path | None) -> Material:
    """What a model of this kind is examined on.

    Raises:
        ArgumentError: If the user's data cannot be read, or the tokenizer does not know the texts.
    """
    if subject.kind == "image":
        return machines_images() if data is None else own_images(data)
    texts = machines_texts() if data is None else own_texts(data)
    require_known(subject, texts)
    return texts


def begin(visit: Visit) -> Diagnosis:
    """A diagnosis without findings yet."""
    subject = visit.subject
    environment = describe_environment(subject.device, __version__)
    return Diagnosis(describe(subject), visit.material.source, visit.seed, environment, caution=caution_of(visit))


def describe(subject: Subject) -> Description:
    """What there is to say of a model before it is examined."""
    return Description(
        name=subject.name,
        architecture=type(subject.model).__name__,
        kind=subject.kind,
        num_parameters=subject.num_parameters,
        weight_bytes=subject.weight_bytes,
        dtype=str(subject.dtype).removeprefix("torch."),
        trained_len=subject.trained_len,
        hard_limit=subject.hard_limit,
    )


def caution_of(visit: Visit) -> str | None:
    """What the reader has to know before the findings: of how the model was loaded, and of the texts."""
    try:
        of_texts = caution_about(visit)
    except TransformerProblemsError:  # material too short for this is told by each check-up that needs more
        of_texts = None
    return "; ".join(told for told in (visit.subject.caution, of_texts) if told) or None


def finished(found: Diagnosis) -> Diagnosis:
    """The diagnosis, every check-up asked for having ended."""
    return replace(found, complete=True)


def examine(
    visit: Visit,
    problems: Sequence[Problem],
    *,
    budget_s: float | None = None,
    on_start: Callable[[Problem], None] | None = None,
) -> Iterator[Finding]:
    """A finding for each problem, as it is made."""
    began = perf_counter()
    for problem in problems:
        if budget_s is not None and perf_counter() - began >= budget_s:
            yield Finding(problem.number, "not examined", f"the budget of {budget_s:g} s was used up before")
            continue
        if on_start is not None:
            on_start(problem)
        finding = _finding(visit, problem)
        _give_back_memory()
        yield finding


def _give_back_memory() -> None:
    """Hand freed memory back to the system: glibc keeps it, so that the check-ups' peaks would add up."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def judge(entry: CheckupEntry, examination: Examination, seconds: float = 0.0) -> Finding:
    """What an examination amounts to by the catalogue's thresholds."""
    readings = [
        Reading(value, threshold := entry.thresholds[metric], threshold.severity(value.value))
        for metric, value in examination.readings.items()
    ]
    readings.sort(key=lambda reading: SEVERITIES.index(reading.severity))
    severity = readings[0].severity
    remedies = sorted(examination.remedies, key=lambda remedy: -remedy.factor) if severity != "ok" else []
    return Finding(
        entry.problem,
        severity,
        examination.meaning,
        tuple(readings),
        tuple(remedies),
        examination.curve,
        examination.figures,
        seconds,
    )


def _finding(visit: Visit, problem: Problem) -> Finding:
    """One check-up's finding. What goes wrong in it is told in its place, and the others go on."""
    started = perf_counter()
    if not has_checkup(problem):
        return Finding(problem.number, "not examined", "there is no check-up for this problem yet")
    checkup = load_checkup(problem)
    if reason := checkup.not_for.get(visit.subject.kind):
        return Finding(problem.number, "not applicable", reason)
    if isinstance(checkup, NeedsFloats) and visit.subject.holds_codes:
        return Finding(problem.number, "not applicable", checkup.needs_floats)
    try:
        examination = checkup.examine(visit)
    except TransformerProblemsError as error:
        return Finding(problem.number, "not examined", str(error), seconds=perf_counter() - started)
    except torch.OutOfMemoryError:
        return Finding(problem.number, "not examined", "there was not enough memory for this check-up")
    except Exception as error:  # models come in more forms than were tried: told as a failure, never as a finding
        _LOG.debug("check-up %02d failed", problem.number, exc_info=True)
        told = str(error).strip().partition("\n")[0]
        return Finding(
            problem.number,
            "not examined",
            f"the check-up failed with {type(error).__name__}: {told}",
            seconds=perf_counter() - started,
        )
    seconds = perf_counter() - started
    if isinstance(examination, NotApplicable):
        return Finding(problem.number, "not applicable", examination.reason, seconds=seconds)
    return judge(load_checkups()[problem.number], examination, seconds)
