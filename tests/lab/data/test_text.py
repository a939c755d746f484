"""Text corpora: reproducible, split without leaks, and clear about what they cannot use."""

import platform
from collections import Counter

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.text import held_out_windows, load_text, sample_windows


def as_bytes(data):
    return bytes(data.tolist())


@pytest.fixture(scope="module")
def standard_library():
    return load_text()


def test_the_default_corpus_is_several_megabytes_of_python(standard_library):
    splits = standard_library
    assert splits.train.dtype == splits.valid.dtype == splits.test.dtype == torch.uint8
    assert len(splits.train) > 3_000_000
    assert platform.python_version() in splits.source
    assert b"def " in as_bytes(splits.train[:100_000])


def test_each_held_out_split_of_the_default_corpus_is_about_a_twentieth(standard_library):
    splits = standard_library
    total = len(splits.train) + len(splits.valid) + len(splits.test)
    for held_out in (splits.valid, splits.test):
        assert 0.05 * total <= len(held_out) <= 0.08 * total  # whole files: the last may overshoot


def test_the_default_corpus_is_the_same_on_every_call(standard_library):
    again = load_text()
    assert torch.equal(again.train, standard_library.train)
    assert torch.equal(again.valid, standard_library.valid)
    assert torch.equal(again.test, standard_library.test)


def test_a_file_is_cut_into_contiguous_ranges(tmp_path):
    text = bytes(1 + i % 255 for i in range(100_000))
    (tmp_path / "book.txt").write_bytes(text)
    splits = load_text(str(tmp_path / "book.txt"))  # a path may be text
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [90_000, 5_000, 5_000]
    assert as_bytes(torch.cat([splits.train, splits.valid, splits.test])) == text
    assert "book.txt" in splits.source


def test_no_file_of_a_directory_is_in_two_splits(tmp_path):
    (tmp_path / "inner").mkdir()
    for i in range(40):
        folder = tmp_path / "inner" if i % 2 else tmp_path
        (folder / f"{i}.txt").write_bytes(bytes([65 + i]) * 5_000)
    splits = load_text(tmp_path)
    letters = [Counter(as_bytes(part)) for part in (splits.train, splits.valid, splits.test)]
    for counter in letters:
        counter.pop(ord("\n"), None)
    assert sum(len(counter) for counter in letters) == 40
    assert all(count == 5_000 for counter in letters for count in counter.values())
    assert [len(counter) for counter in letters] == [36, 2, 2]


def test_names_alone_decide_the_split_of_equal_files(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        for i in range(20):
            (tmp_path / root / f"{i}.txt").write_bytes(bytes([65 + i]) * 5_000)
    one, two = load_text(tmp_path / "one"), load_text(tmp_path / "two")
    assert torch.equal(one.train, two.train) and torch.equal(one.test, two.test)


def test_three_files_are_enough_and_the_largest_trains(tmp_path):
    for name, size in (("a", 5_000), ("b", 90_000), ("c", 6_000)):
        (tmp_path / name).write_bytes(name.encode() * size)
    splits = load_text(tmp_path)
    assert as_bytes(splits.train) == b"b" * 90_000
    assert {len(splits.valid), len(splits.test)} == {5_000, 6_000}


def test_hidden_files_are_skipped(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 5_000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\0")
    (tmp_path / ".cache").write_bytes(b"\0")
    splits = load_text(tmp_path)
    assert set(as_bytes(splits.train)) <= set(b"x\n")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"path must be an existing text file or directory.*nowhere"):
        load_text(tmp_path / "nowhere")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ArgumentError, match="is empty"):
        load_text(tmp_path / "empty.txt")


def test_a_directory_without_files_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="holds none"):
        load_text(tmp_path)


def test_a_directory_of_empty_files_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ArgumentError, match="is empty"):
        load_text(tmp_path)


def test_binary_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.txt").write_text("text" * 50_000)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    for path in (tmp_path, tmp_path / "image.png"):
        with pytest.raises(ArgumentError, match=r"image\.png is binary"):
            load_text(path)


def test_short_texts_are_refused_with_the_size_of_the_shortest_split(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"x" * 10_000)
    with pytest.raises(ArgumentError, match=r"the shortest split of .* would hold 500"):
        load_text(tmp_path / "short.txt")
    with pytest.raises(ArgumentError, match="would hold 0"):
        load_text(tmp_path)


@pytest.mark.parametrize("length", [1, 63, 64, 97])
def test_random_windows_are_consecutive_and_reproducible(length):
    data = torch.arange(100, dtype=torch.uint8)
    windows = sample_windows(data, num=50, length=length, generator=torch.Generator().manual_seed(0))
    assert windows.shape == (50, length) and windows.dtype == torch.int64
    assert torch.equal(windows - windows[:, :1], torch.arange(length).expand(50, -1))
    again = sample_windows(data, num=50, length=length, generator=torch.Generator().manual_seed(0))
    assert torch.equal(windows, again)


def test_random_windows_reach_both_ends():
    data = torch.arange(10, dtype=torch.uint8)
    starts = sample_windows(data, num=500, length=7, generator=torch.Generator().manual_seed(0))[:, 0]
    assert set(starts.tolist()) == {0, 1, 2, 3}


def test_held_out_windows_are_evenly_spaced_from_end_to_end():
    windows = held_out_windows(torch.arange(100, dtype=torch.uint8), num=4, length=10)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[-1, -1] == 99
    assert windows.dtype == torch.int64


def test_held_out_windows_do_not_overlap_where_they_need_not():
    windows = held_out_windows(torch.arange(250, dtype=torch.uint8), num=7, length=35)
    assert len(set(windows.flatten().tolist())) == 7 * 35


def test_one_window_as_long_as_the_data():
    data = torch.arange(5, dtype=torch.uint8)
    assert held_out_windows(data, num=1, length=5).tolist() == [[0, 1, 2, 3, 4]]
    assert sample_windows(data, num=1, length=5, generator=torch.Generator()).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("num", "length", "message"), [(1, 6, "5 bytes"), (0, 2, "num"), (1, 0, "length"), (1.5, 2, "num")]
)
def test_impossible_windows_are_refused(num, length, message):
    data = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=message):
        held_out_windows(data, num=num, length=length)
    with pytest.raises(ArgumentError, match=message):
        sample_windows(data, num=num, length=length, generator=torch.Generator())
