"""A student takes the layers that it is told to take, and everything around them."""

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.training.layer_initialisation import initialise_from_layers


def encoder(num_layers: int, width: int = 8, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, width, num_layers, lambda: SelfAttention(width, 2, is_causal=False)).eval()


@pytest.mark.parametrize(
    ("depth", "asked", "chosen"), [(3, None, (0, 2, 4)), (2, None, (0, 3)), (1, None, (0,)), (2, (5, 1), (5, 1))]
)
def test_the_student_is_the_teacher_with_layers_left_out(depth: int, asked: object, chosen: tuple[int, ...]) -> None:
    teacher, student = encoder(6), encoder(depth, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert initialise_from_layers(student, teacher, layers=asked) == chosen
    tokens = torch.randint(11, (2, 5))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    teacher.body.blocks = type(teacher.body.blocks)(teacher.body.blocks[i] for i in chosen)
    assert torch.equal(student(tokens), teacher(tokens))


def test_a_deep_student_of_its_teacher_is_a_copy_that_trains_alone() -> None:
    teacher, student = encoder(2), encoder(1, seed=1)
    initialise_from_layers(student, teacher)
    with torch.no_grad():
        student.head.weight.zero_()
    assert teacher.head.weight.abs().sum() > 0


@pytest.mark.parametrize("layers", [(0,), (0, 6), (0, -1), (0, 1.0)])
def test_layers_that_do_not_fit_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="layers must name one of the teacher's 6 layers"):
        initialise_from_layers(encoder(2), encoder(6), layers=layers)


def test_models_that_differ_in_more_than_depth_are_refused_untouched() -> None:
    student = encoder(2, width=4)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"must differ in the length of body.blocks alone; .* of shape"):
        initialise_from_layers(student, encoder(6))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("student", [nn.Linear(2, 2), encoder(6)])
def test_a_student_without_a_shorter_stack_is_refused(student: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="student must have a stack of layers that is shorter"):
        initialise_from_layers(student, encoder(6))
