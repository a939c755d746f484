"""The readings that treatments claim to ease, before and after, on the same texts and in one run."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.decoding import CachedText, next_token_flops, uses_cache
from transformer_problems.checkpoints.lengths import longest_input
from transformer_problems.checkpoints.subject import Inputs
from transformer_problems.clinic.contract import Clause, claimed
from transformer_problems.clinic.excerpts import to_judge
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.records import Interval
from transformer_problems.lab.statistics import mean_interval, paired_difference, paired_ratio
from transformer_problems.problems.p09_length_generalization.beyond import foretold_losses, losses_beyond

_LEAST_NATS = 0.01  # a token: less is no more than one reading differs from the next, as the check-up of 09 has it
_COUNTED, _TIMED = 0.01, 0.05  # changes of a counted and of a timed figure that count as none
_BEYOND_TOKENS = 6_144  # of all texts that are read on
_AT_A_TIME = 16  # tokens that are read beside a cache
_HISTORY = 128  # tokens before the one whose arithmetic is counted
_REQUESTS, _REQUEST_TOKENS, _ROUNDS = 16, 128, 5


@torch.no_grad()
def reading_on(before: Visit, after: Visit) -> Iterator[Clause]:
    """09: what tokens from once to twice the trained length cost more, read on, than in pieces by the old model.

    Of a model that writes beside a cache also as it reads them then, some at a time: angles that change with the length
    do not reach the keys in there.
    """
    subject, trained = before.subject, before.subject.trained_len
    if trained is None:
        raise ArgumentError(f"the config of {subject.name} must say its trained length. Add max_position_embeddings.")
    length = min(2 * trained, subject.hard_limit or 2 * trained)
    texts = to_judge(before, max(4, min(12, _BEYOND_TOKENS // length)), length)
    losses = [losses_beyond(subject, text, trained) for text in texts]
    costs = [one.extra for one in losses]
    read_on = [foretold_losses(after.subject, text, one.places) for text, one in zip(texts, losses, strict=True)]
    treated = [
        float((new[-len(one.in_pieces) :] - one.in_pieces).mean()) for new, one in zip(read_on, losses, strict=True)
    ]
    label = f"what reading on from {trained:,} to {length:,} tokens costs"
    yield _of_lengths(label, costs, treated)
    if subject.kind == "causal" and uses_cache(after.subject):
        in_pieces = torch.stack([one.in_pieces.mean() for one in losses])
        cached = [
            torch.stack([_read_beside_cache(visit, text, trained) for text in texts]) - in_pieces
            for visit in (before, after)
        ]
        yield _of_lengths(f"{label} beside a cache", *(values.tolist() for values in cached))


def _of_lengths(label: str, old: list[float], new: list[float]) -> Clause:
    effect, after = paired_difference([old], [new]), mean_interval([new])
    clause = claimed(9, label, "nats a token", mean_interval([old]), after, effect, "difference", _LEAST_NATS)
    return replace(clause, left=load_checkups()[9].thresholds["beyond_loss"].severity(after.value))


def _read_beside_cache(visit: Visit, text: Tensor, trained: int) -> Tensor:
    """Nats a token beyond the trained length of one text [N], read some tokens at a time."""
    cached = CachedText(visit.subject, text[None, : trained - 1])
    logits = torch.cat([cached.read(chunk[None])[0] for chunk in text[trained - 1 : -1].split(_AT_A_TIME)])
    return nn.functional.cross_entropy(logits.double(), text[trained:]).cpu()


def bytes_stored(before: Visit, after: Visit) -> Iterator[Clause]:
    """13: bytes of all weights, counted."""
    old, new = before.subject.weight_bytes, after.subject.weight_bytes
    yield _counted(13, "stored weights", "MB", old / 1e6, new / 1e6)


@torch.no_grad()
def arithmetic_of_a_token(before: Visit, after: Visit) -> Iterator[Clause]:
    """04: FLOPs of one further token as `generate` writes it, counted."""
    history = min(longest_input(before.subject) // 2, _HISTORY)
    tokens = to_judge(before, 1, history)
    old, new = (next_token_flops(visit.subject, tokens) / 1e6 for visit in (before, after))
    yield _counted(4, f"arithmetic for a token after {history:,}", "MFLOP", old, new)


@torch.no_grad()
def time_of_a_request(before: Visit, after: Visit) -> Iterator[Clause]:
    """18: seconds of single requests, the two models in turn; of each request the best of some rounds counts."""
    requests = _requests(before)
    best = np.full((2, len(requests)), np.inf)
    for turn in range(_ROUNDS + 1):
        for place, request in enumerate(requests):
            order = (0, 1) if (turn + place) % 2 else (1, 0)
            for which in order:
                passed_s = _passed(before if which == 0 else after, request)
                if turn:  # the first round warms up, and lets kernels be chosen
                    best[which, place] = min(best[which, place], passed_s)
    milliseconds = 1e3 * best
    yield claimed(
        18,
        f"a request, {len(requests)} in turn",
        "ms",
        mean_interval(milliseconds[:1]),
        mean_interval(milliseconds[1:]),
        paired_ratio(milliseconds[:1], milliseconds[1:]),
        "ratio",
        _TIMED,
    )


CLAIMS: Mapping[int, Callable[[Visit, Visit], Iterator[Clause]]] = {
    4: arithmetic_of_a_token,
    9: reading_on,
    13: bytes_stored,
    18: time_of_a_request,
}


def _counted(problem: int, label: str, unit: str, old: float, new: float) -> Clause:
    ratio: Interval = exactly(new / old)
    return claimed(problem, label, unit, exactly(old), exactly(new), ratio, "ratio", _COUNTED)


def _requests(visit: Visit) -> list[Inputs]:
    """Texts at their own length up to 128 tokens, or images, one each."""
    if visit.subject.kind == "image":
        return [{"pixel_values": image} for image in visit.images(_REQUESTS)["pixel_values"].split(1)]
    length = min(_REQUEST_TOKENS, visit.subject.trained_len or _REQUEST_TOKENS)
    rows: list[Tensor] = [row[None] for row in visit.short_texts(_REQUESTS, length)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _passed(visit: Visit, request: Inputs) -> float:
    device = visit.subject.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    visit.subject.run(request)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
