"""What the catalogue holds: problems, solutions, and pairs of the two with what is claimed and what was measured."""

from dataclasses import dataclass
from typing import Literal

from transformer_problems.core.errors import UnknownNameError
from transformer_problems.core.records import Scale, VerdictWord

Role = Literal[
    "attention",
    "position",
    "recurrence",
    "memory",
    "tokens",
    "residual",
    "normalization",
    "decoding",
    "training",
    "adaptation",
    "compression",
    "interpretability",
    "deployment",
]


@dataclass(frozen=True, slots=True)
class Reference:
    """A publication.

    Args:
        id: "arXiv:1706.03762", "doi:10.1145/...", an https address, or a venue with its year ("EMNLP 2016").
    """

    title: str
    authors: str
    year: int
    id: str


@dataclass(frozen=True, slots=True)
class Criterion:
    """What decides between helps, no effect and hurts, written before any run.

    Args:
        text: The rule in words.
        metric: The metric it reads; empty where the problem has no experiment yet, and then only `text` counts.
        at: The x it reads the metric at; "last" is the largest measured, None a metric measured once.
        compare: "ratio" or "difference" of treated to baseline.
        margin: How far from no change the whole interval must lie; for ratios, beyond 1 + margin or its inverse.
        promise: A metric that arms record which promise an unchanged output; empty where nothing is promised.
        promise_limit: The largest value that keeps the promise. An arm beyond it hurts, whatever it gains.
        quality: A metric that must hold, such as accuracy, read at the x of `at` where it is measured along something;
            empty where only `metric` counts.
        quality_better: Which way of it is good.
        quality_loss: How much of it may be lost. An arm that surely loses more hurts, whatever it gains; one that may
            have lost more is inconclusive at best.
    """

    text: str
    metric: str = ""
    at: float | Literal["last"] | None = None
    better: Literal["lower", "higher"] = "lower"
    compare: Literal["ratio", "difference"] = "ratio"
    margin: float = 0.0
    promise: str = ""
    promise_limit: float = 0.0
    quality: str = ""
    quality_better: Literal["lower", "higher"] = "higher"
    quality_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One limitation of Transformers: what goes wrong, why, what is measured against what, and what decides."""

    number: int
    slug: str
    title: str
    category: str
    statement: str
    cause: str
    meter: str
    baseline: str
    criterion: Criterion
    references: tuple[Reference, ...]

    @property
    def folder(self) -> str:
        """Name of its folder, e.g. "01_quadratic_complexity"."""
        return f"{self.number:02d}_{self.slug}"


@dataclass(frozen=True, slots=True)
class Solution:
    """One method, whichever problems it treats.

    Args:
        code: "module:attribute" below `transformer_problems`, one for each form of it; empty if not implemented yet.
        example: A few lines of Python that use it, or nothing.
    """

    slug: str
    name: str
    role: Role
    how: str
    code: tuple[str, ...]
    example: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the published measurement says of a pair."""

    verdict: VerdictWord
    gain: str
    cost: str


@dataclass(frozen=True, slots=True)
class Treatment:
    """A pair: one solution applied to one problem.

    Args:
        name: What the solution is called under this problem.
        claim: What it promises here.
        cost: What it costs here.
        choose: When to choose it here; starts with "when".
        criterion: The problem's criterion, with what differs for this solution.
        code: The solution's code, as far as it treats this problem.
        example: The solution's example, or one that shows the code that treats this problem.
        outcome: What was measured; None while the pair is planned.
    """

    solution: Solution
    problem: Problem
    name: str
    claim: str
    cost: str
    choose: str
    criterion: Criterion
    code: tuple[str, ...]
    example: str
    outcome: Outcome | None = None

    @property
    def key(self) -> str:
        """Its name in verdicts.json, e.g. "01/flash-attention"."""
        return f"{self.problem.number:02d}/{self.solution.slug}"

    @property
    def status(self) -> Literal["measured", "planned"]:
        return "measured" if self.outcome else "planned"

    @property
    def verdict(self) -> VerdictWord | None:
        return self.outcome.verdict if self.outcome else None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All problems, solutions and pairs, each in the order in which they are shown.

    Args:
        scale: Scale of the published measurements; None if there are none.
        date: When they were made; empty if there are none.
    """

    problems: tuple[Problem, ...]
    solutions: tuple[Solution, ...]
    treatments: tuple[Treatment, ...]
    scale: Scale | None = None
    date: str = ""

    def problem(self, name: int | str) -> Problem:
        """The problem of a number (1, "1", "01"), slug or folder.

        Raises:
            UnknownNameError: If there is none; the message lists the nearest.
        """
        wanted = str(name).strip().lower().replace("-", "_")
        for problem in self.problems:
            if wanted in (str(problem.number), f"{problem.number:02d}", problem.slug, problem.folder):
                return problem
        raise UnknownNameError("problem", str(name), [n for p in self.problems for n in (f"{p.number:02d}", p.slug)])

    def solution(self, name: str) -> Solution:
        """The solution of a slug or name, its own or the one that it has under a problem, in any case.

        Raises:
            UnknownNameError: If there is none; the message lists the nearest.
        """
        wanted = _plain(name)
        for solution in self.solutions:
            if wanted in (solution.slug, _plain(solution.name)):
                return solution
        for treatment in self.treatments:
            if wanted == _plain(treatment.name):
                return treatment.solution
        raise UnknownNameError("solution", name, [solution.slug for solution in self.solutions])

    def pairs(self, problem: Problem | int | str) -> tuple[Treatment, ...]:
        """The treatments of a problem, in the order in which they are shown."""
        found = problem if isinstance(problem, Problem) else self.problem(problem)
        return tuple(treatment for treatment in self.treatments if treatment.problem == found)

    def pairs_of(self, solution: Solution) -> tuple[Treatment, ...]:
        """The treatments that are this solution, in the order of their problems."""
        return tuple(treatment for treatment in self.treatments if treatment.solution == solution)


def _plain(name: str) -> str:
    """A name as it is compared: "Relative PE", "relative_pe" and "relative-pe" are one."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())
