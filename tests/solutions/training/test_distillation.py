"""Distillation: the loss against its formula and its gradient, and batches in the teacher's words."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.decoding.generate import generate
from transformer_problems.solutions.training.distillation import distillation_loss, sequence_level_batch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_formula(alpha: float, temperature: float) -> None:
    student, teacher, targets = draw(2, 5, 7), draw(2, 5, 7, seed=1), torch.arange(10).view(2, 5) % 7
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    soft = (p * (p / q).log()).sum(-1).mean()
    hard = -student.softmax(-1).log().gather(-1, targets[..., None]).mean()
    loss = distillation_loss(student, teacher, targets, temperature=temperature, alpha=alpha)
    # float64 sums of seventy terms of order one
    torch.testing.assert_close(loss, alpha * temperature**2 * soft + (1 - alpha) * hard, atol=1e-12, rtol=0)


def test_gradients() -> None:
    teacher, targets = draw(4, 5, seed=1), torch.tensor([0, 3, -100, 4])
    student = draw(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, targets), (student,))
    taught = teacher.clone().requires_grad_()
    distillation_loss(student, taught, targets).backward()
    assert taught.grad is None and student.grad is not None


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it() -> None:
    logits = draw(3, 5).requires_grad_()
    loss = distillation_loss(logits, logits.detach(), torch.tensor([0, 1, 2]), alpha=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-14 and gradient.abs().max() < 1e-14  # float64 rounding of probabilities


def test_the_gradient_of_the_teachers_term_keeps_its_size_at_high_temperature() -> None:
    """Hinton et al., equation 4: with logits of mean zero it tends to (student - teacher) / V."""
    student, teacher = (draw(1, 6, seed=s) for s in (0, 1))
    student, teacher = (x - x.mean() for x in (student, teacher))
    student.requires_grad_()
    loss = distillation_loss(student, teacher, torch.tensor([0]), temperature=1e4, alpha=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    # the next term of the series is smaller by the temperature, 1e-4
    torch.testing.assert_close(gradient, (student - teacher).detach() / 6, atol=1e-3, rtol=0)


MASKS = {  # where the teacher, and where the student forbid a class; 0 is allowed by both
    "the same": ([1, 4], [1, 4]),
    "the teacher more": ([1, 3, 4], [1]),
    "the teacher alone": ([2], []),
}


@pytest.mark.parametrize("forbidden", MASKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_classes_that_the_teacher_forbids_count_as_nothing(forbidden: str, alpha: float) -> None:
    by_teacher, by_student = MASKS[forbidden]
    targets = torch.zeros(3, dtype=torch.long)
    teacher = draw(3, 5, seed=1).index_fill(1, torch.tensor(by_teacher, dtype=torch.long), float("-inf"))
    blocked = torch.tensor(by_student, dtype=torch.long)

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits.index_fill(1, blocked, float("-inf")), teacher, targets, alpha=alpha)

    student = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student,))  # which refuses what is not finite
    p, q = ((x / 2).softmax(-1) for x in (teacher, student.index_fill(1, blocked, float("-inf"))))
    terms = [pi * math.log(pi / qi) for pi, qi in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True) if pi]
    hard = student.index_fill(1, blocked, float("-inf")).log_softmax(-1)[:, 0].neg().mean()
    # float64 sums of fifteen terms of order one
    expected = alpha * 4 * sum(terms) / 3 + (1 - alpha) * hard
    torch.testing.assert_close(loss(student), expected, atol=1e-12, rtol=0)


def test_gradients_reach_masked_logits_as_zeros() -> None:
    blocked = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]], dtype=torch.float64)
    student = (draw(1, 4) + blocked).requires_grad_()
    distillation_loss(student, draw(1, 4, seed=1) + blocked, torch.tensor([2])).backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert student.grad[0, [1, 3]].tolist() == [0.0, 0.0] and bool((student.grad[0, [0, 2]] != 0).all())


def test_a_student_that_forbids_what_is_needed_is_infinitely_wrong() -> None:
    student, teacher = draw(2, 5), draw(2, 5, seed=1)
    student[0, 3] = float("-inf")
    for targets in (torch.tensor([0, 1]), torch.tensor([3, 1])):
        assert distillation_loss(student, teacher, targets, alpha=1.0).item() == float("inf")
    assert distillation_loss(student, teacher, torch.tensor([3, 1])).item() == float("inf")
    without_teacher = distillation_loss(student, teacher, torch.tensor([0, 1]), alpha=0.0)
    assert without_teacher == torch.nn.functional.cross_entropy(student, torch.tensor([0, 1]))
    teacher[0, 3] = float("-inf")
    assert distillation_loss(student, teacher, torch.tensor([3, 1]), alpha=1.0).isfinite()


def test_tokens_without_a_target_count_in_neither_term() -> None:
    student, teacher, targets = draw(4, 5), draw(4, 5, seed=1), torch.tensor([0, -100, 3, -100])
    kept = distillation_loss(student[::2], teacher[::2], targets[::2])
    assert torch.equal(distillation_loss(student, teacher, targets), kept)


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher, targets = draw(64, 50), draw(64, 50, seed=1), torch.arange(64) % 50
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), targets)
    assert half.dtype == torch.float32
    # each logit is rounded by up to 2^-9 of some four, twice; means of many such errors are smaller
    torch.testing.assert_close(half.double(), distillation_loss(student, teacher, targets), atol=2**-6, rtol=0)


def test_wrong_arguments_are_refused() -> None:
    logits, targets = draw(2, 5), torch.tensor([0, 1])
    with pytest.raises(ArgumentError, match=r"logits of one shape; got \[2, 5\] and \[2, 6\].*vocabulary"):
        distillation_loss(logits, draw(2, 6), targets)
    with pytest.raises(ArgumentError, match="temperature must be positive; got 0"):
        distillation_loss(logits, logits, targets, temperature=0)
    with pytest.raises(ArgumentError, match="alpha must be a weight from 0 to 1; got 2"):
        distillation_loss(logits, logits, targets, alpha=2)
    with pytest.raises(ArgumentError, match="targets must hold at least one answer; all are -100"):
        distillation_loss(logits, logits, torch.full((2,), -100))
    for wrong in (logits.softmax(-1), torch.tensor([0, 1, 2]), torch.tensor([0]), torch.tensor(0), targets.float()):
        told = rf"targets must be torch.int64 \[2\], .*; got {wrong.dtype} \[{', '.join(map(str, wrong.shape))}\]"
        with pytest.raises(ArgumentError, match=told):
            distillation_loss(logits, logits, wrong)


def test_a_batch_holds_the_teachers_tokens_as_targets() -> None:
    torch.manual_seed(0)
    teacher = Decoder(11, 16, 1, lambda: SelfAttention(16, 4))
    prompts = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(0))
    inputs, targets = sequence_level_batch(lambda p: generate(teacher, p, 6).tokens, prompts)
    texts = generate(teacher, prompts, 6).tokens
    assert torch.equal(inputs, texts[:, :-1])
    assert bool((targets[:, :3] == -100).all()) and torch.equal(targets[:, 3:], texts[:, 4:])
    best = teacher(inputs).argmax(-1)  # a greedy teacher agrees with its own text
    assert torch.equal(best[:, 3:], targets[:, 3:])


def test_nothing_is_learned_after_the_first_stop() -> None:
    texts = torch.tensor([[9, 1, 2, 0, 0, 0], [9, 1, 0, 0, 3, 0], [0, 0, 1, 2, 3, 4]])
    inputs, targets = sequence_level_batch(lambda p: texts, texts[:, :2], stop_token=0)
    assert torch.equal(inputs, texts[:, :-1])
    assert targets.tolist() == [[-100, 2, 0, -100, -100], [-100, 0, -100, -100, -100], [-100, 1, 2, 3, 4]]


def test_a_teacher_that_does_not_continue_is_refused() -> None:
    prompts = torch.tensor([[1, 2]])
    for write in (lambda p: p, lambda p: torch.zeros(1, 5, dtype=torch.long)):
        with pytest.raises(ArgumentError, match=r"write must continue the prompts, \[1, 2\]"):
            sequence_level_batch(write, prompts)


def test_prompts_without_a_token_are_refused() -> None:
    for prompts in (torch.zeros(2, 0, dtype=torch.long), torch.tensor([1, 2])):
        with pytest.raises(ArgumentError, match=r"prompts must be \[B, N\] with at least one token.*start token"):
            sequence_level_batch(lambda p: torch.zeros(2, 4, dtype=torch.long), prompts)
