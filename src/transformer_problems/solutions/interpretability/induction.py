"""Induction heads: which heads look for what followed a token before, and how much repetition helps the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.inputs import shown
from transformer_problems.core.modes import evaluating
from transformer_problems.core.seeding import generator
from transformer_problems.solutions.interpretability.answers import answer
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.sites import Site, attention_layers


@dataclass(frozen=True, slots=True)
class InductionScores:
    """What heads and the model make of random tokens that come a second time.

    Args:
        scores: By head: mean share of attention that the second copy of a token pays to the token after its first one.
        uniform: The score of a head that attends to all earlier tokens alike.
        first_loss: Mean cross-entropy of the first copy's tokens after its first, in nats a token.
        second_loss: That of the same tokens in the second copy.
    """

    scores: Mapping[Site, float]
    uniform: float
    first_loss: float
    second_loss: float

    @property
    def loss_drop(self) -> float:
        """What the model gains from having seen the tokens before, in nats a token."""
        return self.first_loss - self.second_loss

    def strongest(self, num_heads: int) -> list[Site]:
        """The heads with the highest scores, the highest first."""
        require_positive_int(num_heads=num_heads)
        return sorted(self.scores, key=lambda site: -self.scores[site])[:num_heads]


@torch.no_grad()
def induction_scores(
    model: nn.Module, *, num_tokens: int = 32, num_sequences: int = 8, seed: int = 0
) -> InductionScores:
    """Score each head for induction on random tokens that are repeated once.

    Random tokens have no meaning and no frequent pairs, so that only the repetition can help: an induction head attends
    from a token's second copy to what followed the first one, and so predicts it again. A head with a high score
    matches prefixes; whether the model's answer rests on it, `ablate_heads` tells. Attention weights of all layers,
    2 num_tokens squared for each head and sequence, are held at once.

    Args:
        model: A causal language model that `readable` can read, whose heads can be told apart: Decoder, LlamaDecoder,
            or one of transformers; it answers in evaluation mode and is left as it was.
        num_tokens: T, tokens before they are repeated, all different; two at least, V at most.
        num_sequences: B, sequences over which the scores are averaged.
        seed: Of the tokens.

    Raises:
        ArgumentError: If the model cannot be read, its logits are not finite, or the vocabulary is too small.
        CombinationError: If the model has no attention weights, its heads cannot be told apart, it looks ahead, or
            gives no logits [B, N, V].

    Source:
        Olsson et al. 2022, arXiv:2209.11895, the prefix matching score and the in-context learning score.
        Differs from the paper: tokens do not recur within a copy, so that each has one earlier place to match; copies
        are two; and the loss is that of one token set, before and after it was seen.

    Example:
        >>> from transformer_problems import Decoder, RotaryEmbedding, SelfAttention, induction_scores
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4, position=RotaryEmbedding(8)))
        >>> found = induction_scores(model)
        >>> len(found.scores), found.strongest(1)[0] in found.scores
        (8, True)
    """
    require_positive_int(num_tokens=num_tokens, num_sequences=num_sequences)
    require_not_negative(seed=seed)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the torch.nn.Module itself; got {shown(model)}. Its heads are looked for.")
    reader = readable(model)
    vocab_size = reader.vocab_size
    if not 2 <= num_tokens <= vocab_size:
        raise ArgumentError(
            f"num_tokens must be from 2 to {vocab_size}, the vocabulary's size, so that none recurs; got {num_tokens}."
        )
    draws = torch.rand(num_sequences, vocab_size, generator=generator(seed, "tokens"))
    once = draws.argsort(dim=1)[:, :num_tokens].to(next(model.parameters()).device)
    tokens = once.repeat(1, 2)
    attentions = reader.attentions(tokens)
    layers = attention_layers(model)
    if [layer.num_heads for layer in layers.values()] != [weights.shape[1] for weights in attentions]:
        raise CombinationError(
            f"each layer with attention weights must have heads that can be told apart; {type(model).__name__} has "
            f"{len(attentions)} layers with weights, and heads in {len(layers)}. Use SelfAttention."
        )
    scores = {
        Site(path, head): score
        for path, weights in zip(layers, attentions, strict=True)
        for head, score in enumerate(_prefix_matching(weights).tolist())
    }
    with evaluating(model):
        logits = answer(model(tokens))
    first, second = _losses(logits, tokens, vocab_size)
    uniform = sum(1 / (query + 1) for query in range(num_tokens, 2 * num_tokens)) / num_tokens
    return InductionScores(scores, uniform, first, second)


def _prefix_matching(weights: Tensor) -> Tensor:
    """Mean attention from the second copy of a token to the one after its first, [B, H, 2T, 2T] -> [H]."""
    if float(weights.triu(1).abs().max()) > 1e-4:  # an op in bfloat16 may leave less than that of masked keys
        raise CombinationError("model must be causal to have a score for induction; its attention looks ahead.")
    num_tokens = weights.shape[-1] // 2
    # Query T + i looks for key i + 1: the diagonal that lies T - 1 below the main one, from its second entry on.
    matched = weights.diagonal(offset=1 - num_tokens, dim1=-2, dim2=-1)[..., 1:]
    return matched.mean(dim=(0, 2))


def _losses(logits: Tensor, tokens: Tensor, vocab_size: int) -> tuple[float, float]:
    """Mean cross-entropy of the tokens of each copy but its first, which nothing foretells."""
    if logits.shape != (*tokens.shape, vocab_size):
        raise CombinationError(
            f"a language model must give logits {[*tokens.shape, vocab_size]}; got {list(logits.shape)}. Use a model "
            "with a head for the next token."
        )
    if not bool(logits.isfinite().all()):
        raise ArgumentError("the model's logits must be finite; got NaN or infinity. Load or train the model again.")
    losses = nn.functional.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")  # [B, 2T - 1]
    num_tokens = tokens.shape[1] // 2
    return float(losses[:, : num_tokens - 1].mean()), float(losses[:, num_tokens:].mean())
