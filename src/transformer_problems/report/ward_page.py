"""The page of the check-ups in Markdown, for the repository's docs: what each reads, and how often it is right."""

from collections.abc import Mapping
from pathlib import Path

from transformer_problems.catalogue import Catalogue
from transformer_problems.catalogue.checkups import CheckupEntry
from transformer_problems.clinic.calibration import WardResult
from transformer_problems.core.findings import Threshold
from transformer_problems.core.records import Interval
from transformer_problems.report.figures import machine
from transformer_problems.report.formatting import format_count, format_number
from transformer_problems.report.story import render, write_text


def write_ward_page(
    results: Mapping[int, WardResult], catalogue: Catalogue, entries: Mapping[int, CheckupEntry], folder: Path
) -> Path:
    """Writes `clinic.md` into `folder`."""
    path = folder / "clinic.md"
    write_text(path, ward_page(results, catalogue, entries))
    return path


def ward_page(results: Mapping[int, WardResult], catalogue: Catalogue, entries: Mapping[int, CheckupEntry]) -> str:
    """The text of the page."""
    return render(
        "clinic.md.j2",
        checkups=[(catalogue.problem(number), entries[number], result) for number, result in sorted(results.items())],
        share=_share,
        limit=_limit,
        spread=_spread,
        machines=_machines(results),
    )


def _share(num: int, of: int, share: Interval) -> str:
    """ "14 of 14 (78% to 100%)"."""
    return f"{num} of {of} ({share.low:.0%} to {share.high:.0%})"


def _limit(value: float, threshold: Threshold) -> str:
    """From where on a reading is mild or severe: "1.2 s or more"."""
    return f"{_amount(value, threshold.unit)} or {'more' if threshold.better == 'lower' else 'less'}"


def _spread(values: Interval, threshold: Threshold) -> str:
    """ "0.2 to 0.4 s"."""
    low, high = format_number(values.low * _times(threshold.unit)), _amount(values.high, threshold.unit)
    return high if values.low == values.high else f"{low} to {high}"


def _amount(value: float, unit: str) -> str:
    number = format_number(value * _times(unit))
    return f"{number}%" if unit == "%" else number if unit == "1" else f"{number} {unit}"


def _times(unit: str) -> float:
    return 100 if unit == "%" else 1


def _machines(results: Mapping[int, WardResult]) -> str:
    """Where the readings were taken, one entry for each set-up."""
    told = {
        " · ".join(
            (machine(where), format_count(where.threads, "thread"), where.dtype, where.date, f"torch {where.torch}")
        ): None
        for where in (result.environment for _, result in sorted(results.items()))
    }
    return "; ".join(told)
