"""Performer: softmax attention estimated with positive random features, at linear cost."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_same_batch
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.scores import (
    causal_mask,
    check_shapes,
    has_pairs,
    key_mask_of,
    without_pairs,
)

# A feature e^-40 times its token's largest is below the rounding of float64; two such multiply to e^-80, which
# float32 can still hold, so that no visible key is ever lost to underflow.
_LOG_FLOOR = -40.0


@dataclass(frozen=True, slots=True)
class PerformerState:
    """Sums over all keys so far: all that a later query needs, of a size that does not depend on their number.

    Args:
        num_seen: Tokens seen.
        sums: sum_j phi(k_j) [v_j, 1] / exp(log_scale), [..., G, m, D + 1]; None before the first token.
        log_scale: Logarithm of the largest feature among the keys so far, [..., G, 1, 1].
    """

    num_seen: int = 0
    sums: Tensor | None = None
    log_scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        if self.sums is None or self.log_scale is None:
            return {}
        return {"sums": self.sums, "log_scale": self.log_scale}

    def detach(self) -> Self:
        if self.sums is None:
            return self
        return replace(self, sums=self.sums.detach())  # log_scale never has a gradient


class Performer(nn.Module):
    """phi(q) (phi(k)^T v) / (phi(q) phi(k)^T 1) with positive features phi, whose mean product is exp(q k^T / sqrt(D)).

    phi_f(x) = exp(w_f x - |x|^2 / 2) with x scaled by D^(-1/4) and m Gaussian directions w_f, orthogonal in blocks
    of D. Time and memory grow as N * m; the error of the estimated kernel falls as 1 / sqrt(m) and grows
    exponentially with the norms of q and k. Causal attention takes its tokens in chunks: within a chunk by a masked
    product, from earlier chunks through running sums, which also serve as its streaming state.

    The directions are a persistent buffer: they are saved with the model and come back with it, whatever `seed` the
    reloaded model was built with. Features and sums are computed in float32 or wider. Casting the module to bfloat16
    rounds the directions too.

    Args:
        head_dim: D.
        num_features: m. Default D ln D, rounded, after the paper's bound m = O(D log D).
        chunk_size: Tokens taken together.
        seed: Draws the directions; equal seeds give equal directions.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: [..., 1, 1, M]; output: [..., H, N, D].

    Raises:
        ArgumentError: If a size is not positive or not `head_dim`, a bias is asked for, the mask is not a key mask,
            or q, k, v and mask do not fit each other.

    Example:
        >>> from transformer_problems import Performer, SelfAttention
        >>> layer = SelfAttention(64, num_heads=4, op=Performer(head_dim=16))
        >>> layer.op.redraw(seed=1)  # in training, every thousand steps or so

    Source:
        Choromanski et al. 2021, arXiv:2009.14794, sections 2.2 to 2.4 and appendix B.1.
        Differs from the paper: stabilised without its maximum over all keys, which would let a query see the future
        and a stream differ from the whole. Each key's features are divided by the largest of its own, and that
        scale enters the sums relative to the largest scale so far, a running maximum kept in the state; both cancel
        in the quotient. In place of the paper's constant added to every feature, features are kept above e^-40
        times the token's largest.
    """

    accepts_bias = False
    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        num_features: int | None = None,
        chunk_size: int = 128,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(head_dim=head_dim, chunk_size=chunk_size)
        num_features = max(1, round(head_dim * math.log(head_dim))) if num_features is None else num_features
        require_positive_int(num_features=num_features)
        self.head_dim, self.num_features, self.chunk_size = head_dim, num_features, chunk_size
        directions = orthogonal_directions(num_features, head_dim, seed=seed)
        self.register_buffer("directions", directions.to(device=device, dtype=dtype))

    def redraw(self, seed: int) -> None:
        """Replace the directions, so that training does not adapt to one draw. States from before are then invalid."""
        self.directions.copy_(orthogonal_directions(self.num_features, self.head_dim, seed=seed))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self._check(q, k, v, mask, bias)
        if bias is not None:
            raise ArgumentError(
                "bias must be None for Performer, which never forms scores; "
                f"got one from {type(bias.encoding).__name__}. Use RotaryEmbedding or an encoding that is added to "
                "the embeddings."
            )
        if not has_pairs(q, k):
            return without_pairs(q, k, v)
        key_mask = None if mask is None else key_mask_of(mask, "Performer")[..., None, None, :, None]
        y, _ = self._attend(q, k, v, PerformerState(), key_mask, is_causal=is_causal)
        return y

    def initial_state(self, batch_size: int) -> PerformerState:
        """The state before the first token; it takes its batch size from the first chunk."""
        return PerformerState()

    def stream(self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState) -> tuple[Tensor, PerformerState]:
        """The next n tokens, q: [B, H, n, D] -> [B, H, n, D], and the state after them."""
        self._check(q, k, v, None, None)
        if state.sums is not None:
            check_same_batch(q, len(state.sums))
        return self._attend(q, k, v, state, None, is_causal=True)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, num_features={self.num_features}, chunk_size={self.chunk_size}"

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, key_mask: Tensor | None, *, is_causal: bool
    ) -> tuple[Tensor, PerformerState]:
        """Answers and the state after the keys. key_mask: [..., 1, 1, M, 1]."""
        grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])  # [..., G, H/G, N, D]
        keys = _Keys(k.unsqueeze(-3), v.unsqueeze(-3), key_mask)
        answer = self._causal if is_causal else self._bidirectional
        y, state = answer(grouped, keys, state)
        return y.flatten(-4, -3).to(v.dtype), state

    def _bidirectional(self, q: Tensor, keys: "_Keys", state: PerformerState) -> tuple[Tensor, PerformerState]:
        for chunk in keys.chunks(0, len(keys), self.chunk_size):
            state = self._absorb(state, *self._key_features(chunk))
        assert state.sums is not None, "there is at least one key"
        parts = [_quotient(self._features(part)[0] @ state.sums) for part in torch.split(q, self.chunk_size, dim=-2)]
        return torch.cat(parts, dim=-2), state

    def _causal(self, q: Tensor, keys: "_Keys", state: PerformerState) -> tuple[Tensor, PerformerState]:
        earlier = len(keys) - q.shape[-2]  # keys before the first query's own
        for chunk in keys.chunks(0, earlier, self.chunk_size):
            state = self._absorb(state, *self._key_features(chunk))
        parts = []
        seeing = q[..., max(0, -earlier) :, :]
        chunks = keys.chunks(max(0, earlier), len(keys), self.chunk_size)
        for part, chunk in zip(torch.split(seeing, self.chunk_size, dim=-2), chunks, strict=True):
            y, state = self._causal_chunk(part, chunk, state)
            parts.append(y)
        return nn.functional.pad(torch.cat(parts, dim=-2), (0, 0, max(0, -earlier), 0)), state

    def _causal_chunk(self, q: Tensor, keys: "_Keys", state: PerformerState) -> tuple[Tensor, PerformerState]:
        """As many queries as keys, each seeing the past and the keys up to its own."""
        q_features, _ = self._features(q)
        k_features, log_scale, values = self._key_features(keys)
        largest = log_scale.detach().cummax(dim=-2).values.clamp(min=torch.finfo(log_scale.dtype).min)
        if state.log_scale is not None:
            largest = torch.maximum(largest, state.log_scale)
        visible = causal_mask(len(keys), len(keys), q.device)
        scales = (log_scale.mT - largest).masked_fill(~visible, float("-inf")).exp()
        sums = (q_features @ k_features.mT * scales) @ values
        if state.sums is not None and state.log_scale is not None:
            sums = sums + (state.log_scale - largest).exp() * (q_features @ state.sums)
        return _quotient(sums), self._absorb(state, k_features, log_scale, values)

    def _absorb(self, state: PerformerState, k_features: Tensor, log_scale: Tensor, values: Tensor) -> PerformerState:
        """The state with n more keys. k_features: [..., n, m]; log_scale: [..., n, 1]; values: [..., n, D + 1]."""
        largest = log_scale.detach().amax(dim=-2, keepdim=True).clamp(min=torch.finfo(log_scale.dtype).min)
        if state.log_scale is not None:
            largest = torch.maximum(largest, state.log_scale)
        sums = k_features.mT @ (values * (log_scale - largest).exp())
        if state.sums is not None and state.log_scale is not None:
            sums = sums + state.sums * (state.log_scale - largest).exp()
        return PerformerState(state.num_seen + values.shape[-2], sums, largest)

    def _key_features(self, keys: "_Keys") -> tuple[Tensor, Tensor, Tensor]:
        """Features, their log scale (-inf for masked keys), and values with a one appended."""
        features, log_scale = self._features(keys.k)
        if keys.mask is not None:
            log_scale = log_scale.masked_fill(~keys.mask, float("-inf"))
        return features, log_scale, nn.functional.pad(keys.v.to(features.dtype), (0, 1), value=1.0)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """phi(x) / exp(log_scale), [..., n, m] and at most 1, and log_scale [..., n, 1]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
        logs = x @ self.directions.to(x.dtype).mT
        largest = logs.detach().amax(dim=-1, keepdim=True)
        log_scale = largest - x.square().sum(dim=-1, keepdim=True) / 2
        return (logs - largest).clamp(min=_LOG_FLOOR).exp(), log_scale

    def _check(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: PositionBias | None) -> None:
        check_shapes(q, k, v, mask, bias)
        (num_heads, head_dim), num_kv_heads = (q.shape[-3], q.shape[-1]), k.shape[-3]
        require_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        if head_dim != self.head_dim:
            raise ArgumentError(
                f"head_dim must equal the last dimension of q; got {self.head_dim} and {head_dim}. "
                f"Build Performer with head_dim={head_dim}."
            )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys, values and key mask that are cut together; tokens in the last dimension but one."""

    k: Tensor  # [..., G, 1, M, D]
    v: Tensor
    mask: Tensor | None  # [..., 1, 1, M, 1]

    def __len__(self) -> int:
        return self.k.shape[-2]

    def chunks(self, start: int, stop: int, size: int) -> Iterator["_Keys"]:
        for first in range(start, stop, size):
            part = slice(first, min(stop, first + size))
            mask = None if self.mask is None else self.mask[..., part, :]
            yield _Keys(self.k[..., part, :], self.v[..., part, :], mask)


def orthogonal_directions(num_features: int, head_dim: int, *, seed: int) -> Tensor:
    """Gaussian vectors that are orthogonal within each block of `head_dim`, [num_features, head_dim] float32.

    Each vector alone is distributed as N(0, I), which keeps the estimated kernel unbiased: the directions of a block
    are those of a uniformly random rotation, and the lengths are drawn from Gaussian vectors of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_features // head_dim)
    basis, triangle = torch.linalg.qr(torch.randn(num_blocks, head_dim, head_dim, generator=generator))
    # without the signs of the diagonal the rotation is not uniform
    rotation = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = torch.randn(num_features, head_dim, generator=generator).square().sum(dim=-1, keepdim=True).sqrt()
    directions: Tensor = rotation.mT.flatten(0, 1)[:num_features] * lengths
    return directions


def _quotient(sums: Tensor) -> Tensor:
    """Weighted values over the sum of weights, [..., D + 1] -> [..., D]; zero where no key is visible."""
    values, weights = sums[..., :-1], sums[..., -1:]
    return values / weights.masked_fill(weights == 0.0, 1.0)
