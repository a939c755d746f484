"""What an explanation is, what it is asked about, and what every explainer checks first."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.inputs import shown
from transformer_problems.solutions.interpretability.model_reading import check_gradients, check_in_vocabulary, slope_of
from transformer_problems.solutions.interpretability.readable import Readable, readable

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class Attribution:
    """One score for each token of each sequence.

    Args:
        scores: What the answer owes to each token, [B, N]; zero at padding.
        meaning: One sentence that says what a score means, and its unit.
        target: The class, or next token, whose logit is explained, [B].
        method: The method's name.
        completeness_gap: What the scores add up to, less what they should, [B], in logits; None for a method that
            promises no sum.

    Raises:
        ArgumentError: If the scores are no finite numbers [B, N], or the target is no whole numbers [B].
    """

    scores: Tensor
    meaning: str
    target: Tensor
    method: str
    completeness_gap: Tensor | None = None

    def __post_init__(self) -> None:
        scores, target = self.scores, self.target
        if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point():
            raise ArgumentError(
                f"scores must be floats [B, N]; got {shown(scores)}. Give one sequence's as scores[None]."
            )
        if not isinstance(target, Tensor) or target.shape != scores.shape[:1] or target.dtype not in _WHOLE:
            raise ArgumentError(
                f"target must have one entry, a whole number, for each of {len(scores)} sequences; got "
                f"{shown(target)}. Repeat it for each."
            )
        if not bool(scores.isfinite().all()):
            raise ArgumentError(
                f"scores must be finite; {self.method} gave NaN or infinity. Look for overflow in the model, or use a "
                "wider dtype."
            )


class Explainer(Protocol):
    """Says what one answer of a model owes to each token.

    `key_mask` [B, N] is True for real tokens; `target` is the class or next token to explain, one for all sequences or
    one for each, [B], by default the one with the highest logit.
    """

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution: ...


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be explained, checked.

    Args:
        model: The model as explainers read it.
        tokens: [B, N].
        key_mask: As it was given, [B, N] or None.
        target: [B].
        logits: Of the whole input, [B, K], without gradient history.
    """

    model: Readable
    tokens: Tensor
    key_mask: Tensor | None
    target: Tensor
    logits: Tensor

    @property
    def real(self) -> Tensor:
        """True for real tokens, [B, N]."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.key_mask is None else self.key_mask

    def target_logits(self, embeddings: Tensor) -> Tensor:
        """The target's logit where these embeddings [B, N, C] stand in for the tokens' own, [B]."""
        return chosen(self.model.logits(self.tokens, key_mask=self.key_mask, embeddings=embeddings), self.target)

    def gradient(self, embeddings: Tensor) -> Tensor:
        """Gradient of the target's logit with respect to embeddings [B, N, C], in float32 or wider.

        Raises:
            CombinationError: If the model passes none to its embeddings, or none are kept here.
        """
        check_gradients(self.tokens)
        with torch.enable_grad():
            embeddings = embeddings.detach().requires_grad_()
            slope = slope_of(self.target_logits(embeddings).sum(), embeddings)
        if slope is None:
            raise CombinationError(
                "a model must pass gradients to its embeddings to be explained by them; this one passes none. Use the "
                "float model, or LastAttention."
            )
        return widened(slope)

    def attribution(
        self, method: str, meaning: str, scores: Tensor, *, completeness_gap: Tensor | None = None
    ) -> Attribution:
        """Scores [B, N] of this case, zero at padding."""
        return Attribution(scores.masked_fill(~self.real, 0.0), meaning, self.target, method, completeness_gap)


def pose(model: nn.Module | Readable, tokens: Tensor, *, key_mask: Tensor | None, target: int | Tensor | None) -> Case:
    """The case of `Explainer.explain`'s arguments.

    Raises:
        ArgumentError: If the model cannot be read; tokens, mask or target do not fit it or each other; a sequence has
            no real token; or logits are not finite.
    """
    reader = readable(model)
    check_sequences(reader, tokens, key_mask)
    with torch.no_grad():
        logits = widened(reader.logits(tokens, key_mask=key_mask))
    if not bool(logits.isfinite().all()):
        raise ArgumentError(
            "the model's logits must be finite; got NaN or infinity. Check its weights, or use float32."
        )
    return Case(reader, tokens, key_mask, _targets(target, logits), logits)


def check_sequences(model: Readable, tokens: Tensor, key_mask: Tensor | None) -> None:
    """Refuse tokens [B, N] that the model has no embeddings for, and sequences without a real token.

    Raises:
        ArgumentError: If there are such, or tokens or mask have another form.
    """
    check_in_vocabulary("tokens", tokens, model.vocab_size)
    check_key_mask(key_mask, tokens)
    if key_mask is not None and not bool(key_mask.any(dim=1).all()):
        row = int((~key_mask.any(dim=1)).nonzero()[0, 0])
        raise ArgumentError(
            f"key_mask must leave each sequence a real token; sequence {row} has none. Leave that sequence out."
        )


def chosen(values: Tensor, target: Tensor) -> Tensor:
    """Each row's value at its target, [B, K] -> [B]."""
    return values.gather(1, target[:, None])[:, 0]


def widened(x: Tensor) -> Tensor:
    """In float32 or wider, for sums."""
    return x if x.dtype == torch.float64 else x.float()


def _targets(target: int | Tensor | None, logits: Tensor) -> Tensor:
    num_sequences, num_classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    try:
        targets = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:  # a text, or numbers that no tensor holds
        raise ArgumentError(_no_target(num_sequences, target)) from error
    if targets.dim() == 0:
        targets = targets.expand(num_sequences)
    if targets.shape != (num_sequences,) or targets.dtype not in _WHOLE:
        raise ArgumentError(_no_target(num_sequences, target))
    outside = targets[(targets < 0) | (targets >= num_classes)]
    if len(outside):
        raise ArgumentError(
            f"target must be from 0 to {num_classes - 1}; got {int(outside[0])}. Leave it out for the highest logit's."
        )
    return targets.long()


def _no_target(num_sequences: int, target: object) -> str:
    return (
        f"target must be a whole number or [B] of them, B = {num_sequences}; got {shown(target)}. Leave it out for the "
        "highest logit's."
    )
