"""Problem 03: every arm measures what the page shows, facts come back as they were told, and no memory leaks."""

import sys
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, MissingDependencyError
from transformer_problems.core.records import Cell, Measurement
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.passkey import FIRST_KEY_TOKEN, NUM_KEYS, QUERY_TOKEN
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p03_fixed_context_window import documents as told
from transformer_problems.problems.p03_fixed_context_window import experiment as p03
from transformer_problems.problems.p03_fixed_context_window.search import Search

EXPERIMENT = p03.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
BY_SEARCH = sorted(p03._BY_SEARCH)
STREAMS = [arm for arm in ARMS if arm not in BY_SEARCH]
TINY = p03._Size(16, 3, 16, 0.01, num_documents=16, archive=24, num_texts=2, repeats=2, seeds=1)
SEARCHED_ONLY, STREAMED_ONLY = {"hit_rate"}, {"bits_per_byte"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """One cell of every arm at a tiny size."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p03._SIZES, "quick", TINY)
        return {arm: list(EXPERIMENT.measure(_bench(arm, folder))) for arm in ARMS}


def _bench(arm: str, folder: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(Cell(3, arm, "quick", 0), device, ModelCache(folder, "test"), lambda done: None)


def _by_x(measurements: list[Measurement], metric: str) -> dict[float | None, float]:
    return {m.x: m.value for m in measurements if m.metric == metric}


def _told(num: int, windows: int = 3) -> told.Documents:
    """Documents of one repeated byte, that tell in their second window."""
    text = torch.full((num, windows, told.WINDOW), ord("x"))
    return told.tell(text, torch.ones(num, dtype=torch.long), torch.arange(num), generator(0, "told"))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_what_is_shown(measured: dict[str, list[Measurement]], arm: str) -> None:
    found = {(m.metric, m.x) for m in measured[arm]}
    shown = {(c.metric, c.at) for c in EXPERIMENT.columns}
    shown |= {(e.metric, e.at) for e in (*EXPERIMENT.gains, *EXPERIMENT.costs)}
    absent = STREAMED_ONLY if arm in BY_SEARCH else SEARCHED_ONLY
    assert {(metric, at) for metric, at in shown if metric not in absent} <= found
    assert not {metric for metric, _ in found} & absent


@pytest.mark.parametrize("arm", ARMS)
def test_every_document_is_asked_about_at_every_distance(measured: dict[str, list[Measurement]], arm: str) -> None:
    asked = sorted((m.x, m.repeat) for m in measured[arm] if m.metric == "recall" and m.x is not None)
    distances = [0.5, 1, 2, 4, 8, 16, 32]
    assert asked == [(x, repeat) for x in distances for repeat in range(TINY.num_documents)]


def test_the_window_knows_nothing_of_the_past(measured: dict[str, list[Measurement]]) -> None:
    bits = {h: [m.value for m in measured["window"] if m.metric == "bits_per_byte" and m.x == h] for h in (1, 2, 32)}
    # the same sums in batches of other sizes: float32 rounds at 1.2e-7 of some 30 terms of about 8 bits
    assert bits[32] == pytest.approx(bits[1], rel=1e-4)
    assert bits[2] == pytest.approx(bits[1], rel=1e-4)


@pytest.mark.parametrize("arm", ["transformer_xl", "knn_memory", "mamba"])
def test_memories_are_read(measured: dict[str, list[Measurement]], arm: str) -> None:
    bits = _by_x(measured[arm], "bits_per_byte")
    assert abs(bits[2] - bits[1]) > 1e-4


def test_only_stores_grow(measured: dict[str, list[Measurement]]) -> None:
    kept = {arm: _by_x(measured[arm], "state_bytes") for arm in ARMS}
    for arm in ("window", "mamba"):
        assert len(set(kept[arm].values())) == 1
    assert kept["window"][0.5] < kept["transformer_xl"][4] == kept["transformer_xl"][32]
    for arm in ("knn_memory", *BY_SEARCH):
        assert kept[arm][32] > 1.9 * kept[arm][16] > 3.4 * kept[arm][8] > 0


def test_the_windowed_answer_does_not_depend_on_what_came_before() -> None:
    torch.manual_seed(0)
    model = p03.build_model("window", 16).eval()
    question = _told(1).questions
    tokens = torch.randint(256, (2, 1, 3, told.WINDOW), generator=generator(0, "texts"))
    tokens[1, :, 2] = tokens[0, :, 2]  # two pasts before one window
    states = [p03._after_last_window(model, history) for history in tokens]
    with torch.no_grad():
        logits = [model.stream(question, state)[0] for state in states]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_a_fact_stands_in_its_window_and_the_question_ends_the_asking_one() -> None:
    documents = _told(NUM_KEYS)
    asked = documents.asked(torch.full((NUM_KEYS,), 1))
    for row in range(NUM_KEYS):
        fact, question = (told.spelled(phrase[row].tolist()) for phrase in (documents.facts, documents.questions))
        window = told.spelled(asked.tokens[row, 1].tolist())
        assert fact in window[: -told.FACT_LEN]
        assert window.endswith(question)
        assert fact[:-1] == question[:-1]
        assert (ord(fact[-1]), ord(question[-1])) == (FIRST_KEY_TOKEN + int(documents.keys[row]), QUERY_TOKEN)
    assert asked.is_text.equal(asked.tokens == ord("x"))  # no name has an x
    assert (~asked.is_text).sum() == 2 * told.FACT_LEN * NUM_KEYS
    assert sorted(documents.keys.tolist()) == list(range(NUM_KEYS))


def test_training_asks_where_or_after_a_fact_is_told_and_never_answers() -> None:
    documents, asked = p03._training_documents(load_text(), 64, 8, generator(0, "training"))
    keys = documents.tokens >= FIRST_KEY_TOKEN
    assert (keys.flatten(1).sum(1) == 1).all()  # the fact's own
    telling = keys.any(2).int().argmax(1)
    assert (asked >= telling).all()
    assert (asked == telling).any()
    assert (asked > telling).any()
    assert ((documents.tokens == QUERY_TOKEN).any(2).int().argmax(1) == asked).all()


def test_names_are_all_different_and_run_out_with_a_message() -> None:
    text = torch.zeros(told.NUM_NAMES, 1, told.WINDOW, dtype=torch.long)
    names = torch.arange(told.NUM_NAMES)
    facts = told.tell(text, torch.zeros_like(names), names, generator(0, "all")).facts
    assert len(set(map(tuple, facts[:, 1:5].tolist()))) == told.NUM_NAMES
    with pytest.raises(ArgumentError, match="names must be"):
        told.tell(text[:1], names[:1], names[:1] + told.NUM_NAMES, generator(0, "one more"))


def test_the_corpus_is_a_thousand_windows_with_a_fact_of_its_own_in_each_document() -> None:
    for size in p03._SIZES.values():
        assert size.num_documents * (p03._DISTANCES[-1] + 1) + size.archive >= 1000
        assert size.num_documents + size.archive <= told.NUM_NAMES
    corpus = p03._corpus(load_text(), TINY)
    assert len(corpus) == TINY.num_documents + TINY.archive
    assert all(sum(ord(c) >= FIRST_KEY_TOKEN for c in text) == 1 for text in corpus)


def test_spelling_is_reversible() -> None:
    tokens = list(range(FIRST_KEY_TOKEN + NUM_KEYS))
    assert told.unspelled(told.spelled(tokens)) == tokens


@pytest.mark.parametrize("arm", BY_SEARCH)
def test_a_search_brings_the_fact_into_the_window(arm: str) -> None:
    documents = _told(NUM_KEYS)
    search = Search(arm, [told.spelled(document) for document in documents.tokens.flatten(1).tolist()])
    prompts = search.prompts(documents.questions)
    assert all(len(prompt) <= told.WINDOW for prompt in prompts)
    assert all(
        prompt.endswith(told.spelled(q)) for prompt, q in zip(prompts, documents.questions.tolist(), strict=True)
    )
    # the text holds nothing but facts: only passages that cut a fact in two can be found in its place
    assert sum(search.hits(documents)) >= 0.75 * NUM_KEYS
    unknown = told.tell(
        torch.zeros(1, 1, told.WINDOW).long(), torch.zeros(1).long(), torch.tensor([4000]), generator(0)
    )
    assert search.hits(unknown) == [False]


def test_padding_in_front_of_a_prompt_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = p03.build_model("window", 16).eval()
    documents = _told(64)
    search = Search("rag_bm25", [told.spelled(documents.tokens[0].flatten().tolist())])

    def prompts(questions: torch.Tensor) -> list[str]:
        """A passage before the first document's question alone."""
        texts = [told.spelled(question) for question in questions.tolist()]
        return ["a passage" * (text == told.spelled(documents.questions[0].tolist())) + text for text in texts]

    monkeypatch.setattr(search, "prompts", prompts)
    together = search.answers(model, documents.questions)
    assert together.tolist() == [int(search.answers(model, question[None])) for question in documents.questions]
    assert len(set(together.tolist())) > 1  # or any answer would do


@pytest.mark.parametrize(("arm", "package"), [("rag_vector", "faiss"), ("rag_bm25", "bm25s")])
def test_a_missing_index_is_the_reason_given_before_any_training(
    arm: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(p03._SIZES, "quick", TINY)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(p03, "train", lambda *args, **kwargs: pytest.fail("it trained first"))
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed.*\[retrieval\]"):
        list(EXPERIMENT.measure(_bench(arm, tmp_path)))


def test_searching_arms_read_with_the_windowed_model(tmp_path: Path) -> None:
    text = load_text()
    models = [p03._model_of(_bench(arm, tmp_path), TINY, text) for arm in ("window", *BY_SEARCH)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    for model in models[1:]:
        for mine, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            assert mine.equal(theirs)


@pytest.mark.parametrize("arm", STREAMS)
def test_training_drives_the_loss_down(arm: str) -> None:
    torch.manual_seed(0)
    model = p03.build_model(arm, 16)
    documents, asked = p03._training_documents(load_text(), 8, 2, generator(0, "one batch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = p03.training_loss(model, documents, asked)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_finding_names_the_baseline_figures(measured: dict[str, list[Measurement]]) -> None:
    finding = EXPERIMENT.finding(Results([(Cell(3, "window", "quick", 0), m) for m in measured["window"]]))
    assert "32 windows before" in finding
    assert "bits per byte" in finding


def test_notes_tell_how_far_a_memory_reaches_and_what_was_recalled_there() -> None:
    recalled = [(4.0, 0.99), (8.0, 0.07)]
    records = [(Cell(3, "transformer_xl", "quick", 0), Measurement("recall", "1", v, x)) for x, v in recalled]
    xl, knn, rag = EXPERIMENT.notes(Results(records))
    assert "it recalls 99% from 4 windows and 7% from 8" in xl
    assert "nothing ever leaves it" in knn
    assert "one measurement" in rag
    others = [(Cell(3, "window", "quick", 0), Measurement("recall", "1", 1.0, 4.0))]
    assert "recalls" not in EXPERIMENT.notes(Results(others))[0]


def test_the_external_memory_holds_what_a_full_cache_would(measured: dict[str, list[Measurement]]) -> None:
    held = {m.x: m.value for m in measured["knn_memory"] if m.metric == "state_bytes"}
    num_tokens = (32 + 1) * told.WINDOW - told.FACT_LEN
    keys_and_values = 2 * p03._LAYERS * num_tokens * TINY.width * 4
    assert held[32.0] == keys_and_values
