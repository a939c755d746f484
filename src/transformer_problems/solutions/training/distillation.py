"""Knowledge distillation: a student learns from what a teacher predicts, or from what it writes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError

IGNORED = -100
"""The target of tokens that are not learned from, as in torch.nn.functional.cross_entropy."""


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """alpha * T^2 * KL(teacher || student), both softened by T, + (1 - alpha) * cross-entropy with the targets.

    The teacher's probabilities of wrong answers say which of them are near; T spreads them out so that they count,
    and T^2 keeps their gradient of one size with the other term's. The teacher gets no gradient.

    Logits of -inf forbid a class. One that the teacher forbids adds nothing to its term, 0 log 0 = 0, whatever the
    student says; where the student forbids what the teacher allows, or the target, the loss is infinite.

    Args:
        targets: Right answers; -100 where there is none, which leaves that token out of both terms.
        temperature: T.
        alpha: Weight of the teacher, from 0 (targets alone) to 1 (teacher alone); a term of weight 0 is left out.

    Shape:
        student_logits, teacher_logits: [..., V]; targets: [...] int; output: a scalar, the mean over targets.

    Raises:
        ArgumentError: If the shapes differ, targets are no torch.int64 answers, a number is out of range, or there is
            no target.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
        Differs from the paper: relative entropy in place of cross-entropy with the teacher, which differs by a
        constant.
    """
    require_positive(temperature=temperature)
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha must be a weight from 0 to 1; got {alpha}. Choose 1 for the teacher alone.")
    if student_logits.shape != teacher_logits.shape:
        raise ArgumentError(
            f"student and teacher must give logits of one shape; got {list(student_logits.shape)} and "
            f"{list(teacher_logits.shape)}. Choose a teacher with the student's vocabulary."
        )
    if targets.dtype != torch.int64 or targets.shape != student_logits.shape[:-1]:
        raise ArgumentError(
            f"targets must be torch.int64 {list(student_logits.shape[:-1])}, one answer for each row of logits; got "
            f"{targets.dtype} {list(targets.shape)}. Give a teacher's soft answers as teacher_logits."
        )
    learned = targets != IGNORED
    if not bool(learned.any()):
        raise ArgumentError(f"targets must hold at least one answer; all are {IGNORED}. Leave this batch out.")
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits[learned].to(wide), teacher_logits[learned].detach().to(wide)
    terms = []  # one that weighs nothing stays out, for it may be infinite, and 0 * inf is no number
    if alpha > 0:
        terms.append(alpha * temperature**2 * _relative_entropy(student / temperature, teacher / temperature))
    if alpha < 1:
        terms.append((1 - alpha) * nn.functional.cross_entropy(student, targets[learned]))
    return torch.stack(terms).sum()


def _relative_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), the mean over rows. [n, V]."""
    student, teacher = student_logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    weights = teacher.exp()
    # filled before it is multiplied: 0 * (-inf + inf) would be NaN, here and in the gradient
    ratios = (teacher - student).masked_fill(weights == 0, 0.0)
    return (weights * ratios).sum(dim=-1).mean()


def sequence_level_batch(
    write: Callable[[Tensor], Tensor], prompts: Tensor, *, stop_token: int | None = None
) -> tuple[Tensor, Tensor]:
    """A training batch in the teacher's own words: inputs, and as targets the tokens that the teacher added.

    A student trained on them copies the teacher's likely texts instead of its distribution for every token, which is
    an easier thing to learn and needs no teacher later.

    Args:
        write: Continues prompts, [B, N] -> [B, N + n], such as `lambda p: generate(teacher, p, 32).tokens`.
        stop_token: Ends a row; the first is learned, what follows it is not. Default none.

    Shape:
        prompts: [B, N] int, N > 0; inputs, targets: [B, N + n - 1], targets -100 where nothing is to be learned.

    Raises:
        ArgumentError: If prompts are empty, or `write` does not continue them.

    Source:
        Kim and Rush 2016, arXiv:1606.07947, section 3.2.
        Differs from the paper: `write` decides how the teacher decodes; the paper uses beam search.
    """
    if prompts.dim() != 2 or prompts.shape[1] == 0:
        raise ArgumentError(
            f"prompts must be [B, N] with at least one token in each row, to predict the next from; got "
            f"{list(prompts.shape)}. Begin every text with a start token."
        )
    texts, num_given = write(prompts), prompts.shape[1]
    if texts.shape[1] <= num_given or not torch.equal(texts[:, :num_given], prompts):
        raise ArgumentError(
            f"write must continue the prompts, {list(prompts.shape)}; it gave {list(texts.shape)}. "
            "Return the prompts with the teacher's tokens after them."
        )
    new = texts[:, num_given:]
    if stop_token is not None:
        stops = (new == stop_token).long()
        new = new.masked_fill(stops.cumsum(dim=1) > stops, IGNORED)  # a stop stands before it
    given = torch.full_like(prompts[:, 1:], IGNORED)
    return texts[:, :-1], torch.cat([given, new], dim=1)
