"""token_distillation_loss against its formulas, and a VisionTransformer that learns from a teacher of another kind."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.distillation_token import Kind, token_distillation_loss


def draw(seed: int) -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return torch.stack([-row.softmax(-1)[c].log() for row, c in zip(logits, classes, strict=True)]).mean()


def test_hard_is_half_the_labels_and_half_the_teachers_choice() -> None:
    own, distilled, teacher = draw(0), draw(1), draw(2)
    choice = torch.tensor([row.tolist().index(max(row.tolist())) for row in teacher])
    expected = cross_entropy(own, TARGETS) / 2 + cross_entropy(distilled, choice) / 2
    loss = token_distillation_loss(own, distilled, teacher, TARGETS)
    torch.testing.assert_close(loss, expected, atol=1e-14, rtol=0)  # float64 sums of six terms of order one


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_is_the_teachers_distribution(temperature: float, alpha: float) -> None:
    own, distilled, teacher = draw(0), draw(1), draw(2)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, distilled))
    taught = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    expected = (1 - alpha) * cross_entropy(own, TARGETS) + alpha * taught
    loss = token_distillation_loss(own, distilled, teacher, TARGETS, kind="soft", temperature=temperature, alpha=alpha)
    torch.testing.assert_close(loss, expected, atol=1e-13, rtol=0)  # float64 sums of thirty terms of order ten


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradients(kind: Kind) -> None:
    own, distilled, teacher = draw(0).requires_grad_(), draw(1).requires_grad_(), draw(2).requires_grad_()

    def loss(own: Tensor, distilled: Tensor) -> Tensor:
        return token_distillation_loss(own, distilled, teacher, TARGETS, kind=kind)

    assert torch.autograd.gradcheck(loss, (own, distilled))
    loss(own, distilled).backward()
    assert teacher.grad is None


def test_each_token_learns_from_its_own_source() -> None:
    own, distilled, teacher = draw(0).requires_grad_(), draw(1).requires_grad_(), draw(2)
    for kind in ("hard", "soft"):
        first = torch.autograd.grad(token_distillation_loss(own, distilled, teacher, TARGETS, kind=kind), own)[0]
        other = torch.autograd.grad(token_distillation_loss(own, distilled, -teacher, TARGETS, kind=kind), own)[0]
        assert torch.equal(first, other)
        first = torch.autograd.grad(token_distillation_loss(own, distilled, teacher, TARGETS, kind=kind), distilled)[0]
        other = torch.autograd.grad(
            token_distillation_loss(own, distilled, teacher, (TARGETS + 1) % 5, kind=kind), distilled
        )[0]
        assert torch.equal(first, other)


def test_hard_asks_the_teacher_for_a_ranking_only() -> None:
    own, distilled, teacher = draw(0), draw(1), draw(2)
    first = token_distillation_loss(own, distilled, teacher, TARGETS)
    assert torch.equal(first, token_distillation_loss(own, distilled, 100 * teacher.float() - 7, TARGETS))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision_is_summed_in_float32(kind: Kind) -> None:
    own, distilled, teacher = (draw(seed).bfloat16() for seed in range(3))
    loss = token_distillation_loss(own, distilled, teacher, TARGETS, kind=kind)
    exact = token_distillation_loss(own.double(), distilled.double(), teacher.double(), TARGETS, kind=kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=0)  # float32 sums of thirty terms of order ten


def test_a_vision_transformer_learns_a_support_vector_machines_answers() -> None:
    """Labels that are wrong teach the class token, a machine trained on right ones the distillation token."""
    bunch = load_digits()
    images = torch.tensor(bunch.images[:64], dtype=torch.float32)[:, None] / 16
    machine = SVC(decision_function_shape="ovr").fit(bunch.data[64:564], bunch.target[64:564])
    teacher = torch.tensor(machine.decision_function(bunch.data[:64]))
    labels = (teacher.argmax(dim=1) + 1) % 10
    torch.manual_seed(0)
    model = VisionTransformer(
        PatchEmbedding(16, 2, in_channels=1),
        (8, 8),
        num_layers=1,
        mixer=lambda: SelfAttention(16, 2, is_causal=False),
        num_classes=10,
        num_class_tokens=2,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        token_distillation_loss(*model.logits_of_heads(images).unbind(1), teacher, labels).backward()
        optimizer.step()
    own, distilled = model.logits_of_heads(images).argmax(-1).unbind(1)
    assert (own == labels).double().mean() > 0.9 and (distilled == teacher.argmax(1)).double().mean() > 0.9


def test_what_does_not_fit_is_refused() -> None:
    logits = draw(0)
    with pytest.raises(UnknownNameError, match="unknown kind of distillation 'firm'. Known: hard, soft"):
        token_distillation_loss(logits, logits, logits, TARGETS, kind="firm")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"\[B, K\] logits of the same classes; got \[6, 5\], \[6, 5\] and \[6\]"):
        token_distillation_loss(logits, logits, logits[:, 0], TARGETS)
    with pytest.raises(ArgumentError, match=r"got \[6, 5\], \[6, 4\] and \[6, 5\]"):
        token_distillation_loss(logits, logits[:, 1:], logits, TARGETS)
    with pytest.raises(ArgumentError, match="temperature must be positive; got 0"):
        token_distillation_loss(logits, logits, logits, TARGETS, kind="soft", temperature=0)
    with pytest.raises(ArgumentError, match="alpha must be a share from 0 to 1; got 2"):
        token_distillation_loss(logits, logits, logits, TARGETS, kind="soft", alpha=2)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((6,), -100), "targets must hold at least one label; all are -100"),
        (torch.rand(6, 5), r"targets must be torch.int64 \[6\].*got torch.float32 \[6, 5\]"),
        (TARGETS[:4], r"targets must be torch.int64 \[6\].*got torch.int64 \[4\]"),
        (TARGETS + 1, "targets must be classes from 0 to 4, or -100; got 1 to 5"),
        (TARGETS - 1, "targets must be classes from 0 to 4, or -100; got -1 to 3"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: Tensor, message: str, kind: Kind) -> None:
    with pytest.raises(ArgumentError, match=message):
        token_distillation_loss(draw(0), draw(1), draw(2), targets, kind=kind)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ArgumentError, match="targets must hold at least one label"):
        token_distillation_loss(draw(0)[:0], draw(1)[:0], draw(2)[:0], TARGETS[:0])


def test_an_image_without_label_learns_from_the_teacher_alone() -> None:
    own, distilled, teacher, targets = draw(0), draw(1), draw(2), TARGETS.clone()
    targets[2] = -100
    labelled = targets != -100
    expected = cross_entropy(own[labelled], targets[labelled]) / 2 + cross_entropy(distilled, teacher.argmax(1)) / 2
    loss = token_distillation_loss(own, distilled, teacher, targets)
    torch.testing.assert_close(loss, expected, atol=1e-14, rtol=0)  # float64 sums of six terms of order one


def test_a_term_without_weight_may_be_infinite() -> None:
    forbidden = draw(0).scatter(1, TARGETS[:, None], float("-inf"))
    for own, distilled, alpha in ((forbidden, draw(1), 1.0), (draw(0), torch.full((6, 5), float("-inf")), 0.0)):
        assert token_distillation_loss(own, distilled, draw(2), TARGETS, kind="soft", alpha=alpha).isfinite()
