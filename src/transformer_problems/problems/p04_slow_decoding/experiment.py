"""How fast a trained model continues real text the longer that text is, and what each faster way changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN, masked_bits_per_byte
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.models.llama import LlamaDecoder
from transformer_problems.problems.p04_slow_decoding.small_models import (
    CONTEXT,
    Budget,
    Lesson,
    bundled_model,
    small_model,
)
from transformer_problems.problems.p04_slow_decoding.writing import DRAFTED, Method, Writing, write
from transformer_problems.solutions.decoding.speculative import PromptLookup, predicted_speedup

_HISTORIES = (28, 56, 112, 224)  # tokens before those that are written; with 32 of these the context is full
_ROUNDING = 1e-4  # between logits of some ten that differ by float32's rounding alone, over 8 layers
_PASSES = {"mask_predict": 4, "mask_predict_1": 1, "mask_predict_16": 16}
_LESSONS: dict[str, Lesson] = {"small": "labels", "distilled": "teacher", "distilled_sequences": "teacher's texts"}
_COUNTS = 0.05  # bits per byte; less is no difference between two models, as in problem 9
_SAME_OUTPUT = {"recompute", "kv_cache", "speculative", "prompt_lookup"}  # promise what the model itself would write


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    num_written: int  # tokens that each text is continued by, at most what is left of the context
    num_prompts: int  # texts continued and timed
    num_held_out: int  # texts whose real continuation is predicted
    budget: Budget  # of the small models
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(16, 2, 16, Budget(steps=20, batch_size=4, num_texts=16), seeds=1),
    "standard": _Size(32, 16, 64, Budget(steps=150, batch_size=8, num_texts=128), seeds=3),
    "full": _Size(32, 64, 256, Budget(steps=5_000, batch_size=32, num_texts=8192), seeds=5),
}


class SlowDecoding:
    """Real text continued greedily by a bundled model of 4.8 million parameters, and by smaller ones trained here."""

    problem = 4
    arms = (
        Arm("recompute", "the whole prefix again"),
        Arm("kv_cache", "KV cache", "kv-cache", lead=True),
        Arm("speculative", "Speculative, draft model", "speculative-decoding", lead=True, baseline="kv_cache"),
        Arm("prompt_lookup", "Speculative, prompt lookup", "speculative-decoding", baseline="kv_cache"),
        Arm("small", "small model, no teacher"),
        Arm("mask_predict", "Mask-Predict, 4 passes", "non-autoregressive-models", lead=True, baseline="small"),
        Arm("mask_predict_1", "Mask-Predict, 1 pass", "non-autoregressive-models", baseline="small"),
        Arm("mask_predict_16", "Mask-Predict, 16 passes", "non-autoregressive-models", baseline="small"),
        Arm("distilled", "Distilled, soft targets", "distillation", lead=True, baseline="small"),
        Arm("distilled_sequences", "Distilled, teacher's texts", "distillation", baseline="small"),
    )
    chart = Chart(
        metric="tokens_per_s",
        problem_title="Text continued by running all of it again for each token",
        solutions_title="The same with each solution",
        x_label="tokens written before",
        y_label="tokens a second",
        better="higher",
        x_log=True,
        y_log=True,
        draws=("recompute", "kv_cache", "speculative", "small", "mask_predict", "distilled"),
    )
    columns = (
        Column("tokens_per_s", "tokens a second at longest", at="last", better="higher"),
        Column("passes_per_token", "passes a token", at="last", better="lower", digits=2),
        Column("flops_per_token", f"FLOPs a token after {_HISTORIES[0]}", at=float(_HISTORIES[0]), better="lower"),
        Column("flops_per_token", "at longest", at="last", better="lower"),
        Column("tokens_changed", "share of tokens changed", at="last", better="lower", digits=2),
        Column("acceptance", "drafted tokens accepted", at=float(_HISTORIES[-1]), better="higher", digits=2),
        Column("predicted_speedup", "gain over the cache, predicted", at=float(_HISTORIES[-1]), better="higher"),
        Column("bits_per_byte", "bits/byte", at="last", better="lower"),
    )
    gains = (
        Effect("tokens_per_s", "ratio", ("fewer tokens a second", "more tokens a second"), "last", "after {x:,.0f}"),
    )
    costs = (
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), "last"),
        Effect("cache_bytes", "difference", ("MB less to keep", "MB more to keep"), "last", scale=1e-6),
        Effect("flops_per_token", "ratio", ("less arithmetic", "more arithmetic"), "last", "a token"),
    )
    shared_examples = frozenset({"bits_per_byte"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        text = load_text()
        method = method_of(bench, size, text)
        bench.progress(0.5)
        yield from _quality(method, size, text, bench.device)
        if bench.cell.seed == 0:  # only what is trained here differs from seed to seed, and not in speed
            windows = held_out_windows(text.test, num=size.num_prompts, length=CONTEXT).to(bench.device)
            for i, history in enumerate(_HISTORIES):
                prompts = windows[:, -history - size.num_written : -size.num_written]
                yield from _speed(method, prompts, size, promises=bench.cell.arm in _SAME_OUTPUT)
                bench.progress(0.5 + 0.5 * (i + 1) / len(_HISTORIES))

    def finding(self, results: Results) -> str:
        xs = results.xs("recompute", "tokens_per_s")
        first, last = (results.samples("recompute", "tokens_per_s", x) for x in (xs[0], xs[-1]))
        assert first is not None
        assert last is not None
        short, long = (results.mean("recompute", "flops_per_token", x) for x in (xs[0], xs[-1]))
        return (
            f"After {xs[0]:,.0f} tokens the next ones come at {first.mean():,.0f} a second, after {xs[-1]:,.0f} at "
            f"{last.mean():,.0f}: the whole text runs again for each, {long / short:.1f} times the arithmetic."
            f"{_lessons_told(results, xs[-1])}"
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        budget = _SIZES[results.scale].budget
        losses = (
            (results.samples(arm, "bits_per_byte", float(_HISTORIES[-1])), num_passes)
            for arm, num_passes in sorted(_PASSES.items(), key=lambda item: item[1])
        )
        told = ", ".join(f"{loss.mean():.2f} with {num}" for loss, num in losses if loss is not None)
        parallel = f" Mask-Predict has {told} passes." if told else ""
        return (
            "To compare with: on the continuations that the standard scale predicts, a table of single bytes, "
            "counted over the training text, has 4.68 bits per byte and a table of pairs of bytes 3.60 "
            f"(scripts/reference_lines.py, Python 3.11.7).{parallel} A model above the table of pairs has learned "
            "little more than how often bytes occur: its verdict is on speed alone.",
            f"All small models, Mask-Predict's and the students included, are trained here, in {budget.steps:,} "
            f"steps of {budget.batch_size} windows of {CONTEXT} bytes. The bundled draft has their shape and by its "
            "model card 1.70 bits per byte, after 3,000 steps of 16 windows: what teachers add and writing side by "
            "side loses is known for the shorter training only.",
            "The predicted gain over the cache follows from the share of drafted tokens accepted and what drafting "
            "costs (Leviathan et al. 2023). The measured gain is the one that the verdict rests on.",
        )


def _lessons_told(results: Results, x: float) -> str:
    """A sentence on what being small gives and what the teacher adds; empty where one of the models is missing."""
    speeds = [results.samples(arm, "tokens_per_s", x) for arm in ("small", "kv_cache")]
    losses = [results.samples(arm, "bits_per_byte", x) for arm in (*_LESSONS, "kv_cache")]
    if any(samples is None for samples in (*speeds, *losses)):
        return ""
    small, large = (samples.mean() for samples in speeds if samples is not None)
    labels, soft, texts, teacher = (samples.mean() for samples in losses if samples is not None)

    def beside_labels(loss: float) -> str:
        word = "no different" if abs(loss - labels) < _COUNTS else "worse" if loss > labels else "better"
        return f"{loss:.2f} ({word})"

    return (
        f" A small model is {small / large:.1f} times as fast as the large one, both with a cache, whoever taught it: "
        f"labels bring it to {labels:.2f} bits per byte, the teacher's soft targets to {beside_labels(soft)}, texts "
        f"that the teacher wrote to {beside_labels(texts)}; the large one has {teacher:.2f}."
    )


def method_of(bench: Bench, size: _Size, text: TextSplits) -> Method:
    """The arm's model, trained if need be, and how it writes."""
    arm = bench.cell.arm
    if arm in _PASSES:
        return Method(small_model(bench, "gaps", size.budget, text), num_passes=_PASSES[arm])
    if arm in _LESSONS:
        return Method(small_model(bench, _LESSONS[arm], size.budget, text))
    drafts: dict[str, Callable[[], LlamaDecoder | PromptLookup]] = {
        "speculative": lambda: bundled_model("draft", bench.device),
        "prompt_lookup": PromptLookup,
    }
    draft = drafts[arm]() if arm in drafts else None
    return Method(bundled_model("base", bench.device), use_cache=arm != "recompute", draft=draft)


def _speed(method: Method, prompts: Tensor, size: _Size, *, promises: bool) -> Iterator[Measurement]:
    """Tokens a second and passes a token after one history, text by text; the rest where the table shows it."""
    history = prompts.shape[1]
    record = _recorder(history)
    texts = prompts.split(1)
    write(method, texts[0], 2)  # warms up
    writings = [write(method, text, size.num_written) for text in texts]
    for repeat, writing in enumerate(writings):
        yield record("tokens_per_s", "tokens/s", 1 / writing.seconds_per_token, repeat)
        yield record("passes_per_token", "1", writing.num_passes / writing.num_tokens, repeat)
        if promises:
            yield record("tokens_changed", "1", share_changed(method.model, writing.tokens, size.num_written), repeat)
    yield record("cache_bytes", "bytes", _cache_bytes(method, writings[0].tokens))
    if history in (_HISTORIES[0], _HISTORIES[-1]):
        luck = method.draft is not None  # decides what is done; otherwise it is the same for every text
        counts = [_flops_per_token(method, text, size.num_written) for text in (texts if luck else texts[:1])]
        for repeat in range(len(texts)):
            yield record("flops_per_token", "FLOP", counts[repeat % len(counts)], repeat)
    if history == _HISTORIES[-1] and method.draft is not None:
        yield from _speculation(method, writings, texts, size.num_written)


def _recorder(history: int) -> Callable[..., Measurement]:
    def record(metric: str, unit: str, value: float, repeat: int = 0) -> Measurement:
        return Measurement(metric, unit, value, x=history, x_unit="tokens", repeat=repeat)

    return record


@torch.no_grad()
def share_changed(model: nn.Module, tokens: Tensor, num_written: int) -> float:
    """Share of the written tokens that the model, in one pass over the whole text and without a cache, would not pick.

    If it is 0, greedy decoding without a cache writes the same text, token by token. Where two tokens are as probable
    up to rounding, either is the model's own. tokens: [1, N].
    """
    logits = model(tokens[:, :-1])[:, -num_written:]
    written = logits.gather(2, tokens[:, -num_written:, None])[..., 0]
    return float((logits.amax(dim=2) - written > _ROUNDING).double().mean())


def _flops_per_token(method: Method, prompt: Tensor, num_tokens: int) -> float:
    """As executed, the draft's included, without the reading of the prompt."""
    writings: list[Writing] = []
    total = count_flops(lambda: writings.append(write(method, prompt, num_tokens)))

    @torch.no_grad()
    def read_again() -> None:
        for model, tokens in writings[0].read:
            model(tokens)

    return (total - count_flops(read_again)) / writings[0].num_tokens


@torch.no_grad()
def _cache_bytes(method: Method, tokens: Tensor) -> int:
    """Keys and values held when a text is written."""
    models = (method.model, method.draft) if method.use_cache and not method.num_passes else ()
    decoders = [model for model in models if isinstance(model, LlamaDecoder)]
    return sum(model.stream(tokens, model.initial_state(1))[1].num_bytes for model in decoders)


def _speculation(
    method: Method, writings: list[Writing], texts: tuple[Tensor, ...], num_tokens: int
) -> Iterator[Measurement]:
    """The gain over the target's own cached decoding that acceptance and the draft's cost predict."""
    record = _recorder(texts[0].shape[1])
    plain = [write(replace(method, draft=None), text, num_tokens) for text in texts]
    done = [writing.speculation for writing in writings if writing.speculation is not None]
    acceptance = sum(d.num_accepted for d in done) / max(1, sum(d.num_tested for d in done))
    target_s = sum(writing.seconds_per_token for writing in plain) / len(plain)
    cost_ratio = _seconds_per_draft(method, texts, num_tokens) / target_s
    yield record("acceptance", "1", acceptance)
    yield record("cost_ratio", "1", cost_ratio)
    yield record("predicted_speedup", "1", predicted_speedup(acceptance, DRAFTED, cost_ratio))


def _seconds_per_draft(method: Method, texts: tuple[Tensor, ...], num_tokens: int) -> float:
    """What a proposed token takes."""
    if isinstance(method.draft, LlamaDecoder):
        alone = Method(method.draft)
        return sum(write(alone, text, num_tokens).seconds_per_token for text in texts) / len(texts)
    assert method.draft is not None
    look_up = partial(method.draft, texts[0], DRAFTED)
    return measure_latency(look_up, device=texts[0].device, repeats=3).median_s / DRAFTED


@torch.no_grad()
def _quality(method: Method, size: _Size, text: TextSplits, device: torch.device) -> Iterator[Measurement]:
    """Bits per byte of the real continuation after the longest history."""
    length = _HISTORIES[-1] + size.num_written
    windows = held_out_windows(text.test, num=size.num_held_out, length=length).to(device)
    record, draws = _recorder(_HISTORIES[-1]), generator(0, "rounds")
    parts = [continuation_bits(method, part, size.num_written, draws) for part in windows.split(16)]
    for repeat, value in enumerate(torch.cat(parts).tolist()):
        yield record("bits_per_byte", "bit", value, repeat)


def continuation_bits(method: Method, windows: Tensor, num_tokens: int, draws: torch.Generator) -> Tensor:
    """Bits per byte of the last tokens of each window in the way that the method writes them, [B, N] -> [B].

    With Mask-Predict they come in as many rounds as it has passes, in random order: a round is predicted from all
    rounds before it, and its tokens do not see each other. This is a probability of the text like any decoder's.

    Source:
        Hoogeboom et al. 2022, arXiv:2110.02037 (their parallel generation in a set number of steps).
    """
    if not method.num_passes:
        return bits_per_byte(method.model(windows[:, :-1])[:, -num_tokens:], windows[:, -num_tokens:])
    num_rounds = min(method.num_passes, num_tokens)
    order = torch.rand(len(windows), num_tokens, generator=draws).argsort(dim=1).to(windows.device)
    rounds = nn.functional.pad(order * num_rounds // num_tokens, (windows.shape[1] - num_tokens, 0), value=-1)
    bits = torch.zeros(len(windows), device=windows.device)
    for i in range(num_rounds):
        logits = method.model(windows.masked_fill(rounds >= i, MASK_TOKEN))
        chosen = rounds == i
        bits += masked_bits_per_byte(logits, windows, chosen) * chosen.sum(dim=1)
    return bits / num_tokens


EXPERIMENT = SlowDecoding()
