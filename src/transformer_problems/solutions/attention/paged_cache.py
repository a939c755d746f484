"""A key/value cache in pages that are taken from a shared pool as a text grows, and given back."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import token_positions
from transformer_problems.solutions.attention.cache_rules import check_appended


class _Block:
    """One page for each row of a batch; the pages return to the pool when the last cache that holds it is gone."""

    def __init__(self, pages: list[int], filled: int, free: list[int]) -> None:
        self.pages, self.filled = pages, filled  # filled: tokens written so far, by whichever cache is furthest
        weakref.finalize(self, free.extend, pages).atexit = False


class PagePool:
    """Memory for the keys and values of any number of sequences and layers, reserved once.

    A copy is another pool of this size, all of it free: caches stay with the pool that they were filled from.

    Args:
        num_pages: Capacity.
        page_size: Tokens of one sequence and layer that a page holds.
        num_kv_heads: G.
        head_dim: D.

    Shape:
        keys, values: [num_pages, G, page_size, D].

    Raises:
        ArgumentError: If a size is not positive.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        page_size: int = 16,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_positive_int(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
        self.num_pages, self.page_size = num_pages, page_size
        # zeros: room not yet used is part of what a cache shows, and must not hold what is no number
        self.keys = torch.zeros(num_pages, num_kv_heads, page_size, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self._free = list(range(num_pages))[::-1]

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[()]]:
        num_pages, num_kv_heads, page_size, head_dim = self.keys.shape
        sizes = {"page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        return partial(type(self), num_pages, **sizes, device=self.keys.device, dtype=self.keys.dtype), ()

    @property
    def num_free(self) -> int:
        """Pages that no cache holds."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, held by caches or not."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def take(self, num_blocks: int, batch_size: int) -> list[_Block]:
        """Blocks of one page a row.

        Raises:
            ArgumentError: If fewer are free; none is taken then.
        """
        needed = num_blocks * batch_size
        if needed > self.num_free:
            raise ArgumentError(
                f"the page pool must have room for {needed} more pages; {self.num_free} of its {self.num_pages} are "
                f"free. Make num_pages larger, decode fewer sequences at once, or let go of caches no longer needed."
            )
        return [_Block([self._free.pop() for _ in range(batch_size)], 0, self._free) for _ in range(num_blocks)]


@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """A cache that takes a page when it needs one, so no sequence reserves room for its longest possible text.

    At most page_size - 1 tokens of room in each row are held in vain. Caches that continue one prefix share its full
    pages; the page that they part in is copied. Rows of one batch have one length; sequences of different lengths
    take a cache each, from the same pool. For decoding under torch.no_grad(): pages are written in place.

    A copy, deep or not, is the cache itself, which never changes under its holder. It cannot be pickled.

    Args:
        pool: Where pages come from; shared by layers and sequences.

    Shape:
        keys, values: [B, G, M, D], gathered into one tensor for the moment; positions: [M].

    Raises:
        ArgumentError: If batch_size is negative, the pool has no room, keys or values do not fit it or need gradients,
            or the cache is to be pickled.

    Source:
        Kwon et al. 2023, arXiv:2309.06180, section 4.
        Differs from the paper: no kernel attends to pages where they lie, nothing is swapped out when the pool is
        full, and pages return when no cache refers to them.

    Example:
        >>> from transformer_problems import PagedKVCache, PagePool, SelfAttention
        >>> pool = PagePool(64, num_kv_heads=4, head_dim=16)
        >>> layer = SelfAttention(64, num_heads=4, cache=lambda batch_size: PagedKVCache.empty(batch_size, pool=pool))
    """

    batch_size: int
    pool: PagePool = field(repr=False)
    num_seen: int = 0
    _blocks: tuple[_Block, ...] = field(default=(), repr=False)

    @classmethod
    def empty(cls, batch_size: int, *, pool: PagePool) -> Self:
        require_not_negative(batch_size=batch_size)
        return cls(batch_size, pool)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise ArgumentError(
            "a PagedKVCache cannot be pickled: its pages stay with their pool. Where it is needed, append its keys and "
            "values to an empty cache."
        )

    def __len__(self) -> int:
        return self.num_seen

    @property
    def keys(self) -> Tensor:
        return self._gathered(self.pool.keys)

    @property
    def values(self) -> Tensor:
        return self._gathered(self.pool.values)

    @property
    def positions(self) -> Tensor:
        return token_positions(self.num_seen, self.pool.keys.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages held, room in the last ones included; pages shared with other caches count in each."""
        page_bytes = self.pool.num_bytes // self.pool.num_pages
        return page_bytes * self.batch_size * len(self._blocks)

    def tensors(self) -> dict[str, Tensor]:
        if not self._blocks:
            return {}
        return {"keys": self.pool.keys[self._table()], "values": self.pool.values[self._table()]}

    def detach(self) -> Self:
        """The same cache, which never has a gradient history."""
        return self

    def trimmed(self) -> Self:
        """The same cache: it keeps all tokens."""
        return self

    def append(self, k: Tensor, v: Tensor) -> Self:
        """The cache with n more tokens. k, v: [B, G, n, D]."""
        check_appended(k, v, self.batch_size, self.pool.keys)
        if k.requires_grad or v.requires_grad:
            raise ArgumentError("k and v must not need gradients, for pages are shared. Decode under torch.no_grad().")
        size, end = self.pool.page_size, self.num_seen + k.shape[2]
        full, used = divmod(self.num_seen, size)
        parts = used > 0 and self._blocks[-1].filled != used  # another cache went on in the last page
        kept = self._blocks[:full] if parts else self._blocks
        taken = self.pool.take(-(-end // size) - len(kept), self.batch_size)
        longer = replace(self, num_seen=end, _blocks=(*kept, *taken))
        if parts:
            for storage in (self.pool.keys, self.pool.values):
                storage[taken[0].pages, :, :used] = storage[self._blocks[-1].pages, :, :used]
        places = token_positions(k.shape[2], k.device, start=self.num_seen)
        pages, slots = longer._table()[:, places // size], places % size  # [B, n], [n]
        self.pool.keys[pages, :, slots] = k.transpose(1, 2)
        self.pool.values[pages, :, slots] = v.transpose(1, 2)
        for i, block in enumerate(longer._blocks[full:], start=full):
            block.filled = min(size, end - i * size)
        return longer

    def _table(self) -> Tensor:
        """The pages of each row, [B, P]."""
        pages = torch.tensor([block.pages for block in self._blocks], dtype=torch.long, device=self.pool.keys.device)
        return pages.view(len(self._blocks), self.batch_size).T

    def _gathered(self, storage: Tensor) -> Tensor:
        """The tokens held, [B, G, M, D]."""
        return storage[self._table()].transpose(1, 2).flatten(2, 3)[:, :, : self.num_seen]
