"""The page of a diagnosis: one file that needs no network and no script."""

from pathlib import Path

from transformer_problems.catalogue import Catalogue
from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.clinic.diagnosis import Diagnosis
from transformer_problems.report.curves import draw_curve
from transformer_problems.report.story import render, write_text


def write_diagnosis(path: Path, diagnosis: Diagnosis, catalogue: Catalogue) -> None:
    """Write the page of a diagnosis to `path`."""
    entries = load_checkups()
    page = render(
        "diagnosis.html.j2",
        diagnosis=diagnosis,
        findings=diagnosis.worst_first(),
        problems={problem.number: problem for problem in catalogue.problems},
        questions={number: entry.question for number, entry in entries.items()},
        names={solution.slug: solution.name for solution in catalogue.solutions},
        charts={
            finding.problem: draw_curve(finding.curve, f"c{finding.problem:02d}")
            for finding in diagnosis.findings
            if finding.curve is not None
        },
        code={solution.slug: solution.code for solution in catalogue.solutions},
    )
    write_text(path, page)
