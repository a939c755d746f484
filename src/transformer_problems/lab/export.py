"""Every measurement in a form that other programs read."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields

from transformer_problems.core.records import Cell, Environment, Measurement
from transformer_problems.lab.store import Store

COLUMNS = tuple(field.name for record in (Cell, Measurement, Environment) for field in fields(record))
"""Columns of an export, in order: the cell's, the measurement's, the environment's.

problem, arm, scale, seed, metric, unit, value, x, x_unit, repeat,
version, revision, python, torch, platform, processor, device, threads, dtype, date.
"""


def export_csv(store: Store) -> Iterator[str]:
    """Lines of a CSV table: a heading, then one measurement a line, newest result of each cell.

    Numbers have all their digits (reading them gives the same float), the others are nan, inf and -inf;
    x is empty where nothing was varied.
    """
    yield _csv_line(COLUMNS)
    for cell, environment, measurement in store.records():
        yield _csv_line((*astuple(cell), *astuple(measurement), *astuple(environment)))


def export_json(store: Store) -> Iterator[str]:
    """Lines of a JSON array: one object a measurement, newest result of each cell, keys as `COLUMNS`.

    JSON knows finite numbers only, so the others are the strings "NaN", "Infinity" and "-Infinity",
    which float() of Python and Number() of JavaScript understand; x is null where nothing was varied.
    """
    opening = "[\n"
    for cell, environment, measurement in store.records():
        row = asdict(cell) | asdict(measurement) | asdict(environment)
        yield opening + json.dumps({name: _json_value(value) for name, value in row.items()}, allow_nan=False)
        opening = ",\n"
    yield "[]\n" if opening == "[\n" else "\n]\n"


def _csv_line(values: tuple[object, ...]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
