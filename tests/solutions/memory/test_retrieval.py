"""Chunks, both indices and the prompt, against definitions written out and against damaged files."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, OutputError
from transformer_problems.solutions.memory import retrieval
from transformer_problems.solutions.memory.hashed_ngrams import HashedNgrams
from transformer_problems.solutions.memory.retrieval import (
    BM25Index,
    Hit,
    RetrievalAugmented,
    VectorIndex,
    chunk_text,
    chunk_tokens,
    words,
)

PASSAGES = [
    "The passkey of the red door is 48213.",
    "Ferries leave the harbour at noon, except on Sundays.",
    "The red harbour crane was built in 1904.",
    "A generator yields one value after the other.",
]
EMBED = HashedNgrams(512)
INDICES = {"vector": lambda: VectorIndex(EMBED), "bm25": BM25Index}
LOADERS = {"vector": lambda folder: VectorIndex.load(folder, EMBED), "bm25": BM25Index.load}


@pytest.fixture(params=INDICES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def index(kind: str) -> VectorIndex | BM25Index:
    built = INDICES[kind]()
    built.add(PASSAGES[:2])
    built.add(PASSAGES[2:])
    return built


@given(length=st.integers(0, 40), chunk_len=st.integers(1, 12), data=st.data())
def test_chunks_cover_everything_once_a_stride(length: int, chunk_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, chunk_len))
    chunks = chunk_tokens(list(range(length)), chunk_len, stride)
    assert [chunk[0] for chunk in chunks] == [i * stride for i in range(len(chunks))]
    assert all(chunk == list(range(chunk[0], chunk[-1] + 1)) for chunk in chunks)
    assert all(len(chunk) == chunk_len for chunk in chunks[:-1])
    assert {token for chunk in chunks for token in chunk} == set(range(length))
    assert len(chunks) < 2 or chunks[-2][-1] < length - 1, "the last chunk has nothing new"


def test_text_is_cut_at_words_and_left_as_it_was() -> None:
    text = "  one two\n three  four five "
    assert chunk_text(text, 2) == ["one two", "three  four", "five"]
    assert chunk_text(text, 3, 2) == ["one two\n three", "three  four five"]
    assert chunk_text(" \n", 3) == []
    assert chunk_tokens("abcde", 2) == ["ab", "cd", "e"]


def test_wrong_chunks_are_refused() -> None:
    with pytest.raises(ArgumentError, match="stride must be at most chunk_len.*got 5 and 4. Choose a stride from 1 to"):
        chunk_tokens("abc", 4, 5)
    with pytest.raises(ArgumentError, match="chunk_len must be positive; got 0"):
        chunk_text("abc", 0)
    with pytest.raises(ArgumentError, match="chunk_len must be a positive whole number; got 2.5"):
        chunk_tokens("abc", 2.5)  # type: ignore[arg-type]


def test_finds_the_passage_that_shares_the_most(index: VectorIndex | BM25Index) -> None:
    hits = index.search("What is the passkey of the red door?", 2)
    assert len(hits) == 2 and hits[0].score > hits[1].score > 0
    assert (hits[0].passage, hits[0].index) == (PASSAGES[0], 0)
    assert index.search("the crane in the harbour", 9)[0].index == 2
    assert len(index) == 4


def test_vector_scores_are_cosines() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8))
    texts = [str(i) for i in range(50)]
    index = VectorIndex(lambda asked: np.stack([rows[int(text)] for text in asked]))
    index.add(texts)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit[7]
    expected = [int(i) for i in np.argsort(-cosines) if cosines[i] > 0]
    hits = index.search("7", 50)
    assert [hit.index for hit in hits] == expected
    # float32: 8 products of numbers below one
    np.testing.assert_allclose([hit.score for hit in hits], cosines[expected], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-30, 1e30, "largest", "smallest"])
def test_vectors_of_any_length_are_compared_by_their_direction(size: float | str, dtype: type[np.floating]) -> None:
    factor = {"largest": np.finfo(dtype).max / 8, "smallest": np.finfo(dtype).tiny}.get(size, size)
    rows = np.random.default_rng(0).normal(size=(20, 8)).clip(-4, 4)
    sizes = np.where(np.arange(20) % 2, factor, 1.0)[:, None]
    plain, scaled = (
        VectorIndex(lambda asked, rows=rows: np.stack([rows[int(text)] for text in asked]))
        for rows in (rows, (rows * sizes).astype(dtype))
    )
    for index in (plain, scaled):
        index.add([str(i) for i in range(20)])
    for query in ("4", "7"):  # a short one and a long one
        expected, hits = plain.search(query, 20), scaled.search(query, 20)
        assert [hit.index for hit in hits] == [hit.index for hit in expected]
        # float32: 8 products of numbers below one
        np.testing.assert_allclose([h.score for h in hits], [h.score for h in expected], atol=1e-6)


def test_bm25_scores_are_the_formula() -> None:
    index = BM25Index(k1=1.2, b=0.6)
    index.add(PASSAGES)
    corpus = [words(passage) for passage in PASSAGES]
    mean_len = sum(map(len, corpus)) / len(corpus)

    def score(query: str, document: list[str]) -> float:
        total = 0.0
        for word in words(query):
            having = sum(word in other for other in corpus)
            count = document.count(word)
            rarity = math.log(1 + (len(corpus) - having + 0.5) / (having + 0.5))
            total += rarity * count / (count + 1.2 * (1 - 0.6 + 0.6 * len(document) / mean_len))
        return total

    query = "the red harbour the value"
    found = {hit.index: hit.score for hit in index.search(query, 4)}
    expected = {i: score(query, document) for i, document in enumerate(corpus)}
    assert found == pytest.approx({i: s for i, s in expected.items() if s > 0}, rel=1e-6)  # bm25s keeps float32


def test_no_hit_is_an_empty_list(index: VectorIndex | BM25Index) -> None:
    assert index.search("", 3) == []


def test_bm25_without_a_shared_word_is_an_empty_list() -> None:
    index = BM25Index()
    index.add(["...", "!"])
    assert index.search("red", 3) == []
    index.add(PASSAGES)
    assert index.search("zebra xylophone", 3) == []
    assert index.search("red", 9)[0].index == 2


def test_an_empty_index_cannot_be_searched(kind: str) -> None:
    index = INDICES[kind]()
    index.add([])
    with pytest.raises(ArgumentError, match=r"must hold passages before it is searched; got 0\. Call add first"):
        index.search("anything", 3)


def test_k_must_be_positive(index: VectorIndex | BM25Index) -> None:
    with pytest.raises(ArgumentError, match="k must be positive; got 0"):
        index.search("red", 0)
    with pytest.raises(ArgumentError, match="k must be a positive whole number; got '3'"):
        index.search("red", "3")  # type: ignore[arg-type]


def test_saved_and_loaded_finds_the_same(kind: str, index: VectorIndex | BM25Index, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "index"
    index.save(folder)
    index.save(folder)  # over itself
    loaded = LOADERS[kind](folder)
    assert loaded.search("red harbour", 4) == index.search("red harbour", 4)
    loaded.add(["A second red door stands open."])
    assert loaded.search("second", 1)[0].index == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
@pytest.mark.parametrize("num_passages", [0, 4])
def test_a_copy_finds_the_same_and_grows_alone(kind: str, num_passages: int, copied: Callable) -> None:
    index = INDICES[kind]()
    index.add(PASSAGES[:num_passages])
    other = copied(index)
    if num_passages:
        assert other.search("red harbour", 4) == index.search("red harbour", 4) != []
    other.add(["A second red door stands open."])
    assert other.search("second", 1)[0].index == num_passages
    assert (len(index), len(other)) == (num_passages, num_passages + 1)


def test_passages_that_cannot_be_tokenized_are_not_added() -> None:
    def tokenize(text: str) -> list[str]:
        if "broken" in text:
            raise ValueError("no words")
        return words(text)

    index = BM25Index(tokenize)
    index.add(PASSAGES[:2])
    before = index.search("red door", 4)
    with pytest.raises(ValueError, match="no words"):
        index.add(["A fine passage.", "broken"])
    assert len(index) == 2 and index.search("red door", 4) == before
    index.add(PASSAGES[2:])
    assert index.search("crane", 1)[0].index == 2


def test_an_empty_index_can_be_saved(kind: str, tmp_path: Path) -> None:
    INDICES[kind]().save(tmp_path)
    loaded = LOADERS[kind](tmp_path)
    assert len(loaded) == 0
    loaded.add(PASSAGES)
    assert loaded.search("red", 1)


@pytest.mark.parametrize("file", ["passages.json", "vectors.f32"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "changed", "empty", "pickle"])
def test_a_damaged_index_is_one_clear_error(file: str, damage: str, tmp_path: Path) -> None:
    index = VectorIndex(EMBED)
    index.add(PASSAGES)
    index.save(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    middle = whole.index(b"harbour") if file == "passages.json" else 100

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path.joinpath("executed").touch, ())

    damaged = {
        "truncated": whole[: len(whole) // 2],
        "longer": whole + b"1234",
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "pickle": pickle.dumps(Trap()),
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(ArgumentError, match=r"folder must hold a whole index; .* Build the index again and save it"):
        VectorIndex.load(tmp_path, EMBED)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"format": 1}'])
def test_other_json_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "vectors.f32").write_bytes(b"")
    (tmp_path / "passages.json").write_bytes(content)
    with pytest.raises(ArgumentError, match="folder must hold a whole index"):
        BM25Index.load(tmp_path)


def test_an_index_of_another_kind_or_embedder_is_refused(tmp_path: Path) -> None:
    index = VectorIndex(EMBED)
    index.add(PASSAGES)
    index.save(tmp_path)
    with pytest.raises(ArgumentError, match="holds a 'vector' index, not a 'bm25' one"):
        BM25Index.load(tmp_path)
    with pytest.raises(ArgumentError, match="embed must be the embedder that made the index"):
        VectorIndex.load(tmp_path, EMBED.fitted(PASSAGES))
    with pytest.raises(ArgumentError, match=r"shape \[1, 512\] for 1 texts; got shape \[1, 64\]"):
        VectorIndex.load(tmp_path, HashedNgrams(64))


def test_a_folder_that_cannot_be_written_is_one_clear_error(index: VectorIndex | BM25Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written .* Choose a folder that can"):
        index.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (np.zeros(3), r"numbers of shape \[1, d\] for 1 texts; got shape \[3\]"),
        (np.zeros((2, 3)), r"numbers of shape \[1, 3\] for 1 texts; got shape \[2, 3\]"),
        (np.zeros((1, 0)), r"numbers of shape \[1, d\] for 1 texts; got shape \[1, 0\]"),
        (np.float32(1), r"numbers of shape \[1, d\] for 1 texts; got shape \[\]"),
        (
            np.full((1, 3), np.nan),
            "finite numbers; got NaN or infinity for 1 of 1 texts, the first 'one text'. Leave out",
        ),
        (np.array([[1, -np.inf]]), "finite numbers; got NaN or infinity for 1 of 1 texts"),
    ],
)
def test_wrong_embeddings_are_refused(returned: np.ndarray, told: str) -> None:
    with pytest.raises(ArgumentError, match=f"embed must return {told}"):
        VectorIndex(lambda texts: returned).add(["one text"])


@pytest.mark.parametrize("b", [-0.1, 1.1])
def test_wrong_bm25_constants_are_refused(b: float) -> None:
    with pytest.raises(ArgumentError, match="b must be from 0 to 1"):
        BM25Index(b=b)


def test_a_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def refuse(module: str, *, extra: str) -> None:
        raise MissingDependencyError(f"{module} needs the extra {extra}")

    monkeypatch.setattr(retrieval, "require", refuse)
    with pytest.raises(MissingDependencyError, match="needs the extra retrieval"):
        INDICES[kind]()


class Ranked:
    """An index whose hits are given."""

    def __init__(self, *passages: str) -> None:
        self.hits = [Hit(passage, 1 / (i + 1), i) for i, passage in enumerate(passages)]

    def search(self, query: str, k: int) -> list[Hit]:
        return self.hits[:k]


def test_prompt_holds_the_best_passages_and_the_query() -> None:
    augmented = RetrievalAugmented(Ranked("aa", "b{query}", "cc"), num_passages=2, template="C: {passages}\nQ: {query}")
    prompt = augmented.prompt("{x}?", max_len=100)
    assert prompt.text == "C: aa\n\nb{query}\nQ: {x}?"
    assert [hit.index for hit in prompt.hits] == [0, 1]


@given(st.integers(10, 40))
def test_prompt_is_as_long_as_allowed_at_most(max_len: int) -> None:
    augmented = RetrievalAugmented(Ranked("a" * 9, "b" * 20, "c" * 3), template="{passages}|{query}", separator=" ")
    prompt = augmented.prompt("question", max_len=max_len)
    assert len(prompt.text) <= max_len
    left_out = set(range(3)) - {hit.index for hit in prompt.hits}
    sizes = (9, 20, 3)
    assert all(len(prompt.text) + sizes[i] + bool(prompt.hits) > max_len for i in left_out)
    assert prompt.text.endswith("|question")


def test_prompt_length_can_be_in_tokens() -> None:
    augmented = RetrievalAugmented(Ranked("one two", "three four five"), template="{passages} ? {query}")
    prompt = augmented.prompt("six", max_len=5, length=lambda text: len(text.split()))
    assert prompt.text == "one two ? six"


def test_the_number_of_passages_must_be_whole() -> None:
    with pytest.raises(ArgumentError, match="num_passages must be a positive whole number; got 1.5"):
        RetrievalAugmented(Ranked(), num_passages=1.5)  # type: ignore[arg-type]


def test_a_query_without_room_or_hits() -> None:
    augmented = RetrievalAugmented(Ranked(), template="{passages}|{query}")
    assert augmented.prompt("question", max_len=9).text == "|question"
    with pytest.raises(ArgumentError, match="max_len must have room for the template and the query; got 8, .* take 9"):
        augmented.prompt("question", max_len=8)


@pytest.mark.parametrize("template", ["{query}", "{passages}{query}{other}", "{}{}", "{passages}{query}{query}"])
def test_wrong_templates_are_refused(template: str) -> None:
    with pytest.raises(ArgumentError, match="template must name {passages} and {query}"):
        RetrievalAugmented(Ranked(), template=template)


def test_retrieval_reaches_far_beyond_any_window() -> None:
    """One planted fact among a thousand passages comes back for its question, by words and by vectors."""
    draws = np.random.default_rng(0)
    filler = [" ".join(draws.choice(["sea", "tower", "lamp", "green", "walks", "slow"], 12)) for _ in range(1000)]
    filler[617] = "the lighthouse keeper hides 77312 under the stairs"
    for make in INDICES.values():
        index = make()
        index.add(filler)
        prompt = RetrievalAugmented(index, num_passages=1).prompt("what does the lighthouse keeper hide?", max_len=200)
        assert "77312" in prompt.text


@pytest.mark.parametrize("passages", ["hello", ["fine", 1]])
def test_what_is_no_list_of_strings_is_refused_and_nothing_is_added(kind: str, passages: object) -> None:
    index = INDICES[kind]()
    index.add(PASSAGES)
    with pytest.raises(ArgumentError, match="passages must be a list of strings"):
        index.add(passages)  # type: ignore[arg-type]
    assert len(index) == len(PASSAGES)
