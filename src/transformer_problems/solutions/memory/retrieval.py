"""Retrieval-augmented generation: cut text into passages, find those that fit a question, put them before it."""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformer_problems.core.arguments import require_positive, require_positive_int
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.memory.passage_files import read_passages, write_passages

Embed = Callable[[list[str]], ArrayLike]
"""n texts -> [n, d]; the same text always has the same vector."""
Tokenize = Callable[[str], list[str]]
Tokens = TypeVar("Tokens", bound=Sequence[Any])


def chunk_tokens(tokens: Tokens, chunk_len: int, stride: int | None = None) -> list[Tokens]:
    """Pieces of `chunk_len` tokens that start every `stride` tokens; the last one may be shorter.

    Args:
        tokens: Any sequence, also a string (characters).
        stride: Default `chunk_len`, where chunks do not overlap.

    Raises:
        ArgumentError: If a length is not positive, or the stride leaves tokens out.
    """
    return [tokens[start:stop] for start, stop in _spans(len(tokens), chunk_len, stride)]  # type: ignore[misc]


def chunk_text(text: str, chunk_len: int, stride: int | None = None) -> list[str]:
    """Pieces of `chunk_len` words, as they stand in the text, that start every `stride` words.

    Raises:
        ArgumentError: If a length is not positive, or the stride leaves words out.

    Source:
        Lewis et al. 2020, arXiv:2005.11401, section 3, which cuts Wikipedia into chunks of 100 words.
    """
    found = [match.span() for match in re.finditer(r"\S+", text)]
    return [text[found[start][0] : found[stop - 1][1]] for start, stop in _spans(len(found), chunk_len, stride)]


def _spans(length: int, chunk_len: int, stride: int | None) -> list[tuple[int, int]]:
    stride = chunk_len if stride is None else stride
    require_positive_int(chunk_len=chunk_len, stride=stride)
    if stride > chunk_len:
        raise ArgumentError(
            f"stride must be at most chunk_len, or tokens are left out; got {stride} and {chunk_len}. "
            f"Choose a stride from 1 to {chunk_len}."
        )
    starts = range(0, max(min(length, 1), length - chunk_len + stride), stride)
    return [(start, min(start + chunk_len, length)) for start in starts]


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found.

    Args:
        score: How well it fits, above zero; comparable within one search only.
        index: Its place in the order in which passages were added.
    """

    passage: str
    score: float
    index: int


class PassageIndex(Protocol):
    """Finds passages. At most k hits, best first, only passages that share something with the query."""

    def search(self, query: str, k: int) -> list[Hit]: ...


class VectorIndex:
    """Finds passages by the cosine of their embedding with the query's: exact search by faiss over all of them.

    A search costs O(n * d), n passages hold n * d * 4 bytes. A passage whose cosine is zero or less is no hit, so a
    query that shares nothing with the passages finds an empty list. The embedder is not saved: `load` needs the same
    one again and checks it on the first passage.

    Args:
        embed: Any callable from n texts to [n, d], e.g. HashedNgrams.

    Raises:
        ArgumentError: If the embedder returns anything but finite [n, d], a query comes before the first passage,
            or a folder holds no whole index of this embedder.
        MissingDependencyError: If faiss is not installed.

    Source:
        Karpukhin et al. 2020, arXiv:2004.04906; Lewis et al. 2020, arXiv:2005.11401, section 2.2.
        Differs from the papers: cosines in place of inner products, exact in place of approximate search, and
        one embedder, not trained here, in place of separate ones for passages and queries.
    """

    def __init__(self, embed: Embed) -> None:
        _faiss()  # if it is missing, that is said here
        self._embed = embed
        self._passages: list[str] = []
        self._vectors: Any = None  # a faiss index

    def __len__(self) -> int:
        return len(self._passages)

    def add(self, passages: Sequence[str]) -> None:
        """Embed and store more passages."""
        _require_strings(passages)
        if not passages:
            return
        vectors = self._unit_vectors(passages)
        self._store(passages, vectors)

    def search(self, query: str, k: int) -> list[Hit]:
        require_positive_int(k=k)
        _require_passages(len(self))
        scores, found = self._vectors.search(self._unit_vectors([query]), min(k, len(self)))
        return [Hit(self._passages[i], float(s), int(i)) for s, i in zip(scores[0], found[0], strict=True) if s > 0]

    def save(self, folder: Path | str) -> None:
        """Write passages and vectors into a folder, which is made where it is missing."""
        empty = np.empty((0, 0), np.float32)
        vectors = empty if self._vectors is None else self._vectors.reconstruct_n(0, len(self))
        write_passages(folder, "vector", self._passages, vectors)

    @classmethod
    def load(cls, folder: Path | str, embed: Embed) -> Self:
        """The index that `save` wrote, read without executing anything."""
        passages, vectors = read_passages(folder, "vector")
        index = cls(embed)
        if passages:
            index._store(passages, vectors)
            first = index._unit_vectors(passages[:1])
            # float32 vectors of unit length, recomputed, agree to about 1e-6 in every feature
            if not np.allclose(first, vectors[:1], atol=1e-4):
                raise ArgumentError(
                    f"embed must be the embedder that made the index in {folder}; it gives the first passage another "
                    "vector. Pass that embedder, or build the index again."
                )
        return index

    def _store(self, passages: Sequence[str], vectors: NDArray[np.float32]) -> None:
        if self._vectors is None:
            self._vectors = _faiss().IndexFlatIP(vectors.shape[1])
        self._vectors.add(vectors)
        self._passages.extend(passages)

    def _unit_vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.array(self._embed(list(texts)), dtype=np.float64)
        dim = vectors.shape[-1] if self._vectors is None and vectors.ndim == 2 else getattr(self._vectors, "d", 0)
        if vectors.shape != (len(texts), dim) or dim == 0:
            raise ArgumentError(
                f"embed must return numbers of shape [{len(texts)}, {dim or 'd'}] for {len(texts)} texts; got "
                f"shape {list(vectors.shape)}. Use one embedder for all passages and queries."
            )
        broken = ~np.isfinite(vectors).all(axis=1)
        if broken.any():
            raise ArgumentError(
                f"embed must return finite numbers; got NaN or infinity for {broken.sum()} of {len(texts)} texts, the "
                f"first {texts[int(broken.argmax())][:40]!r}. Leave out what the embedder cannot embed."
            )
        for order in (np.inf, 2):  # by the largest feature first, so that no square is too large or too small
            lengths = np.linalg.norm(vectors, order, axis=1, keepdims=True)
            vectors /= np.where(lengths == 0, 1, lengths)
        return vectors.astype(np.float32, order="C")


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


class BM25Index:
    """Finds passages by the words they share with the query, rare ones counting most: BM25 by bm25s.

    Scores depend on the whole corpus, so `add` indexes all passages again, O(all words); a search costs O(n). A query
    without a word of the passages finds an empty list. Only passages are saved; `load` indexes them again.

    Args:
        tokenize: From a text to its words.
        k1: How slowly repeated words saturate.
        b: How much long passages are discounted, 0 to 1.

    Raises:
        ArgumentError: If a query comes before the first passage, or a folder holds no whole index.
        MissingDependencyError: If bm25s is not installed.

    Source:
        Robertson and Zaragoza 2009, doi:10.1561/1500000019; bm25s: Lù 2024, arXiv:2407.03618.
        Differs from the source: Lucene's inverse document frequency, which is never negative.
    """

    def __init__(self, tokenize: Tokenize = words, *, k1: float = 1.5, b: float = 0.75) -> None:
        _bm25s()  # if it is missing, that is said here
        require_positive(k1=k1)
        if not 0 <= b <= 1:
            raise ArgumentError(f"b must be from 0 to 1; got {b}. Choose 0.75.")
        self._tokenize, self._k1, self._b = tokenize, k1, b
        self._passages: list[str] = []
        self._scorer: Any = None  # a bm25s index; None where no passage has a word

    def __len__(self) -> int:
        return len(self._passages)

    def add(self, passages: Sequence[str]) -> None:
        """Store more passages and index all of them."""
        _require_strings(passages)
        longer = [*self._passages, *passages]
        corpus = [self._tokenize(passage) for passage in longer]
        scorer = None
        if any(corpus):
            scorer = _bm25s().BM25(k1=self._k1, b=self._b, method="lucene")
            scorer.index(corpus, show_progress=False)
        self._passages, self._scorer = longer, scorer

    def search(self, query: str, k: int) -> list[Hit]:
        require_positive_int(k=k)
        _require_passages(len(self))
        known = [] if self._scorer is None else [w for w in self._tokenize(query) if w in self._scorer.vocab_dict]
        if not known:
            return []
        scores = self._scorer.get_scores(known)
        best = np.argsort(-scores, kind="stable")[:k]
        return [Hit(self._passages[i], float(scores[i]), int(i)) for i in best if scores[i] > 0]

    def save(self, folder: Path | str) -> None:
        """Write the passages into a folder, which is made where it is missing."""
        write_passages(folder, "bm25", self._passages, np.empty((len(self), 0), np.float32))

    @classmethod
    def load(cls, folder: Path | str, tokenize: Tokenize = words, *, k1: float = 1.5, b: float = 0.75) -> Self:
        """An index of the passages that `save` wrote, read without executing anything."""
        passages, _ = read_passages(folder, "bm25")
        index = cls(tokenize, k1=k1, b=b)
        index.add(passages)
        return index


def _faiss() -> ModuleType:
    return require("faiss", extra="retrieval")


def _bm25s() -> ModuleType:
    return require("bm25s", extra="retrieval")


def _require_strings(passages: Sequence[str]) -> None:
    if not isinstance(passages, list | tuple) or not all(isinstance(passage, str) for passage in passages):
        raise ArgumentError(
            f"passages must be a list of strings; got {type(passages).__name__}. Pass [text], or chunk_text(text, 100)."
        )


def _require_passages(count: int) -> None:
    if count == 0:
        raise ArgumentError("the index must hold passages before it is searched; got 0. Call add first.")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generator reads, and the passages it was given, best first."""

    text: str
    hits: tuple[Hit, ...]


class RetrievalAugmented:
    """Puts the passages that fit a query in front of it, as many as have room.

    An answer can then rest on any passage of the index, at the cost of one search and of the room that passages take.
    A query without hits gets a prompt without passages.

    Args:
        index: Finds the passages.
        num_passages: Most passages in a prompt.
        template: The prompt, with {passages} and {query} in it.
        separator: Stands between two passages.

    Raises:
        ArgumentError: If the template names other fields, or the prompt has no room for the query alone.

    Source:
        Lewis et al. 2020, arXiv:2005.11401, sections 2.1 to 2.3. Differs from the paper: all passages stand in one
        prompt, where the paper generates from each passage apart and sums the probabilities; and neither the
        embedder nor the generator is trained for it here.
    """

    def __init__(
        self,
        index: PassageIndex,
        *,
        num_passages: int = 4,
        template: str = "{passages}\n\n{query}",
        separator: str = "\n\n",
    ) -> None:
        require_positive_int(num_passages=num_passages)
        fields = sorted(field for _, field, _, _ in string.Formatter().parse(template) if field is not None)
        if fields != ["passages", "query"]:
            raise ArgumentError(
                f"template must name {{passages}} and {{query}} once each and no other field; got {template!r}. "
                "Double any other brace."
            )
        self.index, self.num_passages, self.template, self.separator = index, num_passages, template, separator

    def prompt(self, query: str, *, max_len: int, length: Callable[[str], int] = len) -> Prompt:
        """The prompt of a query, no longer than `max_len`; a passage without room gives way to the next one.

        Args:
            max_len: Longest prompt, in the unit of `length`.
            length: Measures a prompt, e.g. the number of its tokens. Default characters.
        """
        chosen: list[Hit] = []
        text = self._filled(chosen, query)
        if length(text) > max_len:
            raise ArgumentError(
                f"max_len must have room for the template and the query; got {max_len}, and they take {length(text)}. "
                "Raise max_len or shorten the query."
            )
        for hit in self.index.search(query, self.num_passages):
            longer = self._filled([*chosen, hit], query)
            if length(longer) <= max_len:
                chosen, text = [*chosen, hit], longer
        return Prompt(text, tuple(chosen))

    def _filled(self, hits: list[Hit], query: str) -> str:
        return self.template.format(passages=self.separator.join(hit.passage for hit in hits), query=query)
