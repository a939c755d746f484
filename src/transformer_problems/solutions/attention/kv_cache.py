"""The keys and values of the tokens seen so far."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_not_negative
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.cache_rules import check_appended, require_held

_SPARE = 16  # tokens of room beyond twice those kept, so that a window of a few need not move for each that comes


@dataclass
class _Buffer:
    """Growing storage shared by the caches of one stream; `filled` is where the newest of them ends."""

    k: Tensor  # [B, G, capacity, D]
    v: Tensor
    filled: int

    def takes(self, num_tokens: int, *, behind: int) -> bool:
        """Whether so many tokens can be written behind this end: nobody has, there is room, and PyTorch lets us."""
        frozen = self.k.is_inference() and not torch.is_inference_mode_enabled()
        return self.filled == behind and behind + num_tokens <= self.k.shape[2] and not frozen


@dataclass(frozen=True, slots=True)
class KVCache:
    """An append-only cache of keys and values that never changes under its holder.

    `append` writes into spare room behind the newest cache and returns a new view, so a token costs amortised
    constant time; appending to an older cache copies first, so one prefix can be continued in several ways. Once
    trimmed, its storage is at most twice what it holds and 16 tokens: a larger buffer is left behind.

    Args:
        lookback: Keys before a query's own that are ever needed; older ones are dropped. None keeps all.
        num_sinks: First tokens that are kept whatever their age.

    Shape:
        keys, values: [B, G, M, D] with M the tokens held, sinks first; positions: [M].

    Raises:
        ArgumentError: If a size is negative, or keys and values do not fit each other or those held.

    Source:
        Pope et al. 2022, arXiv:2211.05102, section 2.1; the sinks are those of Xiao et al. 2023, arXiv:2309.17453.
    """

    batch_size: int
    lookback: int | None = None
    num_sinks: int = 0
    num_seen: int = 0
    _buffer: _Buffer | None = None
    _dropped: int = 0  # slots of the buffer, between the sinks and the tokens after them, that are no longer held
    _end: int = 0

    @classmethod
    def empty(cls, batch_size: int, *, lookback: int | None = None, num_sinks: int = 0) -> Self:
        require_not_negative(batch_size=batch_size, num_sinks=num_sinks)
        if lookback is not None:
            require_not_negative(lookback=lookback)
        return cls(batch_size, lookback, num_sinks)

    def __len__(self) -> int:
        return self._end - self._dropped

    @property
    def keys(self) -> Tensor:
        return self._view(self._held.k)

    @property
    def values(self) -> Tensor:
        return self._view(self._held.v)

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens held: the sinks', then the last of all that were seen."""
        index = torch.arange(len(self), device=self._held.k.device)
        return index + (index >= self.num_sinks) * (self.num_seen - len(self))

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values held, without spare room."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._buffer is None else {"keys": self.keys, "values": self.values}

    def detach(self) -> Self:
        return self if self._buffer is None else self._holding(self.keys.detach(), self.values.detach())

    def append(self, k: Tensor, v: Tensor) -> Self:
        """The cache with n more tokens. k, v: [B, G, n, D]."""
        buffer = self._buffer
        check_appended(k, v, self.batch_size, None if buffer is None else buffer.k)
        n = k.shape[2]
        past = () if buffer is None else (buffer.k, buffer.v)
        if any(x.requires_grad for x in (k, v, *past)):
            held = (k, v) if buffer is None else (torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2))
            return self._with(_Buffer(*held, len(self) + n), 0, n)
        if buffer is None or not buffer.takes(n, behind=self._end):
            buffer, dropped = self._moved(k, len(self) + n), 0
        else:
            dropped = self._dropped
        end = dropped + len(self)
        buffer.k[:, :, end : end + n] = k
        buffer.v[:, :, end : end + n] = v
        buffer.filled = end + n
        return self._with(buffer, dropped, n)

    def trimmed(self) -> Self:
        """The cache without the tokens that no later query can see, and in a smaller buffer where that is due."""
        if self.lookback is None or len(self) <= self.num_sinks + self.lookback:
            return self
        kept = replace(self, _dropped=self._end - self.num_sinks - self.lookback)
        if self._held.k.shape[2] <= 2 * len(kept) + _SPARE:
            return kept
        return kept._holding(kept.keys.clone(), kept.values.clone())

    def truncated(self, num_tokens: int) -> Self:
        """The cache as it was when it had seen `num_tokens` only; costs nothing until the next append, which copies.

        Tokens of the last append can be taken back, also where it made trimmed ones leave, unless they were over 16
        more than the cache keeps.

        Raises:
            ArgumentError: If it has not seen as many, or has let tokens go that a query there would see.
        """
        if not 0 <= num_tokens <= self.num_seen:
            raise ArgumentError(f"num_tokens must be from 0 to the {self.num_seen} tokens seen; got {num_tokens}.")
        end = self._end - (self.num_seen - num_tokens)
        if self.lookback is None:
            return replace(self, num_seen=num_tokens, _end=end)
        spare = end - self.num_sinks - self.lookback
        if spare < 0 and self._end < self.num_seen:
            raise ArgumentError(
                f"num_tokens must be at least {num_tokens - spare}; got {num_tokens}, and tokens that the cache held "
                "then are gone. Keep the earlier cache instead: it stays valid."
            )
        return replace(self, num_seen=num_tokens, _dropped=min(self._dropped, max(spare, 0)), _end=end)

    def _view(self, x: Tensor) -> Tensor:
        """The slots held, [B, G, M, D]; copied where sinks and the rest lie apart."""
        recent = x[:, :, self.num_sinks + self._dropped : self._end]
        if self._dropped == 0:
            return x[:, :, : self._end]
        return recent if self.num_sinks == 0 else torch.cat([x[:, :, : self.num_sinks], recent], dim=2)

    def _with(self, buffer: _Buffer, dropped: int, added: int) -> Self:
        end = dropped + len(self) + added
        return replace(self, num_seen=self.num_seen + added, _buffer=buffer, _dropped=dropped, _end=end)

    def _holding(self, keys: Tensor, values: Tensor) -> Self:
        """The same tokens in a buffer of their own."""
        return replace(self, _buffer=_Buffer(keys, values, len(self)), _dropped=0, _end=len(self))

    def _moved(self, k: Tensor, needed: int) -> _Buffer:
        """A buffer with the held tokens at its front and room; in a window not for what soon leaves it."""
        room = 2 * needed if self.lookback is None else max(needed, 2 * len(self) + _SPARE)
        shape = (*k.shape[:2], room, k.shape[-1])
        moved = _Buffer(k.new_empty(shape), k.new_empty(shape), len(self))
        if self._buffer is not None:
            moved.k[:, :, : len(self)] = self.keys
            moved.v[:, :, : len(self)] = self.values
        return moved

    @property
    def _held(self) -> _Buffer:
        return require_held(self._buffer)
