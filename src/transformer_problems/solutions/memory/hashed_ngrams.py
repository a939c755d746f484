"""Text embedded without a model: hashed character n-grams, weighted by how rare they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: spreads neighbouring codes


@dataclass(frozen=True, slots=True, eq=False)
class HashedNgrams:
    """Embeds texts as counts of their n-grams of bytes, each hashed to one of `dim` features with a sign.

    A count c weighs log(1 + c), times log((1 + n) / (1 + document frequency)) + 1 once fitted. The same text has the
    same vector on every machine. Texts that share wording are near, texts that share only a meaning are not. Costs
    O(bytes) a text, and d numbers to hold it.

    Args:
        dim: d, features; fewer means more n-grams that cannot be told apart.
        sizes: Smallest and largest n-gram, in bytes.
        rarity: Weight of each feature, [d]; None weighs all alike. Comes from `fitted`.

    Shape:
        texts: n strings; output: [n, d] float32, of unit length but for texts shorter than an n-gram, which are zero.

    Raises:
        ArgumentError: If `dim` is not positive, or `sizes` are not increasing from 1.

    Source:
        Weinberger et al. 2009, arXiv:0902.2206 (signed hashing); Spärck Jones 1972 (inverse document frequency).
    """

    dim: int = 4096
    sizes: tuple[int, int] = (3, 5)
    rarity: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        require_positive_int(dim=self.dim)
        if not 1 <= self.sizes[0] <= self.sizes[1]:
            raise ArgumentError(f"sizes must be two rising numbers from 1; got {self.sizes}. Choose (3, 5).")

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            counts = self._counts(text)
            row[:] = np.sign(counts) * np.log1p(np.abs(counts)) * (1.0 if self.rarity is None else self.rarity)
            row /= np.linalg.norm(row) or 1.0
        return vectors

    def fitted(self, texts: Sequence[str]) -> Self:
        """The same embedder with features weighted by how few of the texts have them."""
        present = np.zeros(self.dim)
        for text in texts:
            present += self._counts(text) != 0
        rarity = np.log((1 + len(texts)) / (1 + present)) + 1.0
        return replace(self, rarity=rarity.astype(np.float32))

    def _counts(self, text: str) -> NDArray[np.float64]:
        """Signed counts of the features, [d]."""
        data = np.frombuffer(f" {' '.join(text.lower().split())} ".encode(errors="replace"), np.uint8)
        data = data.astype(np.uint64) + np.uint64(1)
        counts, codes = np.zeros(self.dim), np.zeros(len(data), np.uint64)
        for size in range(1, min(self.sizes[1], len(data)) + 1):
            codes = codes[: len(data) - size + 1] * np.uint64(257) + data[size - 1 :]  # wraps beyond 2^64
            if size >= self.sizes[0]:
                hashed = _mixed(codes)
                buckets = (hashed >> np.uint64(1)) % np.uint64(self.dim)
                signs = (hashed & np.uint64(1)).astype(np.float64) * 2.0 - 1.0
                counts += np.bincount(buckets.astype(np.int64), weights=signs, minlength=self.dim)
        return counts


def _mixed(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Codes whose every bit depends on all bits of the n-gram."""
    codes = (codes ^ (codes >> np.uint64(32))) * _MULTIPLIER
    codes = (codes ^ (codes >> np.uint64(29))) * _MULTIPLIER
    return codes ^ (codes >> np.uint64(32))
