"""Excerpts name their package, the same at every call, and no file is both learned from and tested on."""

import sysconfig
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.excerpts import PACKAGES, SOURCE_PACKAGES, load_excerpts, load_unlabelled

NUM_FILES, FILE_BYTES = 20, 1000
PLANTED = ("first", "second")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library of two packages whose every file repeats a letter of its own; the first file of each is the largest."""
    for package, first_letter in zip(PLANTED, (40, 150), strict=True):
        (tmp_path / package / "inner").mkdir(parents=True)
        for i in range(NUM_FILES):
            folder = tmp_path / package / ("inner" if i % 2 else "")
            (folder / f"{i}.py").write_bytes(bytes([first_letter + i]) * (FILE_BYTES + (i == 0)))
        for name in ("test", "tests"):
            (tmp_path / package / name).mkdir()
            (tmp_path / package / name / "a.py").write_bytes(b"\xff" * 9000)
        (tmp_path / package / "notes.txt").write_bytes(b"\xff" * 9000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})


def letters(tokens: torch.Tensor) -> set[int]:
    return set(tokens.flatten().tolist()) - {ord("\n")}


def planted_letters(*, is_test: bool) -> tuple[set[int], set[int]]:
    """What each package shows in so many excerpts that no file is missed."""
    excerpts = load_excerpts(PLANTED, length=3, num=4000, is_test=is_test)
    first, second = (letters(excerpts.tokens[excerpts.classes == c]) for c in (0, 1))
    return first, second


@pytest.mark.usefixtures("planted")
def test_no_file_is_in_training_and_test_both() -> None:
    for train, test, first_letter in zip(
        planted_letters(is_test=False), planted_letters(is_test=True), (40, 150), strict=True
    ):
        assert not train & test
        assert train | test == set(range(first_letter, first_letter + NUM_FILES))  # tests and notes are left out
        assert first_letter in train  # the largest file
        assert len(test) == 5  # a fifth of 20,001 bytes is just more than four files


@pytest.mark.usefixtures("planted")
def test_unlabelled_text_is_all_but_the_files_of_the_test() -> None:
    unlabelled = load_unlabelled(PLANTED)
    assert unlabelled.dtype == torch.uint8
    assert letters(unlabelled) == set.union(*planted_letters(is_test=False))


def test_real_test_excerpts_are_not_in_the_unlabelled_text() -> None:
    text = bytes(load_unlabelled((*PACKAGES, *SOURCE_PACKAGES)).tolist())
    assert len(text) > 1_000_000
    tested = load_excerpts(PACKAGES, length=128, num=300, is_test=True).tokens.tolist()
    assert sum(bytes(row) in text for row in tested) < 0.05 * 300  # licences alone stand in many files
    trained = load_excerpts(PACKAGES, length=128, num=100, is_test=False).tokens.tolist()
    assert all(bytes(row) in text for row in trained)


@pytest.mark.parametrize("length", [1, 63, 64, 97, 100])
def test_excerpts_are_bytes_of_the_length_asked_for_as_many_from_each_package(length: int) -> None:
    excerpts = load_excerpts(PACKAGES, length=length, num=50, is_test=True)
    assert excerpts.tokens.shape == (50, length)
    assert excerpts.tokens.dtype == excerpts.classes.dtype == torch.int64
    assert excerpts.tokens.min() >= 0
    assert excerpts.tokens.max() < 256
    assert excerpts.classes.bincount().tolist() == [10] * 5
    assert excerpts.classes.tolist() != sorted(excerpts.classes.tolist())  # in random order


def test_every_call_gives_the_same_and_training_is_not_test() -> None:
    once, again = (load_excerpts(PACKAGES, length=64, num=20, is_test=False) for _ in range(2))
    assert torch.equal(once.tokens, again.tokens)
    assert torch.equal(once.classes, again.classes)
    assert not torch.equal(once.tokens, load_excerpts(PACKAGES, length=64, num=20, is_test=True).tokens)


def test_the_two_tasks_share_no_package() -> None:
    assert len({*PACKAGES, *SOURCE_PACKAGES}) == 10


@pytest.mark.parametrize("num", [0, 7])
def test_a_number_that_is_no_multiple_of_the_packages_is_refused(num: int) -> None:
    with pytest.raises(ArgumentError, match=r"num must be .*; got"):
        load_excerpts(PACKAGES, length=10, num=num, is_test=True)


def test_an_unknown_package_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"'nonsense' has no modules in .*asyncio"):
        load_excerpts(("nonsense",), length=10, num=1, is_test=True)


@pytest.mark.usefixtures("planted")
def test_excerpts_longer_than_the_text_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"length must be at most the 5004 bytes"):  # five files, four line breaks
        load_excerpts(PLANTED, length=6000, num=2, is_test=True)
