"""How much memory does the longest input take, and how much of it are scores?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.decoding import cache_bytes
from transformer_problems.checkpoints.lengths import longest_input, sized, unit_of
from transformer_problems.checkpoints.sizes import told_bytes
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.dependencies import require
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.lab.meters.memory import peak_memory_bytes

_MOST_TOKENS = 512  # that a pass is measured at; beyond, it is extrapolated
_MOST_FLOPS = 3e10  # of a pass that is measured: a second of one core or two
_CACHED = 32  # tokens, to see what a cache takes for each
_CHUNK = 64  # queries at a time, of memory-efficient attention


@dataclass(frozen=True, slots=True)
class _Peak:
    """The most bytes that a pass needs beside the weights: linear N, or in its layers layers N + square N^2.

    Of a model with many words the answers outweigh the layers in short texts, and hide how these grow, so the layers
    are measured alone.

    Args:
        measured: The largest N of which that was measured.
    """

    linear: float
    layers: float
    square: float
    measured: int

    def at(self, length: float) -> float:
        """With its scores."""
        return max(self.linear * length, self.layers * length + self.square * length**2)

    def without_scores(self, length: float) -> float:
        """As if they took nothing."""
        return self.linear * length


class MemoryCheckup:
    """Measures the peak of a short pass, where all grows in proportion to the length, and of a long one.

    What the long one takes beyond its proportion are scores: no other part of a pass grows with the square.
    """

    problem = 7
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, longest, unit = visit.subject, longest_input(visit.subject), unit_of(visit.subject)
        peak, weights, memory = _peak(visit), subject.weight_bytes, _memory_bytes(subject)
        scores, whole = peak.at(longest) - peak.without_scores(longest), weights + peak.at(longest)
        fits = _longest_that_fits(peak, memory - weights)
        figures = {
            "weight_bytes": float(weights),
            "pass_bytes": peak.at(longest),
            "score_bytes": scores,
            "machine_bytes": float(memory),
            f"longest_that_fits_{unit}": fits,
            f"measured_up_to_{unit}": float(peak.measured),
        }
        if subject.kind == "causal":
            num = min(_CACHED, (subject.narrowest or _CACHED + 1) - 1)  # beyond, layers with windows keep no more
            if each := cache_bytes(subject, visit.texts(1, num)["input_ids"]):
                figures["cache_per_1000_tokens_bytes"] = each * subject.keys_met(1000)
        how = "" if peak.measured >= longest else ", extrapolated"
        takes_more = subject.kind != "image" and subject.hard_limit is None
        room = f"; {told_bytes(memory)} hold {fits:,.0f} {unit}" if takes_more else ""
        meaning = (
            f"{longest:,} {unit} take {told_bytes(peak.at(longest))} beside {told_bytes(weights)} of weights{how}; "
            f"{scores / whole:.0%} of all are scores{room}"
        )
        readings = {"peak_share": exactly(whole / memory), "score_share": exactly(scores / whole)}
        return Examination(readings, meaning, _remedies(subject, peak, figures), _curve(peak, weights, visit), figures)


def _peak(visit: Visit) -> _Peak:
    subject = visit.subject
    length, inputs = sized(visit, 1)
    short = peak_memory_bytes(partial(subject.run, inputs), device=subject.device)
    body = subject if subject.kind == "image" else subject.with_model(cast("Any", subject.model).base_model)
    layers = peak_memory_bytes(partial(body.run, inputs), device=subject.device) / length
    if subject.kind == "image":
        affordable, large = sized(visit, 2)
        if subject.num_parameters * 2 * longest_input(subject) < _MOST_FLOPS:
            affordable, large = longest_input(subject), visit.images(1)
    else:
        most = int(_MOST_FLOPS / (2 * subject.num_parameters))
        affordable = max(2 * length, min(longest_input(subject), _MOST_TOKENS, most))
        large = visit.texts(1, affordable)
    if affordable <= length:  # a Swin's own image is its shortest
        affordable, large = sized(visit, 2)
    whole = peak_memory_bytes(partial(body.run, large), device=subject.device)
    square = max(0.0, whole - layers * affordable) / affordable**2
    return _Peak(max(short / length, layers), layers, square, affordable)


def _memory_bytes(subject: Subject) -> int:
    """Of the machine or the GPU; what is free changes from minute to minute."""
    if subject.device.type == "cuda":
        return int(torch.cuda.mem_get_info(subject.device)[1])
    return int(require("psutil", extra="clinic").virtual_memory().total)


def _longest_that_fits(peak: _Peak, num_bytes: float) -> float:
    by_answers = max(0.0, num_bytes) / peak.linear
    if peak.square <= 0:
        return by_answers
    root = math.sqrt(peak.layers**2 + 4 * peak.square * max(0.0, num_bytes))
    return min(by_answers, (root - peak.layers) / (2 * peak.square))


def _curve(peak: _Peak, weights: int, visit: Visit) -> Curve:
    longest, unit = longest_input(visit.subject), unit_of(visit.subject)
    lengths = [longest * 2.0**step for step in range(-4, 3)]
    return Curve(
        "Memory of a pass with the weights, and what it were without scores",
        unit,
        "MB",
        tuple((length, (weights + peak.at(length)) / 1e6) for length in lengths),
        {"without scores": tuple((length, (weights + peak.without_scores(length)) / 1e6) for length in lengths)},
        x_log=True,
        y_log=True,
    )


def _remedies(subject: Subject, peak: _Peak, figures: Mapping[str, float]) -> tuple[Remedy, ...]:
    """Fused attention holds no scores; in chunks, those of a chunk of queries; int8 keys and values take their bits.

    Checkpoints every root of the layers leave about twice the root of the layers' activations, in training alone.
    """
    longest = longest_input(subject)
    weights, linear, scores = figures["weight_bytes"], peak.without_scores(longest), figures["score_bytes"]
    whole = weights + linear + scores
    if scores:
        flash = f"{told_bytes(whole)} to {told_bytes(weights + linear)}"
        chunked = weights + linear + scores * min(1.0, _CHUNK / longest)
        chunks = f"{told_bytes(whole)} to {told_bytes(chunked)}, {_CHUNK} queries at a time"
    else:
        flash, chunks, chunked = f"in use already ({subject.config._attn_implementation})", "no scores to save", whole
    root = max(1, round(math.sqrt(subject.num_layers)))
    held = (subject.num_layers / root + root) / subject.num_layers
    kept = f"in training, the activations of {subject.num_layers} layers become {min(1.0, held):.0%} of what they are"
    found = [
        Remedy("flash-attention", flash, whole / (weights + linear)),
        Remedy("memory-efficient-attention", chunks, whole / chunked),
        Remedy("gradient-checkpointing", kept),
    ]
    if "cache_per_1000_tokens_bytes" in figures:
        cache, bits = figures["cache_per_1000_tokens_bytes"], 8 * subject.dtype.itemsize
        told = f"the cache of 1,000 tokens from {told_bytes(cache)} to {told_bytes(cache * 8 / bits)} with int8"
        found.append(Remedy("kv-cache-optimization", told))
    return tuple(found)


CHECKUP = MemoryCheckup()
