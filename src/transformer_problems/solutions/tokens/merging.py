"""Token merging (ToMe): similar tokens become one, which counts for all of them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative, require_share_or_count
from transformer_problems.core.token_slots import Attended, Tokens


class TokenMerging(nn.Module):
    """Joins the most similar pairs of tokens into their average, weighted by how many originals each stands for.

    Real tokens are dealt alternately into two sets; each of the first points at its most similar key of the
    second, and the strongest pointers are merged, all at once. Costs N^2 D / 2 FLOPs, of which later layers save
    more. Needs no training. Later attention must count a token by its size (`WatchedAttention` does).

    Args:
        merge: Tokens that leave each sequence by merging: a share in (0, 0.5] of its real tokens, rounded, or a
            count from 1. At most half of the tokens can be merged in one layer.
        num_protected: The first tokens, never merged, such as the one that a classifier reads.

    Raises:
        ArgumentError: If merge is out of range or num_protected is negative.

    Source:
        Bolya et al. 2023, arXiv:2210.09461, section 3. Differs from the paper: sequences of different lengths
        share a batch, and keys are compared as attention sees them, rotated where positions rotate them.

    Example:
        >>> import torch
        >>> from transformer_problems import Encoder, ReducingEncoder, SelfAttention, TokenMerging, WatchedAttention
        >>> encoder = Encoder(256, 64, 2, lambda: SelfAttention(64, 4, op=WatchedAttention(), is_causal=False))
        >>> shrinking = ReducingEncoder(encoder, [TokenMerging(0.25), None])
        >>> [tokens.x.shape[1] for tokens in shrinking.trace(torch.randint(256, (1, 100)))]
        [75, 75]
    """

    def __init__(self, merge: float, *, num_protected: int = 1) -> None:
        super().__init__()
        require_share_or_count("merge", merge, 0.5)
        require_not_negative(num_protected=num_protected)
        self.merge, self.num_protected = merge, num_protected

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        real = tokens.real
        # Real tokens first, so that padding changes nothing about who meets whom.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        target = order.new_empty(order.shape).scatter_(1, order, self._targets(attended.keys, real, order))
        sizes = (torch.ones_like(attended.received) if tokens.sizes is None else tokens.sizes) * real
        total = torch.zeros_like(sizes).scatter_add(1, target, sizes)
        weighted = tokens.x * sizes[..., None]
        wide = target[..., None].expand_as(weighted)
        x = torch.zeros_like(weighted).scatter_add(1, wide, weighted) / total.masked_fill(total == 0, 1.0)[..., None]
        stays = real & (target == torch.arange(target.shape[1], device=target.device))
        moved = target.gather(1, tokens.sources.clamp(min=0)).masked_fill(tokens.sources < 0, -1)
        # Tokens that met nobody keep their own bits instead of x * size / size.
        alone = (total == sizes)[..., None]
        x = torch.where(alone, tokens.x, x.to(tokens.x.dtype))
        return replace(tokens, x=x, sizes=total, sources=moved).select(stays)

    def extra_repr(self) -> str:
        return f"merge={self.merge}, num_protected={self.num_protected}"

    def _targets(self, keys: Tensor, real: Tensor, order: Tensor) -> Tensor:
        """For each token in `order`, the token that it becomes part of, mostly itself, [B, N]."""
        if order.shape[1] < 2:
            return order
        unit = nn.functional.normalize(keys.detach().gather(1, order[..., None].expand_as(keys)), dim=-1)
        count = real.sum(dim=1, keepdim=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        free = (place >= self.num_protected) & (place < count)
        similar = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, ceil(N/2), floor(N/2)]
        similar = similar.masked_fill(~(free[:, ::2, None] & free[:, None, 1::2]), float("-inf"))
        best, partner = similar.max(dim=-1)
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        wanted = (count * self.merge).round() if isinstance(self.merge, float) else self.merge
        merges = (rank < wanted) & (best > float("-inf"))
        target = order.clone()
        target[:, ::2] = torch.where(merges, order[:, 1::2].gather(1, partner), order[:, ::2])
        return target
