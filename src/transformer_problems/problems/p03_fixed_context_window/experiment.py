"""What is still known of facts told 1 to 32 windows ago, and how much better text is predicted from a longer past."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.passkey import FIRST_KEY_TOKEN, NUM_KEYS, VOCAB_SIZE
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.stack import StackState
from transformer_problems.problems.p03_fixed_context_window.documents import (
    FACT_LEN,
    NUM_NAMES,
    WINDOW,
    Documents,
    spelled,
    tell,
)
from transformer_problems.problems.p03_fixed_context_window.search import Search
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.memory.knn_memory import KNNMemoryAttention
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.recurrence.transformer_xl import TransformerXL

_HEADS, _LAYERS = 4, 2
_BYTES = 256
_WITHIN = 0.5  # stands for the asking window itself, on the axis of distances in windows
_DISTANCES = (0, 1, 2, 4, 8, 16, 32)  # windows between the one that tells and the one that asks
_HISTORIES = (1, 2, 4, 8, 16, 32)  # windows read of a text, up to and including the one that is predicted
_XL_MEMORY = 4 * WINDOW  # longer than a segment, as in the paper's evaluation, and far shorter than 32 windows
_KNN_MEMORY = 64 * WINDOW  # holds all that is read here
_NEIGHBORS = 8
_RECALL_WEIGHT = 4.0  # one answer a document would drown among its bytes; equal in all arms
_TRAINED_WINDOWS = 8  # of the streams that end training
_BY_SEARCH = {"rag_vector", "rag_bm25"}


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    width: int
    steps: int  # the first two thirds on single windows, the others on streams of windows
    windows: int  # in a training step, however they are cut into streams
    learning_rate: float
    num_documents: int  # asked about, at every distance
    archive: int  # further windows of the searched corpus, each with a fact of its own
    num_texts: int  # held out, for bits per byte
    repeats: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(48, 100, 96, 0.02, num_documents=64, archive=1024, num_texts=32, repeats=5, seeds=1),
    "standard": _Size(48, 300, 128, 0.02, num_documents=256, archive=1024, num_texts=256, repeats=9, seeds=3),
    "full": _Size(128, 4000, 512, 0.005, num_documents=1024, archive=2048, num_texts=1024, repeats=15, seeds=5),
}


def build_model(arm: str, width: int) -> Decoder:
    """The same small decoder with the arm's layers; segments are windows in all of them, so only memory differs."""

    def position() -> T5RelativeBias:
        return T5RelativeBias(_HEADS, max_distance=WINDOW + _XL_MEMORY)

    def transformer_xl(memory_len: int) -> nn.Module:
        return TransformerXL(width, _HEADS, segment_len=WINDOW, memory_len=memory_len, position=position())

    def knn_memory() -> nn.Module:
        return KNNMemoryAttention(
            width,
            _HEADS,
            segment_len=WINDOW,
            memory_len=_KNN_MEMORY,
            num_neighbors=_NEIGHBORS,
            position=position(),
        )

    makers: dict[str, Callable[[], nn.Module]] = {
        "window": lambda: transformer_xl(0),
        "transformer_xl": lambda: transformer_xl(_XL_MEMORY),
        "knn_memory": knn_memory,
        "mamba": lambda: Mamba(width),
    }
    return Decoder(VOCAB_SIZE, width, _LAYERS, cast("Callable[[], SelfAttention]", makers[arm]))


class FixedContextWindow:
    """A byte-level model with a window of 32 tokens, asked for passkeys told up to 32 windows before."""

    problem = 3
    arms = (
        Arm("window", "its window only"),
        Arm("transformer_xl", "Transformer-XL, 4 windows kept", "transformer-xl", lead=True),
        Arm("rag_vector", "RAG: vectors, same model", "rag", lead=True),
        Arm("rag_bm25", "RAG: BM25, same model", "rag"),
        Arm("knn_memory", "External memory, kNN", "external-memory", lead=True),
        Arm("mamba", "Mamba", "mamba", lead=True),
    )
    chart = Chart(
        metric="recall",
        problem_title="Passkeys told before, asked of a model with a window",
        solutions_title="The same with each solution",
        x_label="windows since it was told (0.5: the same)",
        y_label=f"answered correctly (chance {1 / NUM_KEYS})",
        better="higher",
        x_log=True,
        draws=("window", "transformer_xl", "rag_vector", "knn_memory", "mamba"),
    )
    columns = (
        Column("recall", "recall within the window", at=_WITHIN, better="higher"),
        Column("recall", "at 1 window", at=1.0, better="higher"),
        Column("recall", "at 4 windows", at=4.0, better="higher"),
        Column("recall", "at 8 windows", at=8.0, better="higher"),
        Column("recall", "at 32 windows", at=32.0, better="higher"),
        Column("hit_rate", "searches that find the whole fact", better="higher"),
        Column("bits_per_byte", "bits/byte from 1 window", at=1.0, better="lower"),
        Column("bits_per_byte", "from 32 windows", at=32.0, better="lower"),
        Column("state_bytes", "bytes kept of 32 windows", at=32.0, better="lower"),
        Column("latency_s", "seconds an answer", better="lower"),
    )
    gains = (
        Effect("recall", "difference", ("points less recall", "points more recall"), 32.0, "at 32 windows", scale=100),
    )
    costs = (
        Effect("state_bytes", "ratio", ("fewer bytes kept", "more bytes kept"), 32.0, "of 32 windows"),
        Effect("latency_s", "ratio", ("less time", "more time"), None, "an answer"),
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), 32.0, "from 32 windows"),
    )
    shared_examples = frozenset({"recall", "bits_per_byte"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, text = _SIZES[bench.cell.scale], load_text()
        search = Search(bench.cell.arm, _corpus(text, size)) if bench.cell.arm in _BY_SEARCH else None
        model = _model_of(bench, size, text)
        documents = _documents(text, size).to(bench.device)
        if search is None:
            yield from _recall_of_stream(model, documents)
            yield from _loss(model, text, size, bench.device)
            state = _after_last_window(model, documents.tokens[:1])
            answer: Callable[[], object] = partial(_answer, model, documents.questions[:1], state)
        else:
            yield from _recall_by_search(model, search, documents)
            answer = partial(search.answers, model, documents.questions[:1])
        if bench.cell.seed == 0:  # what an answer costs does not depend on the weights
            sample = measure_latency(answer, device=bench.device, repeats=size.repeats)
            for repeat, seconds in enumerate(sample.times_s):
                yield Measurement("latency_s", "s", seconds, repeat=repeat)

    def finding(self, results: Results) -> str:
        within, before, far = (results.samples("window", "recall", x) for x in (_WITHIN, 1.0, 32.0))
        one, many = (results.samples("window", "bits_per_byte", float(h)) for h in (_HISTORIES[0], _HISTORIES[-1]))
        assert within is not None
        assert before is not None
        assert far is not None
        assert one is not None
        assert many is not None
        return (
            f"A passkey told in the same window is recalled in {within.mean():.0%} of all documents, one told a window "
            f"before in {before.mean():.0%}, 32 windows before in {far.mean():.0%}, where guessing gives "
            f"{1 / NUM_KEYS:.0%}; text costs {one.mean():.2f} bits per byte from one window and {many.mean():.2f} from "
            f"{_HISTORIES[-1]}."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        kept = _XL_MEMORY // WINDOW
        near, far = (results.samples("transformer_xl", "recall", float(x)) for x in (kept, _LAYERS * kept))
        recalled = "" if near is None else f"; it recalls {near.mean():.0%} from {kept} windows"
        recalled += "" if far is None else f" and {far.mean():.0%} from {_LAYERS * kept}"
        return (
            f"Transformer-XL has {_LAYERS} layers here that each keep {kept} windows, so by construction nothing from "
            f"more than some {_LAYERS * kept} windows back can reach an answer{recalled}. The criterion asks at "
            f"{_DISTANCES[-1]}: of this size it could not help.",
            f"The external memory has room for {_KNN_MEMORY // WINDOW} windows, so nothing ever leaves it here, and "
            "its bytes are those of a full key/value cache of all layers: the figures show what a look-up of the "
            "nearest keys recalls, not what a memory saves.",
            "RAG answers from one search over the whole corpus, which is copied to every distance: where a passage "
            "stood plays no part in it, so its equal points are one measurement.",
        )


def _documents(text: TextSplits, size: _Size) -> Documents:
    """Held-out documents that tell their fact in the first window and go on to the farthest distance."""
    windows = _DISTANCES[-1] + 1
    rows = held_out_windows(text.test, num=size.num_documents, length=windows * WINDOW)
    names = _held_out_names()[: size.num_documents]
    return tell(rows.view(-1, windows, WINDOW), torch.zeros_like(names), names, generator(0, "held out"))


def _corpus(text: TextSplits, size: _Size) -> list[str]:
    """All that is searched: the documents asked about, and windows of other texts that each tell another fact."""
    rows = held_out_windows(text.valid, num=size.archive, length=WINDOW)
    names = _held_out_names()[size.num_documents :][: size.archive]
    archive = tell(rows.view(-1, 1, WINDOW), torch.zeros_like(names), names, generator(0, "archive"))
    return [
        spelled(document) for part in (_documents(text, size), archive) for document in part.tokens.flatten(1).tolist()
    ]


def _held_out_names() -> Tensor:
    """The numbers of all names in a fixed random order; no two documents of the corpus get the same."""
    return torch.randperm(NUM_NAMES, generator=generator(0, "names"))


def _model_of(bench: Bench, size: _Size, text: TextSplits) -> Decoder:
    """The arm's trained model; those that search have the window's own."""
    seed = bench.cell.seed
    arm = "window" if bench.cell.arm in _BY_SEARCH else bench.cell.arm
    recipe = {"problem": 3, "arm": arm, "seed": seed, "text": text.source, **asdict(size)}

    def build() -> nn.Module:
        with seeded(seed, "model"):
            return build_model(arm, size.width).to(bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        length = 1 if 3 * step < 2 * size.steps else _TRAINED_WINDOWS
        documents, asked = _training_documents(text, size.windows // length, length, generator(seed, "batch", step))
        return training_loss(cast("Decoder", model), documents.to(bench.device), asked.to(bench.device))

    def train_both(model: nn.Module, checkpoint: Path) -> None:
        plan = TrainingPlan(size.steps, plain_recipe(size.learning_rate))
        train(model, batch_loss, plan, progress=lambda done: bench.progress(0.8 * done), checkpoint=checkpoint)

    return cast("Decoder", bench.models.get(recipe, build, train_both))


def _training_documents(text: TextSplits, num: int, length: int, draws: torch.Generator) -> tuple[Documents, Tensor]:
    """Documents that tell a fact in their first half, and the window that asks for it, [B].

    Half of them ask where the fact is told, so that no arm forgets what fits its window; the others in any window from
    there on, without an answer that a later window could pass on.
    """
    rows = sample_windows(text.train, num=num, length=length * WINDOW, generator=draws).view(num, length, WINDOW)
    told = torch.randint((length + 1) // 2, (num,), generator=draws)
    later = (torch.rand(num, generator=draws) * (length - told)).long()
    asked = torch.where(torch.rand(num, generator=draws) < 0.5, told, told + later)
    names = torch.randint(NUM_NAMES, (num,), generator=draws)
    return tell(rows, told, names, draws).asked(asked), asked


def training_loss(model: Decoder, documents: Documents, asked: Tensor) -> Tensor:
    """Cross-entropy of the next byte wherever it is text, plus that of the key after the question."""
    tokens = documents.tokens.flatten(1)
    hidden = model.body(tokens)
    embedding = model.body.embedding.weight
    is_text = documents.is_text.flatten(1)[:, 1:]
    bytes_ = nn.functional.linear(hidden[:, :-1][is_text], embedding[:_BYTES])
    rows = torch.arange(len(tokens), device=tokens.device)
    answers = nn.functional.linear(hidden[rows, (asked + 1) * WINDOW - 1], embedding[FIRST_KEY_TOKEN:])
    recall = nn.functional.cross_entropy(answers, documents.keys)
    return nn.functional.cross_entropy(bytes_, tokens[:, 1:][is_text]) + _RECALL_WEIGHT * recall


def _answer(model: Decoder, questions: Tensor, state: StackState) -> Tensor:
    """The likeliest key after a question, [B]; the state stays what it was."""
    with torch.no_grad():
        logits, _ = model.stream(questions, state)
    return logits[:, -1, FIRST_KEY_TOKEN:].argmax(dim=1)


def _recall_of_stream(model: Decoder, documents: Documents) -> Iterator[Measurement]:
    """Each document read once from its fact on, the question put in passing at the end of some of its windows."""
    num, windows, _ = documents.tokens.shape
    state = model.initial_state(num)
    for window in range(windows):
        before, rest = documents.tokens[:, window].split([WINDOW - FACT_LEN, FACT_LEN], dim=1)
        state = _read(model, before, state)
        if window in _DISTANCES:
            yield from _recalled(window, _answer(model, documents.questions, state) == documents.keys)
            yield _at(window, "state_bytes", "bytes", state.num_bytes / num)
        state = _read(model, rest, state)


def _after_last_window(model: Decoder, tokens: Tensor) -> StackState:
    """The state in which the question about the farthest distance is put. tokens: [B, T, WINDOW]."""
    state = model.initial_state(len(tokens))
    for window in tokens.flatten(1)[:, :-FACT_LEN].split(WINDOW, dim=1):
        state = _read(model, window, state)
    return state


def _read(model: Decoder, tokens: Tensor, state: StackState) -> StackState:
    with torch.no_grad():
        return model.body.stream(tokens, state)[1]


def _recall_by_search(model: Decoder, search: Search, documents: Documents) -> Iterator[Measurement]:
    """One search over the whole corpus answers at every distance alike: where a passage stood plays no part in it."""
    answers, hits = search.answers(model, documents.questions), search.hits(documents)
    for repeat, hit in enumerate(hits):
        yield Measurement("hit_rate", "1", float(hit), repeat=repeat)
    for window in _DISTANCES:
        yield from _recalled(window, answers == documents.keys)
        text = spelled(documents.tokens[0, : window + 1].flatten().tolist())
        yield _at(window, "state_bytes", "bytes", search.stored_bytes(text))


def _recalled(window: int, correct: Tensor) -> Iterator[Measurement]:
    for repeat, value in enumerate(correct.double().tolist()):
        yield _at(window, "recall", "1", value, repeat)


def _at(window: int, metric: str, unit: str, value: float, repeat: int = 0) -> Measurement:
    return Measurement(metric, unit, value, x=window or _WITHIN, x_unit="windows", repeat=repeat)


def _loss(model: Decoder, text: TextSplits, size: _Size, device: torch.device) -> Iterator[Measurement]:
    """Bits per byte of the same held-out window of each text, read with a longer and longer past.

    The window's first byte is left out, which nothing predicts where the window is all that is read.
    """
    texts = held_out_windows(text.test, num=size.num_texts, length=_HISTORIES[-1] * WINDOW).to(device)
    for history in _HISTORIES:
        tokens = texts[:, -history * WINDOW :]
        with torch.no_grad():
            logits = model(tokens[:, :-1])[:, 1 - WINDOW :, :_BYTES]
        for repeat, value in enumerate(bits_per_byte(logits, tokens[:, 1 - WINDOW :]).tolist()):
            yield Measurement("bits_per_byte", "bit", value, x=history, x_unit="windows", repeat=repeat)


EXPERIMENT = FixedContextWindow()
