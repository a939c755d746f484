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
    """Every dotted name that a file imports; what is imported from a package may be a module of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path.name}:{node.lineno} imports relatively; write the whole name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(("transformer_problems", *path.relative_to(PACKAGE).with_suffix("").parts))


def foreign_roles(path: Path, role: str) -> set[str]:
    """Imports of solutions of other roles, but for the baseline that every op stands in for."""
    baseline = "transformer_problems.solutions.attention.dense"
    solutions = {name for name in imports_of(path) if name.startswith("transformer_problems.solutions.")}
    return {name for name in solutions if name.split(".")[2] != role and not f"{name}.".startswith(f"{baseline}.")}


def rooms_of(path: Path) -> set[str]:
    """The problem rooms that a file imports from."""
    return {name.split(".")[2] for name in imports_of(path) if name.startswith("transformer_problems.problems.p")}


@pytest.mark.parametrize(
    "line",
    [
        "import transformer_problems.solutions.position.rotary",
        "from transformer_problems.solutions.position.rotary import RotaryEmbedding",
        "from transformer_problems.solutions.position import rotary",
        "from transformer_problems.solutions import attention, position",
    ],
)
def test_an_import_of_another_role_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "solution.py").write_text(line)
    assert foreign_roles(tmp_path / "solution.py", "attention")
    (tmp_path / "solution.py").write_text("from transformer_problems.solutions.attention.dense import DenseAttention")
    assert not foreign_roles(tmp_path / "solution.py", "recurrence")


@pytest.mark.parametrize(
    "line", ["from transformer_problems.problems import p01_x", "from transformer_problems.problems.p01_x import y"]
)
def test_an_import_of_another_room_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "experiment.py").write_text(line)
    assert rooms_of(tmp_path / "experiment.py") == {"p01_x"}


@pytest.mark.parametrize("line", ["from . import position", "from ..position import rotary"])
def test_a_relative_import_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "solution.py").write_text(line)
    with pytest.raises(AssertionError, match="imports relatively"):
        imports_of(tmp_path / "solution.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own = floor_of(module_of(path))
    for imported in imports_of(path):
        floor = floor_of(imported)
        assert own is None or floor is None or floor <= own, f"{module_of(path)} imports {imported}, a floor above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "solutions").rglob("*.py")), ids=module_of)
def test_roles_meet_by_injection(path: Path) -> None:
    assert not foreign_roles(path, module_of(path).split(".")[2])


@pytest.mark.parametrize("path", sorted((PACKAGE / "problems").glob("p*/*.py")), ids=module_of)
def test_rooms_do_not_know_each_other(path: Path) -> None:
    assert rooms_of(path) <= {module_of(path).split(".")[2]}


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
        rule = pair.criterion
        words = [e for e in experiment.gains if (e.metric, e.at, e.against) == (rule.metric, rule.at, None)]
        assert [e.compare for e in words] == [rule.compare], f"gains has no words for {slug}'s criterion"
    known = {arm.slug for arm in arms}
    assert {arm.baseline for arm in arms} - {None} <= known
    assert {effect.against for effect in (*experiment.gains, *experiment.costs)} - {None} <= known
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


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["show", "01"], ["show", "swin"], ["--help"], ["measure", "--help"]]
)
def test_catalogue_commands_do_not_import_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from transformer_problems.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
