"""Does a single request get its answer in time?"""

import time
from collections.abc import Mapping

import torch
from scipy import stats
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.core.records import Interval
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.requests import RequestTimes, time_requests

_LENGTH = 128  # tokens that a request is cut at
_NUM_INPUTS = 16  # taken in turn
_WARMUP = 5
_SECONDS = 1.5
_FEWEST, _MOST = 16, 200  # requests
_DEADLINE_S = 0.05
_TAIL = 95  # percent: of so few requests the slowest hundredth would be one


class RequestsInTime:
    """Requests one after the other, each a pass over one input: a text's own length up to 128 tokens, or an image.

    A causal model's request ends with its first new token. How many fit into 1.5 s are timed, from 16 to 200.
    """

    problem = 18
    not_for: Mapping[Kind, str] = {}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject = visit.subject
        requests, name = _requests(visit)

        def answer(request: Tensor) -> object:
            return subject.run(_inputs(request, name))

        begin = time.perf_counter()
        for request in requests[:_WARMUP]:
            answer(request)
        typical_s = (time.perf_counter() - begin) / max(len(requests[:_WARMUP]), 1)
        num = int(min(max(_SECONDS / typical_s, _FEWEST), _MOST))
        times = time_requests(answer, requests, num=num, device=subject.device, warmup=1)
        late, usual_s = _percentile(times, _TAIL), times.percentile_s(50)
        ratio = Interval(*(bound / usual_s for bound in (late.value, late.low, late.high)))
        flops = count_flops(lambda: answer(requests[0]))
        what = "first tokens" if subject.kind == "causal" else "requests"
        return Examination(
            {"p95_s": late, "tail_ratio": ratio},
            f"one in twenty {what} takes {_told(late.value)} or more, where the usual one takes {_told(usual_s)}",
            _remedies(visit, flops, usual_s, requests[0]),
            _curve(times),
            {
                "p50_s": usual_s,
                "p95_s": late.value,
                "p99_s": times.percentile_s(99),
                "within_50_ms_share": times.share_within(_DEADLINE_S),
                "timed_requests": float(num),
            },
        )


def _requests(visit: Visit) -> tuple[list[Tensor], str]:
    """Inputs of one batch each, and what they are called."""
    if visit.subject.kind == "image":
        return list(visit.images(_NUM_INPUTS)["pixel_values"].split(1)), "pixel_values"
    length = min(_LENGTH, visit.subject.trained_len or _LENGTH)
    return [row[None] for row in visit.short_texts(_NUM_INPUTS, length)], "input_ids"


def _inputs(request: Tensor, name: str) -> Inputs:
    return {name: request} if name == "pixel_values" else {name: request, "attention_mask": torch.ones_like(request)}


def _percentile(times: RequestTimes, percent: float) -> Interval:
    """A percentile between the requests whose ranks hold it 95% of the time, as the binomial distribution says."""
    ordered = sorted(times.times_s)
    low, high = (int(stats.binom.ppf(tail, len(ordered), percent / 100)) for tail in (0.025, 0.975))
    value = times.percentile_s(percent)
    return Interval(value, min(ordered[max(low - 1, 0)], value), max(ordered[min(high, len(ordered) - 1)], value))


def _curve(times: RequestTimes) -> Curve:
    ordered = sorted(times.times_s)
    points = tuple((100 * (i + 1) / len(ordered), 1000 * time_s) for i, time_s in enumerate(ordered))
    return Curve(
        "How long the fastest to the slowest request took",
        "requests answered (%)",
        "time (ms)",
        points,
        {"50 ms": ((0.0, 1000 * _DEADLINE_S), (100.0, 1000 * _DEADLINE_S))},
        y_log=True,
    )


def _remedies(visit: Visit, flops: int, usual_s: float, request: Tensor) -> tuple[Remedy, ...]:
    """Factors are in a usual request's time, as if arithmetic were all that takes time, or reading weights, as told."""
    subject = visit.subject
    in_layers = 1 - min(_head_flops(subject, request) / flops, 1.0)
    half, quarter = 1 / (1 - in_layers / 2), 1 / (1 - in_layers / 4)
    ceiling_s = min(visit.roofline.ceiling_s(flops, subject.weight_bytes), usual_s)
    reading_s = min(subject.weight_bytes / visit.roofline.bytes_per_s, usual_s)
    saved_s = reading_s * (1 - 1 / subject.dtype.itemsize)
    return (
        Remedy("distillation", f"half the layers: {half:.1f}x faster", half),
        Remedy("pruning", f"a quarter of each layer less: {quarter:.1f}x faster", quarter),
        Remedy(
            "quantization",
            f"8-bit weights: reading them takes {_told(reading_s - saved_s)} in place of {_told(reading_s)}",
            usual_s / max(usual_s - saved_s, usual_s / 4),
        ),
        Remedy("onnx", f"at most {usual_s / ceiling_s:.1f}x: what is not arithmetic", usual_s / ceiling_s),
        Remedy("edge-optimized-transformers", "another architecture, made for small machines, trained anew"),
    )


def _head_flops(subject: Subject, request: Tensor) -> int:
    """Of the product that scores the vocabulary, which fewer layers leave as it is."""
    if not subject.has_loss:
        return 0
    return 2 * request.numel() * subject.embed_dim * int(subject.config.vocab_size)


def _told(time_s: float) -> str:
    return f"{time_s:.1f} s" if time_s >= 1 else f"{1000 * time_s:.{0 if time_s >= 0.01 else 1}f} ms"


CHECKUP = RequestsInTime()
