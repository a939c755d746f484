""".ts files of time series: unequal lengths, classes, and what breaks the format."""

from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.ts_file import load_ts

HEADER = """\
# A comment: with a colon
@problemName Vowels
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength false
@classLabel true ah oh
@data
"""
CASES = """\
1.5,2,-3e-1:4,5,6:oh

# another comment
7, 8:9,10:ah
11:12:oh
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "vowels.ts"
    file.write_text(text, encoding="utf-8")
    return file


def test_sequences_of_unequal_lengths_are_padded(tmp_path: Path) -> None:
    shares: list[float] = []
    vowels = load_ts(write(tmp_path, HEADER + CASES), progress=shares.append)
    assert vowels.class_names == ("ah", "oh")
    assert vowels.classes.tolist() == [1, 0, 1]
    expected = [[[1.5, 4], [2, 5], [-0.3, 6]], [[7, 9], [8, 10], [0, 0]], [[11, 12], [0, 0], [0, 0]]]
    assert torch.equal(vowels.features, torch.tensor(expected))
    assert vowels.key_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_one_dimension_without_being_announced(tmp_path: Path) -> None:
    series = load_ts(write(tmp_path, "@CLASSLABEL TRUE 1 2\n@DATA\n1,2,3:2\r\n4,5,6:1\r\n"))
    assert series.features.tolist() == [[[1], [2], [3]], [[4], [5], [6]]]
    assert series.classes.tolist() == [1, 0]
    assert series.key_mask.all()
    with pytest.raises(ArgumentError, match="in line 4 of .* it has 2 dimensions, not 1"):
        load_ts(write(tmp_path, "@classLabel true 1 2\n@data\n1,2,3:2\n4,5,6:7,8,9:1\n"))


def test_tabs_are_spaces_and_words_behind_data_are_passed_over(tmp_path: Path) -> None:
    text = (HEADER + CASES).replace("@dimensions 2", "@dimensions\t2").replace("true ah oh", "\ttrue\tah\toh")
    text = text.replace("@data", "@data\tfollows").replace("7, 8:9,10:ah", "7,\t8:9,10\t:\tah")
    found, expected = (
        load_ts(str(write(tmp_path, text))),
        load_ts(write(tmp_path, HEADER + CASES)),
    )  # a path may be text
    assert torch.equal(found.features, expected.features)
    assert (found.class_names, found.classes.tolist()) == (expected.class_names, expected.classes.tolist())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@data\n", "", "with a line @data; .* has none"),
        ("@timeStamps false", "@timeStamps true", "must be without timestamps; .* says @timestamps true"),
        ("@missing false", "@missing true", "must be without missing; .* says @missing true"),
        ("@classLabel true ah oh", "@classLabel false", "must list its classes, as in @classLabel true yes no"),
        ("@classLabel true ah oh", "@classLabel", "must list its classes"),
        ("@classLabel true ah oh", "@classLabel true", "must list its classes"),
        ("@classLabel true ah oh", "@targetLabel true", "must list its classes"),
        ("@dimensions 2", "@dimensions many", "@dimensions must be a whole number; .* says 'many'"),
        ("@dimensions 2", "@dimensions 3", "in line 10 of .* it has 2 dimensions, not 3"),
        ("@dimensions 2\n", "", None),
        (":oh", ":eh", "in line 10 of .* the class 'eh' is not among those of @classLabel"),
        ("2,-3e-1", "two,-3e-1", "in line 10 of .* could not convert string to float: 'two'"),
        ("2,-3e-1", "?,-3e-1", "in line 10 of .* could not convert string to float"),
        ("2,-3e-1", ",-3e-1", "in line 10 of .* could not convert string to float"),
        ("2,-3e-1", "NaN,-3e-1", "in line 10 of .* it holds a value that is not finite"),
        ("2,-3e-1", "1e99,-3e-1", "in line 10 of .* it holds a value that is not finite"),
        ("2,-3e-1", "2", "in line 10 of .* its dimensions have from 2 to 3 values, not one number"),
        ("7, 8:9,10:ah", "7,8:ah", "in line 13 of .* it has 1 dimensions, not 2"),
        ("7, 8:9,10:ah", "ah", "in line 13 of .* it has 0 dimensions, not 2"),
        ("@data", "@data\n@data", "in line 10 of .* the class '@data' is not among"),
        ("@missing false", "@timeStamps true", "in line 4 of .* @timestamps comes a second time. Fetch or mend it"),
        ("@missing false", "@classlabel true a", "in line 8 of .* @classlabel comes a second time"),
        ("@classLabel true ah oh", "@classLabel true ah oh ah", "must name each class once; .* repeats 'ah'. Remove"),
        (CASES, "", "path must be a .ts file with cases; .* has no line after @data"),
    ],
)
def test_what_breaks_the_format_is_one_clear_line(old: str, new: str, message: str | None, tmp_path: Path) -> None:
    text = HEADER + CASES
    assert old in text
    file = write(tmp_path, text.replace(old, new, 1))
    if message is None:  # the number of dimensions may be left out
        assert load_ts(file).features.shape == (3, 3, 2)
        return
    with pytest.raises(ArgumentError, match=message) as caught:
        load_ts(file)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="path must be an existing .ts file; got .*nowhere.ts"):
        load_ts(tmp_path / "nowhere.ts")
    with pytest.raises(ArgumentError, match="path must be an existing .ts file"):
        load_ts(tmp_path)
    (tmp_path / "x.ts").write_bytes(b"\xff\xfe\0\0")
    with pytest.raises(ArgumentError, match="path must be a .ts file, which is text; .*x.ts cannot be read"):
        load_ts(tmp_path / "x.ts")
    for text in ("", " \n\t\n"):
        with pytest.raises(
            ArgumentError, match="must be a .ts file with a header and cases; .*vowels.ts is empty. Fetch"
        ):
            load_ts(write(tmp_path, text))
