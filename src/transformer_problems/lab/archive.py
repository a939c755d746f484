"""Results as text files that a repository can hold: one CSV of measurements and one JSON of circumstances a problem."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast, get_args

from transformer_problems.core.errors import StoreCorruptedError
from transformer_problems.core.records import Cell, Environment, Measurement, Scale

_COLUMNS = ("arm", "seed", "metric", "unit", "x", "x_unit", "repeat", "value")


@dataclass(frozen=True, slots=True)
class Archive:
    """Everything that was measured of one problem at one scale."""

    problem: int
    scale: Scale
    environment: Environment
    records: tuple[tuple[Cell, Measurement], ...]
    failures: dict[Cell, str]

    def save(self, folder: Path, name: str) -> None:
        """Write NAME.csv and NAME.json."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for cell, m in self.records:
                x = "" if m.x is None else _shortest(m.x)
                writer.writerow((cell.arm, cell.seed, m.metric, m.unit, x, m.x_unit, m.repeat, f"{m.value:.7g}"))
        circumstances = {
            "problem": self.problem,
            "scale": self.scale,
            "environment": asdict(self.environment),
            "failures": [[cell.arm, cell.seed, reason] for cell, reason in self.failures.items()],
        }
        (folder / f"{name}.json").write_text(json.dumps(circumstances, indent=2) + "\n")


def load_archive(folder: Path, name: str) -> Archive | None:
    """What `Archive.save` wrote under that name, or None where there is nothing.

    Raises:
        StoreCorruptedError: If the files are not whole.
    """
    circumstances, table = folder / f"{name}.json", folder / f"{name}.csv"
    if not circumstances.exists():
        return None
    try:
        told = json.loads(circumstances.read_text())
        problem, scale = int(told["problem"]), cast("Scale", told["scale"])
        if scale not in get_args(Scale):
            raise ValueError(f"scale {scale!r}")
        with table.open(newline="") as file:
            records = tuple(_record(problem, scale, row) for row in csv.DictReader(file))
        failures = {Cell(problem, arm, scale, seed): reason for arm, seed, reason in told["failures"]}
        return Archive(problem, scale, Environment(**told["environment"]), records, failures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreCorruptedError(
            f"{circumstances} and {table.name} are not a whole archive ({error}). Restore them from version control."
        ) from error


def _record(problem: int, scale: Scale, row: dict[str, str]) -> tuple[Cell, Measurement]:
    cell = Cell(problem, row["arm"], scale, int(row["seed"]))
    x = float(row["x"]) if row["x"] else None
    return cell, Measurement(row["metric"], row["unit"], float(row["value"]), x, row["x_unit"], int(row["repeat"]))


def _shortest(x: float) -> str:
    return str(int(x)) if x == int(x) else repr(x)
