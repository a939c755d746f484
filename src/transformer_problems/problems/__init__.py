"""The 18 rooms: one folder a problem, each with the experiment that measures it."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from transformer_problems.catalogue import Problem, load_catalogue

if TYPE_CHECKING:  # it imports torch, which a served ONNX file does without
    from transformer_problems.lab.experiment import Experiment


def has_experiment(problem: Problem) -> bool:
    """Whether the problem's room holds an experiment already."""
    return importlib.util.find_spec(f"{room_of(problem)}.experiment") is not None


def load_experiment(problem: Problem) -> "Experiment":
    """The experiment of a problem's room."""
    experiment: Experiment = importlib.import_module(f"{room_of(problem)}.experiment").EXPERIMENT
    return experiment


def room_of(problem: Problem) -> str:
    """Module name of a problem's room."""
    return f"{__name__}.p{problem.folder}"


def experiment_of(number: int) -> "Experiment":
    """The experiment of a problem, by its number."""
    return load_experiment(load_catalogue().problem(number))
