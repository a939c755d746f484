"""How much does the model work, and how long, for each token that it writes?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit, estimate, exactly
from transformer_problems.checkpoints.decoding import CachedText, next_token_flops, uses_cache
from transformer_problems.checkpoints.lengths import arithmetic_by_length, longest_input
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.kernels.race import best_times
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.requests import time_requests
from transformer_problems.lab.meters.roofline import measure_bandwidth

_LONGEST = 256
_STEPS, _BEST_OF = 24, 4  # tokens that are timed, and of how many the fastest counts: the others met other programs
_DRAFT = 4  # tokens that a draft proposes
_MATCH = 3  # last tokens that are looked up earlier in the text
_MASK_PASSES = 10  # of Mask-Predict
_TEXTS = 2


@dataclass(frozen=True, slots=True)
class _Speed:
    """Seconds of a cached step, of a cached step of a whole draft, and of a pass over the history."""

    steps_s: tuple[float, ...]
    draft_s: float
    pass_s: float

    @property
    def step_s(self) -> float:
        return float(torch.tensor(self.steps_s, dtype=torch.float64).mean())


class DecodingCheckup:
    """Counts what `generate` does for a token as the checkpoint is configured, and times cached steps at batch 1."""

    problem = 4
    not_for: Mapping[Kind, str] = {
        "encoder": "it reads a text at once and writes none",
        "image": "it reads an image at once and writes nothing",
    }

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, history = visit.subject, min(longest_input(visit.subject), _LONGEST) // 2
        texts = visit.texts(_TEXTS, 2 * history)["input_ids"]
        prefix, token = texts[:1, : history - 1], texts[:1, history - 1 : history]
        text = CachedText(subject, prefix)
        step_flops = count_flops(lambda: text.read(token))
        written_flops = next_token_flops(subject, texts[:1, :history])
        visit.progress(0.4)
        speed = _time(subject, texts[:1], history)
        visit.progress(0.7)
        arithmetic, words = written_flops / step_flops, _tokens_per_word(visit)
        per_word = estimate([words * seconds for seconds in speed.steps_s])
        accepted = _lookup_acceptance(subject, texts)
        bound_s = subject.weight_bytes / (
            measure_bandwidth(subject.device, array_bytes=visit.array_bytes) / 2
        )  # it counts reads and writes
        own_s = speed.step_s if uses_cache(subject) else speed.pass_s
        figures = {
            "cached_tokens_per_s": 1 / speed.step_s,
            "uncached_tokens_per_s": 1 / speed.pass_s,
            "memory_bandwidth_limit_s": bound_s,
            "share_of_the_bandwidth_limit_%": 100 * bound_s / speed.step_s,
            "prompt_lookup_acceptance_%": 100 * accepted,
            "tokens_per_word_tokens": words,
        }
        meaning = (
            f"it writes {1 / own_s:,.0f} tokens/s at {history} tokens, a word in {words * own_s * 1e3:,.0f} ms, "
            + ("reusing its cache" if arithmetic < 1.5 else f"with {arithmetic:,.0f}x the arithmetic of a cached step")
        )
        return Examination(
            {"decoding_arithmetic": exactly(arithmetic), "seconds_per_word": per_word},
            meaning,
            _remedies(subject, speed, arithmetic, accepted, history),
            _curve(visit, history),
            figures,
        )


def _time(subject: Subject, tokens: Tensor, history: int) -> _Speed:
    token, num, device = tokens[:, history - 1 : history], min(_STEPS, history // 2), subject.device
    text = CachedText(subject, tokens[:, : history - 1])
    times_s = time_requests(text.read, [token], num=num, device=device, warmup=2).times_s
    steps_s = tuple(min(times_s[first : first + _BEST_OF]) for first in range(0, num, _BEST_OF))
    drafted = CachedText(subject, tokens[:, : history - 1])
    draft, whole = tokens[:, history - 1 : history + _DRAFT], tokens[:, :history]
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    ways: dict[str, Callable[[], object]] = {"draft": lambda: drafted.read(draft), "pass": lambda: subject.run(inputs)}
    best_s = best_times(ways, device)
    return _Speed(steps_s, best_s["draft"], best_s["pass"])


def _tokens_per_word(visit: Visit) -> float:
    """Of the text that the visit reads, words being what stands between spaces."""
    text = "\n".join(visit.material.texts[:4])[:10_000]
    num_tokens = len(visit.subject.tokenizer(text, truncation=True, max_length=len(text))["input_ids"])
    return (num_tokens - visit.subject.num_special) / max(1, len(text.split()))


def _lookup_acceptance(subject: Subject, texts: Tensor) -> float:
    """Share of the model's own next tokens that followed the last three tokens where these stood before."""
    ones = torch.ones_like(texts)
    chosen = subject.run({"input_ids": texts, "attention_mask": ones}).output.argmax(dim=-1)
    accepted = asked = 0
    for row, wanted in zip(texts.tolist(), chosen.tolist(), strict=True):
        followed: dict[tuple[int, ...], int] = {}
        for last in range(_MATCH - 1, len(row) - 1):
            key = tuple(row[last - _MATCH + 1 : last + 1])
            accepted += followed.get(key) == wanted[last]
            asked += 1
            followed[key] = row[last + 1]
    return accepted / asked


def tokens_per_pass(acceptance: float, num_drafted: int) -> float:
    """Tokens that a pass over a draft yields on average: Leviathan et al. 2023, arXiv:2211.17192, equation 1."""
    if acceptance >= 1:
        return num_drafted + 1.0
    return (1 - acceptance ** (num_drafted + 1)) / (1 - acceptance)


def _remedies(subject: Subject, speed: _Speed, arithmetic: float, accepted: float, history: int) -> tuple[Remedy, ...]:
    """From the seconds measured: of a step, of one over a draft, which a looked-up draft costs alone, and of a pass.

    Mask-Predict writes all tokens of the history in some passes over them. A student of half the layers reads as much
    less from memory.
    """
    cached = arithmetic < 1.5
    cache = (
        "in use already" if cached else f"{arithmetic:,.0f}x less arithmetic, {speed.pass_s / speed.step_s:.1f}x faster"
    )
    per_pass, dearer = tokens_per_pass(accepted, _DRAFT), speed.draft_s / speed.step_s
    speculative, masked = per_pass / dearer, history * speed.step_s / (_MASK_PASSES * speed.pass_s)
    layers = sum(part.nbytes for layer in subject.layers for part in layer.parameters())
    student = subject.weight_bytes / (subject.weight_bytes - layers / 2)
    return (
        Remedy("kv-cache", cache, 1.0 if cached else arithmetic),
        Remedy(
            "speculative-decoding",
            f"{speculative:.1f}x as fast by lookup in the text: {accepted:.0%} accepted, {per_pass:.1f} tokens a pass "
            f"that takes {dearer:.1f}x as long",
            max(1.0, speculative),
        ),
        Remedy(
            "non-autoregressive-models",
            f"{masked:.1f}x as fast, {_MASK_PASSES} passes for {history} tokens, by another model",
            max(1.0, masked),
        ),
        Remedy("distillation", f"{student:.1f}x as fast with half of the layers, after training", student),
    )


def _curve(visit: Visit, history: int) -> Curve:
    """A token beside a cache meets each key once: linear + square N, where a whole pass takes linear N + square N^2."""
    growth = arithmetic_by_length(visit)
    lengths = [history * 2.0**step for step in range(-3, 2)]
    return Curve(
        "Arithmetic for one more token, by what stands before it",
        "tokens before",
        "GFLOP",
        tuple((length, (growth.linear + growth.scores(length) / length) / 1e9) for length in lengths),
        {"without a cache": tuple((length, growth.at(length) / 1e9) for length in lengths)},
        x_log=True,
        y_log=True,
    )


CHECKUP = DecodingCheckup()
