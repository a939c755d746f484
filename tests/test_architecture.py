"""The house rules that a machine can check: floors, rooms, sizes, names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from transformer_problems.catalogue import load_catalogue
from transformer_problems.problems import has_experiment, load_experiment

PACKAGE = Path(__file__).parents[1] / "src" / "transformer_problems"
FLOORS = (
    "core",
    "kernels",
    "solutions",
    "models",
    "testing",
    "catalogue",
    "lab",
    "checkpoints",
    "problems",
    "clinic",
    "report",
    "cli",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))
CATALOGUE = load_catalogue()


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    return (
        FLOORS.index(parts[1]) if len(parts) > 1 and parts[0] == "transformer_problems" and parts[1] in FLOORS else None
    )


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(("transformer_problems", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own = floor_of(module_of(path))
    for imported in imports_of(path):
        floor = floor_of(imported)
        assert own is None or floor is None or floor <= own, f"{module_of(path)} imports {imported}, a floor above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "solutions").rglob("*.py")), ids=module_of)
def test_roles_meet_by_injection(path: Path) -> None:
    role = module_of(path).split(".")[2]
    for imported in imports_of(path):
        parts = imported.split(".")
        if imported == "transformer_problems.solutions.attention.dense":
            continue  # the baseline that every op stands in for
        if parts[:2] == ["transformer_problems", "solutions"] and len(parts) > 2:
            assert parts[2] == role, f"{module_of(path)} imports {imported}, of another role"


@pytest.mark.parametrize("path", sorted((PACKAGE / "problems").glob("p*/*.py")), ids=module_of)
def test_rooms_do_not_know_each_other(path: Path) -> None:
    own = module_of(path).split(".")[2]
    rooms = {i.split(".")[2] for i in imports_of(path) if i.startswith("transformer_problems.problems.p")}
    assert rooms <= {own}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_are_short_and_named_by_subject(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}
    assert len(path.read_text().splitlines()) <= 400


def test_every_problem_has_a_room_and_every_room_a_problem() -> None:
    rooms = {path.name for path in (PACKAGE / "problems").iterdir() if path.name.startswith("p") and path.is_dir()}
    assert rooms == {f"p{problem.folder}" for problem in CATALOGUE.problems}


@pytest.mark.parametrize("problem", CATALOGUE.problems, ids=lambda p: p.slug)
def test_experiment_and_catalogue_agree(problem) -> None:
    if not has_experiment(problem):
        assert all(pair.status == "planned" for pair in CATALOGUE.pairs(problem))
        return
    experiment = load_experiment(problem)
    assert experiment.problem == problem.number
    pairs = {pair.solution.slug: pair for pair in CATALOGUE.pairs(problem)}
    arms = experiment.arms
    assert len({arm.slug for arm in arms}) == len(arms)
    assert {arm.solution for arm in arms} - {None} == set(pairs), "arms and catalogue pairs differ"
    for slug, pair in pairs.items():
        assert sum(arm.lead for arm in arms if arm.solution == slug) == 1, f"{slug} needs exactly one leading arm"
        words = [e for e in experiment.gains if e.metric == pair.criterion.metric and e.at == pair.criterion.at]
        assert [e.compare for e in words] == [pair.criterion.compare], f"gains has no words for {slug}'s criterion"
    known = {arm.slug for arm in arms}
    assert {arm.baseline for arm in arms} - {None} <= known
    assert set(experiment.chart.draws) <= known


@pytest.mark.parametrize(
    "code", sorted({c for s in CATALOGUE.solutions for c in s.code}), ids=lambda c: c.rpartition(":")[2]
)
def test_catalogue_names_real_code(code: str) -> None:
    module, _, attribute = code.partition(":")
    found = getattr(importlib.import_module(f"transformer_problems.{module}"), attribute)
    assert found.__doc__
    assert "Source:" in found.__doc__, f"{attribute} does not name its source"


def test_public_names_resolve() -> None:
    import transformer_problems

    for name in transformer_problems.__all__:
        assert getattr(transformer_problems, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = transformer_problems.Nonsense


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "01"], ["--help"], ["measure", "--help"]])
def test_catalogue_commands_do_not_import_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from transformer_problems.cli import main; sys.argv[1:] = sys.argv[1:]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
