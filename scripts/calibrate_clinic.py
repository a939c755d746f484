"""Examine healthy models and copies made ill on purpose, and set the thresholds of the clinic by half of them.

    python scripts/calibrate_clinic.py            examine for each check-up that has no readings yet
    python scripts/calibrate_clinic.py 02 17      examine for these anew, and for no other

Readings go to results/clinic/NN_slug.csv as soon as a check-up is done; from all there are follow the catalogue's
thresholds.json, results/clinic/summary.json and docs/clinic.md. Nothing else should run meanwhile: some are times.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from transformer_problems.catalogue import Problem, load_catalogue
from transformer_problems.catalogue.checkups import CALIBRATED, load_checkups
from transformer_problems.checkpoints.checkup import Prepares
from transformer_problems.clinic.calibration import (
    WardResult,
    accuracy,
    calibrated,
    judged,
    load_results,
    ranges,
    save_results,
)
from transformer_problems.clinic.rounds import examine_ward, load_readings, save_readings
from transformer_problems.core.errors import TransformerProblemsError
from transformer_problems.core.records import Environment
from transformer_problems.lab.device import describe_environment
from transformer_problems.lab.fingerprint import code_fingerprint
from transformer_problems.problems import has_checkup, load_fault
from transformer_problems.report import write_ward_page

ROOT = Path(__file__).parents[1]
READINGS = ROOT / "results" / "clinic"
THRESHOLDS = ROOT / "src" / "transformer_problems" / "catalogue" / "thresholds.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help="numbers or names of problems to examine anew")
    default = Path(tempfile.gettempdir()) / "transformer-problems-ward"
    parser.add_argument("--ward", type=Path, default=default, help="where healthy models are kept once trained")
    options = parser.parse_args(arguments)
    catalogue, summary = load_catalogue(), READINGS / "summary.json"
    results, failed = load_results(summary), []
    known = {problem for problem in catalogue.problems if problem.number in results and _file(problem).exists()}
    anew = {catalogue.problem(name) for name in options.problems} or set(catalogue.problems) - known
    for problem in catalogue.problems:
        try:
            if problem in anew and has_checkup(problem):
                where = examine(problem, options.ward)
            elif problem in known:
                where = results[problem.number].environment
            else:
                continue
            results[problem.number] = settle(problem, where)
        except TransformerProblemsError as error:
            failed.append(f"{problem.folder}: {error}")
        save_results(results, summary)
    write_ward_page(results, catalogue, load_checkups(), ROOT / "docs")
    if failed:
        sys.exit("\n".join(failed))


def examine(problem: Problem, ward: Path) -> Environment:
    """Read the models for one problem, write that down, and say where it was read."""
    print(problem.folder, flush=True)
    readings = examine_ward(problem, ward, lambda name: print(f"  {name}", flush=True))
    save_readings(readings, _file(problem))
    return describe_environment(torch.device("cpu"), code_fingerprint(f"p{problem.folder}"))


def settle(problem: Problem, where: Environment) -> WardResult:
    """Set the thresholds that the readings of a check-up give, judge the readings by them, and sum up."""
    file = _file(problem)
    readings = load_readings(file)
    entry = load_checkups()[problem.number]
    thresholds = {metric: calibrated(readings, threshold) for metric, threshold in entry.thresholds.items()}
    known = json.loads(THRESHOLDS.read_text(encoding="utf-8"))
    ours = {m: {"mild": t.mild, "severe": t.severe} for m, t in thresholds.items() if t.source.startswith(CALIBRATED)}
    lines = [f"  {json.dumps(metric)}: {json.dumps(both)}" for metric, both in sorted({**known, **ours}.items())]
    THRESHOLDS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    load_checkups.cache_clear()
    readings = judged(readings, thresholds)
    save_readings(readings, file)
    halves = accuracy(readings, "calibration"), accuracy(readings, "report")
    fault = load_fault(problem)
    preparation = fault.preparation if isinstance(fault, Prepares) else ""
    return WardResult(problem.number, fault.name, preparation, where, *halves, ranges(readings))


def _file(problem: Problem) -> Path:
    return READINGS / f"{problem.folder}.csv"


if __name__ == "__main__":
    main()
