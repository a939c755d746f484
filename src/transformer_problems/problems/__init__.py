"""The 18 rooms: one folder a problem, each with the experiment that measures it and the check-up of a model."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from transformer_problems.catalogue import Problem, load_catalogue

if TYPE_CHECKING:  # they import torch, which a served ONNX file does without
    from transformer_problems.checkpoints.checkup import Checkup, Fault
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


def has_checkup(problem: Problem) -> bool:
    """Whether the problem's room holds a check-up."""
    return importlib.util.find_spec(f"{room_of(problem)}.checkup") is not None


def load_checkup(problem: Problem) -> "Checkup":
    """The check-up of a problem's room."""
    checkup: Checkup = importlib.import_module(f"{room_of(problem)}.checkup").CHECKUP
    return checkup


def load_fault(problem: Problem) -> "Fault":
    """The fault that a room's check-up is for."""
    fault: Fault = importlib.import_module(f"{room_of(problem)}.fault").FAULT
    return fault
