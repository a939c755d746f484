import csv
import io
import json
import math
from pathlib import Path

from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.lab.export import COLUMNS, export_csv, export_json
from transformer_problems.lab.store import Store

HERE = Environment(
    "0.1.0", "code-a", "3.11.7", "2.13.0", "Linux x86_64", "a CPU, fast", "cpu", 2, "float32", "2025-01-31"
)
CELL = Cell(9, "alibi", "quick", 1)
MEASUREMENTS = [
    Measurement("latency_s", "s", 0.1 + 0.2, x=64.0, x_unit="tokens", repeat=3),
    Measurement("bits_per_byte", "bits", math.nan),
    Measurement("perplexity", "1", math.inf),
    Measurement("effect", "1", -math.inf),
]


def filled(path: Path) -> Store:
    store = Store.open(path / "results.sqlite")
    store.finish(CELL, HERE, MEASUREMENTS, 1.0)
    return store


def test_columns_keep_their_documented_order() -> None:
    documented = (
        "problem arm scale seed metric unit value x x_unit repeat "
        "version revision python torch platform processor device threads dtype date"
    )
    assert tuple(documented.split()) == COLUMNS


def test_csv_holds_every_measurement_exactly(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        heading, *rows = csv.reader(io.StringIO("".join(export_csv(store))))
    assert tuple(heading) == COLUMNS
    assert rows[0][:10] == ["9", "alibi", "quick", "1", "latency_s", "s", "0.30000000000000004", "64.0", "tokens", "3"]
    assert rows[0][10:] == [str(getattr(HERE, name)) for name in COLUMNS[10:]]
    assert float(rows[0][6]) == MEASUREMENTS[0].value
    assert [row[6] for row in rows[1:]] == ["nan", "inf", "-inf"]
    assert rows[1][7] == ""


def test_json_holds_every_measurement_exactly_and_is_strict(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with filled(tmp_path) as store:
        rows = json.loads("".join(export_json(store)), parse_constant=refuse)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert rows[0]["value"] == MEASUREMENTS[0].value and rows[0]["x"] == 64 and rows[1]["x"] is None
    assert [row["value"] for row in rows[1:]] == ["NaN", "Infinity", "-Infinity"]
    assert float(rows[3]["value"]) == -math.inf
    assert rows[0]["processor"] == "a CPU, fast"


def test_a_store_without_results_exports_none(tmp_path: Path) -> None:
    with Store.open(tmp_path / "results.sqlite") as store:
        assert "".join(export_csv(store)) == ",".join(COLUMNS) + "\n"
        assert json.loads("".join(export_json(store))) == []
