"""Percentiles and deadlines of times that are known."""

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.requests import RequestTimes, time_requests


def test_each_request_is_timed_from_call_to_answer() -> None:
    now, seen = 0.0, []

    def answer(request: torch.Tensor) -> None:
        nonlocal now
        seen.append(int(request))
        now += float(request)

    requests = [torch.tensor(i) for i in (1, 2, 7)]
    times = time_requests(answer, requests, num=5, device="cpu", warmup=2, clock=lambda: now)
    assert seen == [1, 2, 1, 2, 7, 1, 2]
    assert times.times_s == (1, 2, 7, 1, 2)


def test_percentiles_and_shares() -> None:
    times = RequestTimes(tuple(float(i) for i in range(101)))
    assert [times.percentile_s(p) for p in (0, 50, 95, 99, 100)] == [0, 50, 95, 99, 100]
    assert times.share_within(49) == pytest.approx(50 / 101)
    assert times.share_within(1000) == 1


def test_bad_arguments_are_refused() -> None:
    times = RequestTimes((1.0,))
    for call, words in (
        (lambda: times.percentile_s(101), "percent must be from 0 to 100"),
        (lambda: times.share_within(0), "deadline_s"),
        (lambda: time_requests(print, [], num=1, device="cpu"), "requests must hold one"),
        (lambda: time_requests(print, [torch.ones(1)], num=0, device="cpu"), "num"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
