"""What a run says of the problems that it could not measure."""

from dataclasses import replace
from pathlib import Path

from transformer_problems.core.records import Cell, Environment
from transformer_problems.lab.runner import Run, RunRequest
from transformer_problems.lab.store import Store
from transformer_problems.problems import experiment_of

ROOMS = {2: "p02_no_positional_awareness", 4: "p04_slow_decoding"}
HERE = Environment("0.1.0", "", "3.11.7", "2.13.0", "Linux x86_64", "a CPU", "cpu", 2, "float32", "2025-01-31")


def test_a_problem_without_its_baseline_is_not_measured(tmp_path: Path) -> None:
    request = RunRequest(ROOMS, experiment_of, "quick", "cpu", tmp_path, seeds=2)
    with Store.open(request.store_path) as store:
        run = Run(request, store)
        cells = {number: [cell for cell in run.planned if cell.problem == number] for number in ROOMS}

        def put(cell: Cell, failure: str = "") -> None:
            environment = replace(HERE, revision=run.fingerprints[cell.problem])
            if failure:
                store.fail(cell, environment, failure)
            else:
                store.finish(cell, environment, [], 1.0)

        for cell in run.planned:
            put(cell, f"no {cell.arm} {cell.seed}")
        failed = {number: f"failed: no {of_problem[0].arm} 0" for number, of_problem in cells.items()}
        assert run.unmeasured() == {number: f"every arm {reason}" for number, reason in failed.items()}
        put(cells[2][1])
        assert run.unmeasured() == {2: f"its baseline {failed[2]}", 4: f"every arm {failed[4]}"}
        put(cells[4][0])
        assert run.unmeasured() == {2: f"its baseline {failed[2]}"}
        put(cells[2][0])
        assert run.unmeasured() == {}  # though others failed
