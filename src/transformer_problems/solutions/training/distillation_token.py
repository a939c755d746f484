"""The distillation token: a second class token learns from a teacher while the first learns from the labels."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive, require_share
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.solutions.training.distillation import IGNORED, distillation_loss

Kind = Literal["hard", "soft"]


def token_distillation_loss(
    class_logits: Tensor,
    distilled_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    kind: Kind = "hard",
    temperature: float = 3.0,
    alpha: float = 0.1,
) -> Tensor:
    """Cross-entropy of the class token with the labels, and of the distillation token with what a teacher says.

    "hard": CE(class, targets) / 2 + CE(distilled, argmax teacher) / 2. The teacher may then be anything that ranks the
    classes, a support vector machine as well as a network, and its scores need not be logits.
    "soft": (1 - alpha) CE(class, targets) + alpha T^2 KL(teacher || distilled), both softened by T.

    Each token learns from its own source, so they come to differ, and in the paper their mean is better than either.
    The teacher gets no gradient.

    Args:
        class_logits: Of the head on the class token.
        distilled_logits: Of the head on the distillation token.
        teacher_logits: The teacher's scores of the same classes for the same inputs.
        targets: The labels; -100 where there is none, which leaves that image to the teacher alone.
        temperature: T; with "soft" only.
        alpha: Weight of the teacher, from 0 to 1; with "soft" only. A term of weight 0 is left out.

    Shape:
        class_logits, distilled_logits, teacher_logits: [B, K]; targets: [B] int; output: a scalar.

    Raises:
        ArgumentError: If the shapes differ, targets are no classes or all left out, a number is out of range, or there
            is no such kind.

    Source:
        Touvron et al. 2020, arXiv:2012.12877, section 4.

    Example:
        >>> import torch
        >>> from transformer_problems import PatchEmbedding, SelfAttention, VisionTransformer, token_distillation_loss
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, is_causal=False)
        >>> model = VisionTransformer(PatchEmbedding(64, 4), (32, 32), 2, mixer, num_classes=10, num_class_tokens=2)
        >>> images, labels, teacher = torch.randn(8, 3, 32, 32), torch.randint(10, (8,)), torch.randn(8, 10)
        >>> loss = token_distillation_loss(*model.logits_of_heads(images).unbind(1), teacher, labels)
    """
    if kind not in get_args(Kind):
        raise UnknownNameError("kind of distillation", kind, get_args(Kind))
    require_positive(temperature=temperature)
    require_share(alpha=alpha)
    shapes = [list(logits.shape) for logits in (class_logits, distilled_logits, teacher_logits)]
    if class_logits.dim() != 2 or shapes != 3 * shapes[:1]:
        raise ArgumentError(
            f"class token, distillation token and teacher must give [B, K] logits of the same classes; got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}. For a teacher that gives one score s of two classes, stack -s "
            "and s."
        )
    _check_targets(targets, *class_logits.shape)
    wide = torch.promote_types(class_logits.dtype, torch.float32)
    choice = teacher_logits.argmax(dim=-1)
    if kind == "soft" and alpha == 1:  # the labels' term may be infinite, and 0 * inf is no number
        return distillation_loss(distilled_logits, teacher_logits, choice, temperature=temperature, alpha=1.0)
    labelled = nn.functional.cross_entropy(class_logits.to(wide), targets)
    if kind == "hard":
        return (labelled + nn.functional.cross_entropy(distilled_logits.to(wide), choice)) / 2
    if alpha == 0:
        return labelled
    taught = distillation_loss(distilled_logits, teacher_logits, choice, temperature=temperature, alpha=1.0)
    return (1 - alpha) * labelled + alpha * taught


def _check_targets(targets: Tensor, batch_size: int, num_classes: int) -> None:
    if targets.dtype != torch.int64 or list(targets.shape) != [batch_size]:
        raise ArgumentError(
            f"targets must be torch.int64 [{batch_size}], one label for each image; got {targets.dtype} "
            f"{list(targets.shape)}. Give soft answers as teacher_logits."
        )
    labels = targets[targets != IGNORED]
    if len(labels) == 0:
        raise ArgumentError(f"targets must hold at least one label; all are {IGNORED}. Leave this batch out.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ArgumentError(
            f"targets must be classes from 0 to {num_classes - 1}, or {IGNORED}; got {lowest} to {highest}. "
            "Choose heads with as many classes as there are labels."
        )
