"""The figures that notes give for comparison are those that scripts/reference_lines.py computes."""

import importlib.util
import platform
from pathlib import Path

import pytest
import torch

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.text import TextSplits, load_text
from transformer_problems.lab.results import Results
from transformer_problems.problems import experiment_of

SPEC = importlib.util.spec_from_file_location(
    "reference_lines", Path(__file__).parents[1] / "scripts" / "reference_lines.py"
)
assert SPEC is not None
assert SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

TOLD = {
    "problem 4, continuations": (4, (True, True)),
    "problem 7, windows": (7, (False, True)),
    "problem 12, at 1x": (12, (True, True)),
    "problem 12, at longest": (12, (True, True)),
}


def notes_of(number: int) -> str:
    """What is told whatever was measured."""
    some = Results([(Cell(number, "any", "standard", 0), Measurement("any", "1", 1.0))])
    return " ".join(experiment_of(number).notes(some))


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the notes speak of this version's library")
@pytest.mark.parametrize("name", script.PREDICTED)
def test_notes_tell_the_tables_bits(name: str) -> None:
    number, shown = TOLD[name]
    figures = [
        f"{bits:.2f}" for bits, is_told in zip(script.reference_lines(load_text())[name], shown, strict=True) if is_told
    ]
    assert all(figure in notes_of(number) for figure in figures)


def test_tables_of_a_text_that_alternates() -> None:
    """Single bytes cost one bit, and pairs next to nothing: what is added to each count weighs little."""
    text = torch.tensor([1, 2], dtype=torch.uint8).repeat(500_000)
    for singles, pairs in script.reference_lines(TextSplits(text, text, text, "made up")).values():
        assert singles == pytest.approx(1, abs=0.01)
        assert pairs == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("prompt", "room"), [(8, 70), (10, 86), (32, 64)])
def test_the_plain_caches_peak_is_their_doubled_room(prompt: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer ends with this room; the last one to grow holds its old half, or the prompt, as well."""
    monkeypatch.setattr(script, "LENGTH", 64)
    token = 2 * script.HEADS * script.HEAD_DIM * 4
    peak = script.cache_peak(script.plain_caches, prompt)
    assert script.LAYERS * room * token <= peak <= (script.LAYERS + 0.5) * room * token + token


def test_pages_take_the_same_however_a_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LENGTH", 64)
    peaks = {script.cache_peak(script.paged_caches, prompt) for prompt in (10, 32)}
    assert len(peaks) == 1
