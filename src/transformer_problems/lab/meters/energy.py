"""How much energy a call takes: from the machine's counters where it has them, else an estimate that says so."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformer_problems.core.arguments import require_not_negative, require_positive

Source = Literal["counter", "estimate"]
Precision = Literal["float32", "int8"]

_COUNTERS = Path("/sys/class/powercap")

# Joules of an operation, at 45 nm and 0.9 V: Horowitz 2014, doi:10.1109/ISSCC.2014.6757323. A float32
# multiplication takes 3.7 pJ and an addition 0.9 pJ; an int8 multiplication 0.2 pJ and a 32-bit addition 0.1 pJ. Eight
# bytes from DRAM take 1.3 to 2.6 nJ, of which this is the middle.
_PER_FLOP: dict[Precision, float] = {"float32": 2.3e-12, "int8": 0.15e-12}
_PER_BYTE = 1.95e-9 / 8


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of one call, and whether a counter of the machine or an estimate says so."""

    energy_j: float
    source: Source


def estimate_energy(*, flops: float, bytes_moved: float, precision: Precision = "float32") -> Energy:
    """What the arithmetic and the traffic of a call would take on a 45 nm chip, if every byte came from main memory.

    A way to weigh arithmetic against traffic in one unit, not what this machine draws: caches make traffic cheaper, and
    newer chips make both cheaper, arithmetic more than traffic.

    Args:
        flops: Operations of multiplying and adding, a multiply-add being 2.
        bytes_moved: Read and written.
        precision: Of the multiplications.

    Raises:
        ArgumentError: If a count is negative.

    Source:
        Horowitz 2014, doi:10.1109/ISSCC.2014.6757323.
    """
    require_not_negative(flops=int(flops), bytes_moved=int(bytes_moved))
    return Energy(flops * _PER_FLOP[precision] + bytes_moved * _PER_BYTE, "estimate")


def counted_energy(
    function: Callable[[], object], *, min_time_s: float = 0.5, counters: Path = _COUNTERS
) -> Energy | None:
    """What one call takes by the processor's own counters (Intel and AMD's RAPL through Linux), or None without them.

    The function is called until `min_time_s` have passed. Counted is everything that the packages do meanwhile, other
    programs too. Not every machine has the counters, nor lets every user read them.

    Raises:
        ArgumentError: If `min_time_s` is not positive.
    """
    require_positive(min_time_s=min_time_s)
    zones = _readable_zones(counters)
    if not zones:
        return None
    before = [_microjoules(zone / "energy_uj") for zone in zones]
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < min_time_s:
        function()
        calls += 1
    spent = 0
    for zone, first in zip(zones, before, strict=True):
        passed = _microjoules(zone / "energy_uj") - first
        spent += passed if passed >= 0 else passed + _microjoules(zone / "max_energy_range_uj")  # it began anew
    return Energy(spent / 1e6 / calls, "counter")


def _readable_zones(counters: Path) -> list[Path]:
    """The folders of whole packages: intel-rapl:0, intel-rapl:1, ..., not of their parts, whose names go on."""
    found = []
    for zone in sorted(counters.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:
            try:
                _microjoules(zone / "energy_uj")
            except OSError:  # the counters of most machines are for the administrator alone
                continue
            found.append(zone)
    return found


def _microjoules(file: Path) -> int:
    return int(file.read_text())
