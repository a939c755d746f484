"""The TokenReducer slot: sequences that grow shorter inside a model."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from transformer_problems.core.slots import token_positions


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that are left of a sequence, and what became of the ones it began with.

    Args:
        x: Hidden states, [B, N, C].
        positions: Where each token stood at the beginning, [B, N].
        sources: For each of the N0 original tokens its present place in `x`, -1 where it left, [B, N0].
        key_mask: True for real tokens, [B, N]; None where all are.
        sizes: How many original tokens each one stands for, [B, N]; None where each stands for itself.
    """

    x: Tensor
    positions: Tensor
    sources: Tensor
    key_mask: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def whole(cls, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Self:
        """The sequence before anything left it. positions: [N] or [B, N]."""
        places = token_positions(x.shape[1], x.device).expand(x.shape[:2])
        sources = places if key_mask is None else places.masked_fill(~key_mask, -1)
        return cls(x, places if positions is None else positions.expand(x.shape[:2]), sources, key_mask)

    @property
    def real(self) -> Tensor:
        """[B, N] bool, True for real tokens."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.key_mask is None else self.key_mask

    def select(self, chosen: Tensor) -> Self:
        """Only the chosen tokens, in order; as long as the fullest row, the others padded. chosen: [B, N] bool."""
        counts = chosen.sum(dim=1, keepdim=True)
        length = max(1, int(counts.max()))
        order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
        place = (chosen.cumsum(dim=1) - 1).masked_fill(~chosen, -1)
        left = self.sources < 0
        return replace(
            self,
            x=self.x.gather(1, order[..., None].expand(-1, -1, self.x.shape[-1])),
            positions=self.positions.gather(1, order),
            sources=place.gather(1, self.sources.clamp(min=0)).masked_fill(left, -1),
            key_mask=None if bool((counts == length).all()) else token_positions(length, self.x.device) < counts,
            sizes=None if self.sizes is None else self.sizes.gather(1, order),
        )

    def restore(self, y: Tensor) -> Tensor:
        """Outputs of the tokens that are left, put back in the original places; zeros for those that left.

        Merged tokens all get what their common token has. y: [B, N, ...]; output: [B, N0, ...].
        """
        rows = torch.arange(len(y), device=y.device)[:, None]
        left = self.sources < 0
        return y[rows, self.sources.clamp(min=0)].masked_fill(left.view(*left.shape, *[1] * (y.dim() - 2)), 0)


@dataclass(frozen=True, slots=True)
class Attended:
    """What a layer's attention says about its tokens.

    Args:
        received: Mean attention that each token got, over heads and real queries, [B, N]; sums to one.
        keys: Keys of each token, mean over heads, [B, N, D].
    """

    received: Tensor
    keys: Tensor


class TokenReducer(Protocol):
    """Makes a sequence shorter between the attention and the feed-forward network of a layer.

    What it returns for a row depends on that row's real tokens only, not on padding or on other rows. A module
    that has to learn what to drop may weigh tokens (`sizes`) in training and drop them in evaluation.
    """

    def __call__(self, tokens: Tokens, attended: Attended) -> Tokens: ...
