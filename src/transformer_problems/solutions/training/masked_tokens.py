"""Masked language modelling: some tokens are hidden, and the model learns to tell what they were."""

from collections.abc import Iterable

import torch
from torch import Tensor

from transformer_problems.core.arguments import (
    require_not_negative,
    require_positive,
    require_positive_int,
    require_share,
)
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.distillation import IGNORED

_MASKED, _REPLACED = 0.8, 0.1  # of the chosen tokens; the others stay as they are


def mask_tokens(
    tokens: Tensor,
    *,
    mask_token: int,
    vocab_size: int,
    share: float = 0.15,
    special: Iterable[int] = (),
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A batch of masked prediction: tokens chosen at random are to be told from what is around them.

    Of the chosen, 80% become the mask token, 10% a random token and 10% stay as they are. A model that only ever saw
    masks would learn nothing of tokens that are not masked, and later tasks have no masks; here any token may be wrong,
    so each must be understood from its context. A batch has at least one target, for a mean over none is not a number.

    Args:
        mask_token: Stands for what is hidden.
        vocab_size: Random tokens are below it, those of `special` among them; leave the mask token out by giving the
            number of the others.
        share: Chance of each token to be chosen.
        special: Tokens that are never chosen, such as padding and separators.
        generator: Makes every choice, on its own device.

    Shape:
        tokens: [...] int; inputs, targets: [...] int64, targets -100 where nothing was chosen.

    Raises:
        ArgumentError: If tokens are no whole numbers or all special, or an argument is out of range.

    Source:
        Devlin et al. 2018, arXiv:1810.04805, section 3.1 and appendix A.1.
        Differs from the paper: each token is chosen independently, so the number of targets varies around `share`.

    Example:
        >>> import torch
        >>> from transformer_problems import mask_tokens
        >>> text, draws = torch.arange(1, 9)[None], torch.Generator().manual_seed(0)
        >>> inputs, targets = mask_tokens(text, mask_token=0, vocab_size=9, generator=draws)
        >>> logits = torch.randn(1, 8, 9)  # a model's for the inputs
        >>> loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    """
    require_not_negative(mask_token=mask_token)
    require_positive_int(vocab_size=vocab_size)
    require_positive(share=share)
    require_share(share=share)
    if tokens.is_floating_point():
        raise ArgumentError(f"tokens must be whole numbers; got {tokens.dtype}. Pass token ids.")
    device = generator.device
    text = tokens.to(device, torch.int64)
    ordinary = ~torch.isin(text, torch.tensor(list(special), dtype=torch.int64, device=device))
    if not bool(ordinary.any()):
        raise ArgumentError(
            f"tokens must hold at least one that is not special; got {list(tokens.shape)} without one. Leave them out."
        )
    draw = torch.rand(text.shape, generator=generator, device=device).masked_fill(~ordinary, 2.0)  # never below a share
    chosen = draw <= draw.min().clamp(min=share)  # the lowest draw is a target, also where it lies above the share
    kind = torch.rand(text.shape, generator=generator, device=device)
    inputs = text.masked_fill(chosen & (kind < _MASKED), mask_token)
    replaced = chosen & (kind >= _MASKED) & (kind < _MASKED + _REPLACED)
    inputs = torch.where(replaced, torch.randint(vocab_size, text.shape, generator=generator, device=device), inputs)
    return inputs.to(tokens.device), text.masked_fill(~chosen, IGNORED).to(tokens.device)
