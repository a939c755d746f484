"""Results as text: what is saved comes back, and half an archive is refused."""

from pathlib import Path

import pytest

from transformer_problems.core.errors import StoreCorruptedError
from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.lab.archive import Archive, load_archive

ENVIRONMENT = Environment(
    "0.1.0", "abc", "3.11", "2.13", "Linux x86_64", "a processor", "cpu", 2, "float32", "2026-01-31"
)
CELL = Cell(1, "dense", "standard", 0)
ARCHIVE = Archive(
    1,
    "standard",
    ENVIRONMENT,
    (
        (CELL, Measurement("latency_s", "s", 0.125, 64.0, "tokens", 2)),
        (CELL, Measurement("parameters", "1", 1234.0)),
    ),
    {Cell(1, "flash", "standard", 1): "timed out after 60 s"},
)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    ARCHIVE.save(tmp_path, "01_quadratic_complexity")
    assert load_archive(tmp_path, "01_quadratic_complexity") == ARCHIVE


def test_nothing_is_none(tmp_path: Path) -> None:
    assert load_archive(tmp_path, "02_absent") is None


@pytest.mark.parametrize("damage", ["no table", "cut json", "strange scale", "not a number"])
def test_half_an_archive_is_refused(tmp_path: Path, damage: str) -> None:
    ARCHIVE.save(tmp_path, "x")
    table, circumstances = tmp_path / "x.csv", tmp_path / "x.json"
    match damage:
        case "no table":
            table.unlink()
        case "cut json":
            circumstances.write_text(circumstances.read_text()[:50])
        case "strange scale":
            circumstances.write_text(circumstances.read_text().replace("standard", "enormous"))
        case "not a number":
            table.write_text(table.read_text().replace("0.125", "fast"))
    with pytest.raises(StoreCorruptedError, match="Restore them from version control"):
        load_archive(tmp_path, "x")
