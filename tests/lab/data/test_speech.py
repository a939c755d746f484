"""The speech features are as documented, come from the package's files alone, and their lack is one clear error."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, MissingDependencyError
from transformer_problems.lab.data.speech import NUM_FEATURES, NUM_SPEAKERS, load_japanese_vowels

needs_speech = pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None, reason="the package aeon, which carries the speech, is not installed"
)
FILE = """\
@dimensions 2
@classLabel true 1 2
@data
1,2,3:4,5,6:2
7:8:1
"""


def install(patch: pytest.MonkeyPatch, spec: ModuleSpec | None) -> None:
    """Makes this what is found where the package should be."""
    patch.setattr(importlib.util, "find_spec", lambda name: spec if name == "aeon" else None)


@needs_speech
def test_there_are_as_many_utterances_as_documented() -> None:
    train, test = load_japanese_vowels("TRAIN"), load_japanese_vowels("TEST")
    assert (len(train.classes), len(test.classes)) == (270, 370)
    for split in (train, test):
        assert split.features.shape == (*split.key_mask.shape, NUM_FEATURES)
        assert split.classes.unique().tolist() == list(range(NUM_SPEAKERS)) == list(range(len(split.class_names)))
    assert (NUM_FEATURES, NUM_SPEAKERS) == (12, 9)
    assert train.classes.bincount().tolist() == [30] * NUM_SPEAKERS  # as its source says
    lengths = torch.cat([train.key_mask.sum(dim=1), test.key_mask.sum(dim=1)])
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)


@needs_speech
def test_utterances_are_padded_with_zeros_behind() -> None:
    for split in (load_japanese_vowels("TRAIN"), load_japanese_vowels("TEST")):
        assert torch.equal(split.key_mask, split.key_mask.cummin(dim=1).values)
        assert torch.equal(split.key_mask, split.features.abs().amax(dim=2) > 0)  # no real frame is silent
        assert bool(split.features.isfinite().all())


@needs_speech
def test_no_utterance_is_in_both() -> None:
    rows = [
        {tuple(row[mask].flatten().tolist()) for row, mask in zip(split.features, split.key_mask, strict=True)}
        for split in (load_japanese_vowels("TRAIN"), load_japanese_vowels("TEST"))
    ]
    assert not rows[0] & rows[1]
    assert [len(part) for part in rows] == [270, 370]  # nor twice in one


@needs_speech
def test_none_of_the_packages_code_runs() -> None:
    load_japanese_vowels("TEST")
    assert not any(name.partition(".")[0] == "aeon" for name in sys.modules)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_the_file_of_the_split_is_read_where_the_package_is(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (folder / f"JapaneseVowels_{split}.ts").write_text(FILE, encoding="utf-8")
    spec = ModuleSpec("aeon", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path))
    install(monkeypatch, spec)
    read = load_japanese_vowels(split)  # type: ignore[arg-type]
    assert read.classes.tolist() == [1, 0]
    assert read.features.tolist() == [[[1, 4], [2, 5], [3, 6]], [[7, 8], [0, 0], [0, 0]]]
    with pytest.raises(ArgumentError, match=r"path must be an existing .ts file; got .*JapaneseVowels_T\w+.ts"):
        load_japanese_vowels("TEST" if split == "TRAIN" else "TRAIN")


@pytest.mark.parametrize("spec", [None, ModuleSpec("aeon", None)], ids=["nothing", "a module that is no package"])
def test_without_the_package_the_error_says_what_to_install(
    spec: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, spec)
    message = (
        r"package aeon, which is not installed\. .*: pip install 'transformer-problems\[speech\]'; .*: "
        "pip install --no-deps aeon$"
    )
    with pytest.raises(MissingDependencyError, match=message) as caught:
        load_japanese_vowels("TRAIN")
    assert "\n" not in str(caught.value)
