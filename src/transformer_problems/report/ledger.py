"""The records behind a page's numbers, as a file for programs and grouped for readers."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.report.formatting import format_number

Record = tuple[Cell, Measurement]
_MOST_VALUES = 12  # shown for one x and seed; a file beside the page holds all
_FIELDS = ("problem", "arm", "scale", "seed", "metric", "unit", "value", "x", "x_unit", "repeat")


@dataclass(frozen=True, slots=True)
class Entry:
    """The values of one arm's metric at one x with one seed, in the order of their repeats."""

    x: str
    seed: int
    values: tuple[str, ...]
    num_more: int


@dataclass(frozen=True, slots=True)
class Account:
    """All records of one arm's metric."""

    arm: str
    metric: str
    unit: str
    x_unit: str
    entries: tuple[Entry, ...]


def records_csv(records: Sequence[Record]) -> str:
    """Every record, one a line, numbers at full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for cell, m in records:
        x = "" if m.x is None else repr(m.x)
        writer.writerow(
            (cell.problem, cell.arm, cell.scale, cell.seed, m.metric, m.unit, repr(m.value), x, m.x_unit, m.repeat)
        )
    return text.getvalue()


def ledger(records: Sequence[Record]) -> list[Account]:
    """The records by arm and metric, then by x and seed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record[0].arm, record[1].metric), []).append(record)
    return [_account(arm, metric, group) for (arm, metric), group in groups.items()]


def _account(arm: str, metric: str, records: Sequence[Record]) -> Account:
    samples: dict[tuple[float | None, int], list[Measurement]] = {}
    for cell, measurement in records:
        samples.setdefault((measurement.x, cell.seed), []).append(measurement)
    entries = []
    for x, seed in sorted(samples, key=lambda key: (key[0] is not None, key[0] or 0.0, key[1])):
        values = [format_number(m.value, 4) for m in sorted(samples[x, seed], key=lambda m: m.repeat)]
        shown = tuple(values[:_MOST_VALUES])
        entries.append(Entry("" if x is None else f"{x:,.6g}", seed, shown, len(values) - len(shown)))
    first = records[0][1]
    return Account(arm, metric, first.unit, first.x_unit, tuple(entries))
