"""How far an answer moves without the tokens that an explanation names, and with them alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import shown
from transformer_problems.core.seeding import generator
from transformer_problems.solutions.interpretability.attribution import Attribution, check_sequences, chosen, widened
from transformer_problems.solutions.interpretability.readable import Readable, readable


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """What an explanation is worth, beside random ones of the same tokens. All [B], in probability of the target.

    Args:
        comprehensiveness: What the probability loses without the highest scored tokens, the mean over shares of
            tokens; high where they were needed.
        sufficiency: What it loses with the highest scored tokens alone; low, even negative, where they were enough.
        random_comprehensiveness: That of random scores, the mean over several draws.
        random_sufficiency: That of random scores, likewise.
    """

    comprehensiveness: Tensor
    sufficiency: Tensor
    random_comprehensiveness: Tensor
    random_sufficiency: Tensor


def faithfulness(
    model: nn.Module | Readable,
    tokens: Tensor,
    attribution: Attribution,
    *,
    key_mask: Tensor | None = None,
    keep: Tensor | None = None,
    mask_token: int | None = None,
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5),
    num_controls: int = 10,
    seed: int = 0,
) -> Faithfulness:
    """Delete a share of the tokens by their scores, or all others, and see what becomes of the answer.

    A token is deleted through the key mask: nobody attends to it, places stay as they were, and a model that reads the
    last real token reads the last one left. A model that reads at a given position, as classifiers do at their class
    token, still reads there: `keep` it. Or a mask token is put in its place, which a model trained with one knows.
    Either way the input is unlike those that the model was trained on; random scores, deleted in the same way, tell how
    much of the loss that alone explains. Takes 2 len(shares) (num_controls + 1) + 1 forward passes.

    Args:
        attribution: Its scores rank the tokens, the highest first, equal ones from left to right; its target is the
            answer.
        keep: Tokens never deleted nor ranked, True in [B, N], such as those that mark class and end. Default none.
        mask_token: Put in the place of deleted tokens. Default none: they are masked as keys.
        shares: Of the tokens that may be deleted, rounded up; one token at least stays.
        num_controls: Random rankings to compare with.
        seed: Of these rankings.

    Raises:
        ArgumentError: If the arguments do not fit each other, a sequence has fewer than two tokens to delete, or the
            model's logits are not finite.

    Source:
        DeYoung et al. 2020, arXiv:1911.03429, section 4.2. Differs from the paper: tokens are masked, not cut out; the
        mean is over the given shares, without the empty deletion; random scores are averaged over several draws.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, GradientXInput, SelfAttention, faithfulness
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> tokens = torch.arange(12)[None]
        >>> faithfulness(model, tokens, GradientXInput().explain(model, tokens)).comprehensiveness.shape
        torch.Size([1])
    """
    reader = readable(model)
    check_sequences(reader, tokens, key_mask)
    _check_options(shares, mask_token, reader)
    require_positive_int(num_controls=num_controls)
    require_not_negative(seed=seed)
    _check_keep(keep, tokens)
    _check_attribution(attribution, tokens)
    real = torch.ones_like(tokens, dtype=torch.bool) if key_mask is None else key_mask
    candidates = real if keep is None else real & ~keep
    if int(candidates.sum(dim=1).min()) < 2:
        row = int(candidates.sum(dim=1).argmin())
        raise ArgumentError(
            f"each sequence must have two tokens to delete at least; sequence {row} has {int(candidates[row].sum())}. "
            "Leave that sequence out."
        )
    trial = _Trial(reader, tokens, real, candidates, attribution.target, mask_token, tuple(shares))
    whole = trial.probability(torch.zeros_like(candidates))
    own = trial.losses(attribution.scores, whole)
    draws = generator(seed, "controls")
    random = torch.zeros_like(own)
    for _ in range(num_controls):
        random += trial.losses(torch.rand(tokens.shape, generator=draws).to(tokens.device), whole) / num_controls
    return Faithfulness(own[0], own[1], random[0], random[1])


@dataclass(frozen=True, slots=True)
class _Trial:
    """One batch of answers, and how tokens are deleted from it."""

    model: Readable
    tokens: Tensor
    real: Tensor
    candidates: Tensor
    target: Tensor
    mask_token: int | None
    shares: tuple[float, ...]

    def losses(self, scores: Tensor, whole: Tensor) -> Tensor:
        """Comprehensiveness and sufficiency of a ranking, [2, B], against the whole input's probability [B]."""
        order = scores.masked_fill(~self.candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        losses = torch.zeros(2, len(scores), dtype=whole.dtype, device=whole.device)
        for share in self.shares:
            named = rank < self._counts(share)[:, None]
            losses[0] += whole - self.probability(named)
            losses[1] += whole - self.probability(self.candidates & ~named)
        return losses / len(self.shares)

    def _counts(self, share: float) -> Tensor:
        """How many tokens a share of each sequence's is, [B]."""
        totals = self.candidates.sum(dim=1)
        counts = [min(math.ceil(share * total - 1e-9), total - 1) for total in totals.tolist()]  # 0.28 * 25 is above 7
        return torch.tensor(counts, device=totals.device)

    def probability(self, deleted: Tensor) -> Tensor:
        """The target's probability without some tokens, [B]."""
        tokens, key_mask = self.tokens, self.real
        if self.mask_token is None:
            key_mask = key_mask & ~deleted
        else:
            tokens = tokens.masked_fill(deleted, self.mask_token)
        with torch.no_grad():
            logits = widened(self.model.logits(tokens, key_mask=key_mask))
        if not bool(logits.isfinite().all()):
            raise ArgumentError(
                "the model's logits must be finite; got NaN or infinity without some tokens. Give mask_token."
            )
        if int(self.target.max()) >= logits.shape[1] or int(self.target.min()) < 0:
            raise ArgumentError(
                f"attribution must explain one of the {logits.shape[1]} answers of this model; its targets are "
                f"{self.target.tolist()}. Explain the same model."
            )
        return chosen(logits.softmax(dim=1), self.target)


def _check_options(shares: Sequence[float], mask_token: int | None, model: Readable) -> None:
    given = shares if isinstance(shares, tuple | list) else ()
    if not given or not all(isinstance(share, Real) and 0 < float(share) < 1 for share in given):
        raise ArgumentError(f"shares must hold numbers between 0 and 1; got {shown(shares)}. Choose (0.1, 0.2, 0.5).")
    if mask_token is None:
        return
    is_whole = isinstance(mask_token, Integral) and not isinstance(mask_token, bool)
    if not is_whole or not 0 <= mask_token < model.vocab_size:
        raise ArgumentError(
            f"mask_token must be from 0 to {model.vocab_size - 1}; got {mask_token}. Leave it out to delete tokens "
            "through the key mask."
        )


def _check_keep(keep: Tensor | None, tokens: Tensor) -> None:
    if keep is not None and not (isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == tokens.shape):
        raise ArgumentError(
            f"keep must be bool {list(tokens.shape)}, True for tokens that stay; got {shown(keep)}. Compare with their "
            "ids: keep = tokens == class_token."
        )


def _check_attribution(attribution: Attribution, tokens: Tensor) -> None:
    if not isinstance(attribution, Attribution):
        raise ArgumentError(
            f"attribution must be an Attribution; got {shown(attribution)}. Pass what an explainer gives, not its "
            "scores alone."
        )
    if attribution.scores.shape != tokens.shape:
        raise ArgumentError(
            f"attribution must have a score for each token, {list(tokens.shape)}; got "
            f"{list(attribution.scores.shape)}. Explain the same tokens."
        )
    if not attribution.scores.device == attribution.target.device == tokens.device:
        raise ArgumentError(
            f"attribution must be on {tokens.device}, as the tokens; got {attribution.scores.device} and, of its "
            f"target, {attribution.target.device}. Explain the model where it is."
        )
