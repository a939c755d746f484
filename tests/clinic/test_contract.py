"""Each clause of a treatment's contract can be kept and broken, and the verdict follows from them alone."""

from collections.abc import Iterator
from dataclasses import replace
from math import isinf

import pytest
import torch
from torch import nn

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.claims import CLAIMS
from transformer_problems.clinic.contract import Clause, _at_most, claimed, quality, read_back, verdict
from transformer_problems.clinic.excerpts import to_choose, to_judge
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval


@pytest.fixture(scope="module")
def visit() -> Visit:
    return Visit(load_subject(bundled("draft")), machines_texts())


def noisy(subject: Subject, size: float) -> Subject:
    """A copy with weights off by so many of their own spreads."""
    draws = torch.Generator().manual_seed(0)
    other = load_subject(bundled("draft")) if subject.name == "draft" else subject
    with torch.no_grad():
        for weight in other.model.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=draws)
                weight.add_((size * weight.float().std() * noise).to(weight.dtype))
    return other


def clause(name: str, state: str, change: str | None = None) -> Clause:
    none = exactly(0.0)
    return Clause(name, "", "1", none, none, none, "difference", "", state, 9, change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quality_state", "changes", "back", "word"),
    [
        ("kept", ["better"], "kept", "helps"),
        ("kept", ["better", "same"], "kept", "helps"),
        ("kept", ["same"], "kept", "no effect"),
        ("kept", ["not sure"], "kept", "inconclusive"),
        ("kept", ["same", "not sure"], "kept", "inconclusive"),
        ("kept", ["better", "worse"], "kept", "hurts"),
        ("broken", ["better"], "kept", "hurts"),
        ("not sure", ["better"], "kept", "inconclusive"),
        ("kept", ["better"], "broken", "inconclusive"),
    ],
)
def test_the_verdict(quality_state: str, changes: list[str], back: str, word: str) -> None:
    clauses = [
        clause("quality", quality_state),
        *(clause("claim", "kept", change) for change in changes),
        clause("read back", back),
    ]
    assert verdict(clauses) == word
    assert verdict(clauses, on_foreign_texts=True) == ("hurts" if word == "hurts" else "inconclusive")


@pytest.mark.parametrize(
    ("compare", "effect", "change", "state"),
    [
        ("difference", (-0.5, -0.6, -0.4), "better", "kept"),
        ("difference", (0.5, 0.4, 0.6), "worse", "broken"),
        ("difference", (0.0, -0.05, 0.05), "same", "broken"),
        ("difference", (-0.5, -1.0, 0.1), "not sure", "not sure"),
        ("ratio", (0.5, 0.4, 0.6), "better", "kept"),
        ("ratio", (1.5, 1.4, 1.6), "worse", "broken"),
        ("ratio", (1.0, 0.95, 1.05), "same", "broken"),
    ],
)
def test_a_claim_is_judged_by_its_whole_interval(
    compare: str, effect: tuple[float, float, float], change: str, state: str
) -> None:
    none = exactly(1.0)
    found = claimed(9, "loss", "nats", none, none, Interval(*effect), compare, 0.1)  # type: ignore[arg-type]
    assert (found.change, found.state) == (change, state)


def test_a_model_keeps_the_quality_of_itself(visit: Visit) -> None:
    found = quality(visit, visit)
    assert (found.state, found.effect) == ("kept", exactly(0.0))
    assert found.before == found.after


def test_spoilt_weights_break_the_quality(visit: Visit) -> None:
    found = quality(visit, replace(visit, subject=noisy(visit.subject, 1.0)))
    assert found.state == "broken"
    assert found.effect.low > 0.02


def test_weights_that_are_not_finite_break_the_quality(visit: Visit) -> None:
    found = quality(visit, replace(visit, subject=noisy(visit.subject, float("nan"))))
    assert found.state == "broken"
    assert isinf(found.effect.value)


def test_a_model_without_a_loss_is_held_to_the_likeness_of_its_answers(vision: Subject, images: Material) -> None:
    visit = Visit(vision, images)
    assert quality(visit, visit).state == "kept"
    with torch.no_grad():
        upside_down = _with_negated_head(vision)
    found = quality(visit, replace(visit, subject=upside_down))
    assert (found.compare, found.state) == ("likeness", "broken")
    assert found.effect.high == pytest.approx(-1.0)


def _with_negated_head(subject: Subject) -> Subject:
    from copy import deepcopy

    model = deepcopy(subject.model)
    head = model.get_submodule("classifier")
    assert isinstance(head, nn.Linear)
    head.weight.neg_()
    head.bias.neg_()
    return subject.with_model(model)


def test_another_model_in_the_folder_is_noticed(visit: Visit) -> None:
    assert read_back(visit, load_subject(bundled("draft"))).state == "kept"
    assert read_back(visit, noisy(visit.subject, 0.01)).state == "broken"


@pytest.mark.parametrize("problem", [4, 9, 13])
def test_a_claim_of_a_model_that_was_left_as_it_is_is_not_kept(problem: int, visit: Visit) -> None:
    found: Iterator[Clause] = CLAIMS[problem](visit, visit)
    assert {(one.change, one.state, one.problem) for one in found} == {("same", "broken", problem)}


@pytest.mark.parametrize(
    ("low", "high", "state"), [(-0.1, 0.02, "kept"), (-0.1, 0.03, "not sure"), (0.021, 1.0, "broken")]
)
def test_an_interval_across_the_limit_is_not_sure(low: float, high: float, state: str) -> None:
    assert _at_most(Interval(0.02, low, high), 0.02) == state


@pytest.mark.parametrize("characters", [10_000, 30_000, 2_000_000])
def test_settings_are_not_proved_on_the_texts_that_they_were_chosen_by(visit: Visit, characters: int) -> None:
    """Bytes are tokens here, and what they spell names its place, so no excerpt may share a piece with another."""
    text = "".join(f"{place:07d} " for place in range(characters // 8))
    short = replace(visit, material=Material("own", texts=(text,), own=True))
    chosen, judged = to_choose(short, 8, 128), to_judge(short, 8, 128)
    assert 4 <= len(chosen) == len(judged) <= 8
    pieces = [place for row in (*chosen.tolist(), *judged.tolist()) for place in bytes(row).decode().split()[1:-1]]
    assert len(pieces) == len(set(pieces))


def test_material_too_short_to_choose_and_to_judge_by_is_refused(visit: Visit) -> None:
    short = replace(visit, material=Material("own", texts=("word " * 300,), own=True))
    with pytest.raises(ArgumentError, match=r"about 2,048 tokens or more.* half of own gave 750"):
        to_judge(short, 8, 128)
