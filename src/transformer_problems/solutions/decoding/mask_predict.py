"""Mask-Predict: all tokens at once, then the least certain ones again."""

from collections.abc import Callable

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.decoding.generate import Generation, check_logits, check_texts, tokens_known


@torch.no_grad()
def mask_predict(
    model: Callable[[Tensor], Tensor], template: Tensor, *, num_passes: int, mask_token: int
) -> Generation:
    """Fill the masked places of a template in a set number of passes, however many places there are.

    The first pass predicts all n masked tokens. Pass t = 1, 2, ... hides the n (T - t) / T tokens, rounded down, with
    the smallest probabilities when they were predicted, and predicts them again in the light of the rest. Tokens of
    one pass do not see each other, so quality falls with the number of passes.

    Args:
        model: Predicts masked tokens from both sides, [B, N] -> logits [B, N, V]; `Encoder` is one.
        template: Tokens that stay as they are, such as a source text, and `mask_token` where there is one to find.
        num_passes: T. Passes that would hide nothing, as n (T - t) / T falls below one, are not made.
        mask_token: The token that stands for a hidden one; it is never predicted.

    Shape:
        template: [B, N] int; tokens: [B, N].

    Raises:
        ArgumentError: If the template holds no tokens of the model's, no place is masked, `num_passes` is not positive,
            or the model's logits are not numbers, V of them for each token.

    Source:
        Ghazvininejad et al. 2019, arXiv:1904.09324, section 3.
        Differs from the paper: the length is given by the template instead of being predicted, and source and target
        may be one sequence.
    """
    require_positive_int(num_passes=num_passes)
    check_texts(template, "template")
    open_places = template == mask_token
    if not bool(open_places.any()):
        raise ArgumentError(
            f"template must hold mask_token={mask_token} where tokens are to be found; it holds none. "
            "For a text without a source pass torch.full((B, N), mask_token)."
        )
    num_open = open_places.sum(dim=1, keepdim=True)
    tokens, certainty = template, torch.full(template.shape, float("inf"), device=template.device)
    hidden, done = open_places, 0
    while done < num_passes and bool(hidden.any()):
        with tokens_known(model, template, "template"):
            logits = model(tokens.masked_fill(hidden, mask_token))
        done += 1
        if logits.shape[:-1] != template.shape:
            raise ArgumentError(
                f"model must give logits [{len(template)}, {template.shape[1]}, V]; got {list(logits.shape)}. "
                "Use one with a head on every token, such as Encoder."
            )
        check_logits(logits, f"pass {done}")
        probabilities = logits.float().softmax(dim=-1)
        probabilities[..., mask_token : mask_token + 1] = -1.0  # below every other; a head may know no mask
        best, found = probabilities.max(dim=-1)
        tokens, certainty = torch.where(hidden, found, tokens), torch.where(hidden, best, certainty)
        rank = certainty.argsort(dim=1, stable=True).argsort(dim=1)
        hidden = rank < num_open * (num_passes - done) // num_passes
    return Generation(tokens, done)
