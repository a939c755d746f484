"""Hashed n-grams against counting without hashing, and their promises about texts."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.memory.hashed_ngrams import HashedNgrams


def grams(text: str, smallest: int, largest: int) -> Counter[bytes]:
    data = f" {' '.join(text.lower().split())} ".encode()
    return Counter(data[i : i + n] for n in range(smallest, largest + 1) for i in range(len(data) - n + 1))


def cosine(one: Counter[bytes], other: Counter[bytes], rarity: dict[bytes, float] | None = None) -> float:
    def weigh(counts: Counter[bytes]) -> dict[bytes, float]:
        return {gram: math.log1p(c) * (1.0 if rarity is None else rarity[gram]) for gram, c in counts.items()}

    a, b = weigh(one), weigh(other)
    product = sum(a[gram] * b[gram] for gram in a.keys() & b.keys())
    return product / math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))


TEXTS = [
    "The red door opens.",
    "the door is red, the RED door!",
    "Nothing alike: 12345",
    "another door opens, is it red?",
]


def test_cosines_are_those_of_counting_where_nothing_collides() -> None:
    vectors = HashedNgrams(1 << 20, sizes=(2, 4))(TEXTS)
    counted = [[cosine(grams(a, 2, 4), grams(b, 2, 4)) for b in TEXTS] for a in TEXTS]
    # a million features for some hundred n-grams; float32
    np.testing.assert_allclose(vectors @ vectors.T, counted, atol=1e-6)


def test_fitted_weighs_by_document_frequency() -> None:
    vectors = HashedNgrams(1 << 20, sizes=(2, 4)).fitted(TEXTS)(TEXTS)
    having = Counter(gram for text in TEXTS for gram in grams(text, 2, 4))
    rarity = {gram: math.log((1 + len(TEXTS)) / (1 + n)) + 1 for gram, n in having.items()}
    counted = [[cosine(grams(a, 2, 4), grams(b, 2, 4), rarity) for b in TEXTS] for a in TEXTS]
    np.testing.assert_allclose(vectors @ vectors.T, counted, atol=1e-6)  # as above


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_has_unit_length_or_is_zero(texts: list[str]) -> None:
    embed = HashedNgrams(64)
    vectors = embed(texts)
    assert vectors.shape == (len(texts), 64) and vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    assert all(length == 0 or abs(length - 1) < 1e-5 for length in lengths)  # float32, 64 terms
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(embed([text])[0], vector)


def test_case_and_spaces_do_not_count() -> None:
    one, other = HashedNgrams(256)(["The  Red\nDoor ", "the red door"])
    np.testing.assert_array_equal(one, other)


def test_text_shorter_than_an_ngram_is_zero() -> None:
    assert not HashedNgrams(256, sizes=(5, 6))(["", "ab"]).any()


def test_collisions_cancel_on_average() -> None:
    """Unrelated texts in few features: cosines spread around zero by about 1 / sqrt(dim), thanks to the signs."""
    draws = np.random.default_rng(0)
    texts = ["".join(map(chr, draws.integers(97, 123, 80))) for _ in range(200)]
    vectors = HashedNgrams(128, sizes=(5, 5))(texts)
    cosines = (vectors @ vectors.T)[np.triu_indices(200, 1)]
    assert abs(cosines.mean()) < 0.01  # its own spread: 0.09 / sqrt(19,900 pairs) and a little more, pairs overlapping
    assert 0.8 / math.sqrt(128) < cosines.std() < 1.2 / math.sqrt(128)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="dim must be positive; got 0"):
        HashedNgrams(0)
    with pytest.raises(ArgumentError, match="dim must be a positive whole number; got 8.0"):
        HashedNgrams(8.0)  # type: ignore[arg-type]
    for sizes in ((0, 3), (4, 3)):
        with pytest.raises(ArgumentError, match="sizes must be two rising numbers from 1"):
            HashedNgrams(8, sizes=sizes)
