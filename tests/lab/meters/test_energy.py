"""Energy from counters planted in a folder, and the estimate from figures known on paper."""

from pathlib import Path

import pytest

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.energy import counted_energy, estimate_energy


def plant(folder: Path, name: str, energy_uj: int, largest: int = 10**9) -> Path:
    zone = folder / name
    zone.mkdir()
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{largest}\n")
    return zone


def spender(zones: list[Path], microjoules: int, largest: int = 10**9):
    def spend() -> None:
        for zone in zones:
            file = zone / "energy_uj"
            file.write_text(str((int(file.read_text()) + microjoules) % largest))

    return spend


def test_counters_of_all_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    packages = [plant(tmp_path, f"intel-rapl:{i}", 1000 * i) for i in range(2)]
    part = plant(tmp_path, "intel-rapl:0:0", 0)
    energy = counted_energy(spender([*packages, part], 250_000), min_time_s=0.01, counters=tmp_path)
    assert energy is not None
    assert (energy.energy_j, energy.source) == (pytest.approx(0.5), "counter")


def test_a_counter_that_begins_anew_is_followed(tmp_path: Path) -> None:
    zone = plant(tmp_path, "intel-rapl:0", 999_999, largest=1_000_000)
    calls = iter([True])

    def spend_once() -> None:
        if next(calls, False):
            spender([zone], 300_000, 1_000_000)()

    energy = counted_energy(spend_once, min_time_s=1e-9, counters=tmp_path)
    assert energy is not None
    assert energy.energy_j == pytest.approx(0.3)


def test_a_machine_without_counters_gives_none(tmp_path: Path) -> None:
    assert counted_energy(lambda: None, min_time_s=0.01, counters=tmp_path) is None


def test_the_estimate_adds_arithmetic_and_traffic() -> None:
    # a million multiply-adds of (3.7 + 0.9) pJ and a million times 8 bytes of 1.95 nJ
    energy = estimate_energy(flops=2e6, bytes_moved=8e6)
    assert (energy.energy_j, energy.source) == (pytest.approx(4.6e-6 + 1.95e-3), "estimate")
    assert estimate_energy(flops=2e6, bytes_moved=0, precision="int8").energy_j == pytest.approx(0.3e-6)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ArgumentError, match="bytes_moved"):
        estimate_energy(flops=1, bytes_moved=-1)
    with pytest.raises(ArgumentError, match="min_time_s"):
        counted_energy(lambda: None, min_time_s=0)
