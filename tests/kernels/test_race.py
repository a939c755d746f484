"""Races are run once for each kind, keep the first way in doubt, and are seen by nobody."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from transformer_problems.core.errors import KernelBuildError
from transformer_problems.kernels import race
from transformer_problems.kernels.race import fastest, raced
from transformer_problems.lab.meters.flops import count_flops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_races_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_RACED", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Callable[[], None]]]:
    """Makes ways that take so many seconds by a clock that only they turn."""
    now_s = 0.0

    def takes(seconds: float) -> Callable[[], None]:
        def way() -> None:
            nonlocal now_s
            now_s += seconds

        return way

    monkeypatch.setattr(race, "_now", lambda device: now_s)
    return takes


@pytest.mark.parametrize(("other_s", "winner"), [(1.0, "first"), (0.9, "first"), (0.8, "other"), (2.0, "first")])
def test_another_way_needs_a_clear_lead(
    clock: Callable[[float], Callable[[], None]], other_s: float, winner: str
) -> None:
    ways = {"first": clock(1.0), "other": clock(other_s)}
    assert fastest(("kind",), lambda: ways, CPU) == winner
    assert raced() == {("kind",): pytest.approx({"first": 1.0, "other": other_s})}


def test_a_kind_is_raced_once() -> None:
    prepared: list[str] = []

    def prepare() -> dict[str, Callable[[], object]]:
        prepared.append("once")
        return {"only": lambda: None}

    assert [fastest(("a",), prepare, CPU), fastest(("a",), prepare, CPU), fastest(("b",), prepare, CPU)] == ["only"] * 3
    assert len(prepared) == 2


def test_a_way_that_cannot_be_had_loses() -> None:
    def missing() -> None:
        raise KernelBuildError("too small")

    assert fastest(("kind",), lambda: {"first": missing, "other": lambda: None}, CPU) == "other"
    assert raced()[("kind",)]["first"] == float("inf")


def test_meters_and_tracers_do_not_see_it() -> None:
    def prepare() -> dict[str, Callable[[], object]]:
        x = torch.ones(8, 8)
        return {"product": lambda: seen.append(type(x @ x))}

    seen: list[type] = []
    assert count_flops(lambda: fastest(("counted",), prepare, CPU)) == 0
    with FakeTensorMode():
        fastest(("faked",), prepare, CPU)
    assert set(seen) == {torch.Tensor}
