"""How long single requests take, one after the other: the slow ones count."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive, require_positive_int
from transformer_problems.core.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds of each request, in the order they were answered."""

    times_s: tuple[float, ...]

    def percentile_s(self, percent: float) -> float:
        """The time within which so many percent of the requests were answered, interpolated between requests.

        Raises:
            ArgumentError: If `percent` is not from 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ArgumentError(f"percent must be from 0 to 100; got {percent}.")
        return float(np.percentile(self.times_s, percent))

    def share_within(self, deadline_s: float) -> float:
        """The share of requests answered within a deadline.

        Raises:
            ArgumentError: If the deadline is not positive.
        """
        require_positive(deadline_s=deadline_s)
        return sum(time_s <= deadline_s for time_s in self.times_s) / len(self.times_s)


def time_requests(
    answer: Callable[[Tensor], object],
    requests: Sequence[Tensor],
    *,
    num: int,
    device: torch.device | str,
    warmup: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> RequestTimes:
    """Answer `num` requests, one after the other, and time each from the call to its finished answer.

    Garbage is collected before the first request, and left to Python's own collector meanwhile, as in use. On CUDA a
    request ends when the device has done its work.

    Args:
        answer: Takes one request.
        requests: Taken in turn, from the first again after the last.
        warmup: Requests answered before, untimed.
        clock: Seconds; for tests.

    Raises:
        ArgumentError: If there are no requests, or a count is not positive.
    """
    require_positive_int(num=num, warmup=warmup)
    if not requests:
        raise ArgumentError("requests must hold one request at least; got none.")
    is_cuda = torch.device(device).type == "cuda"
    for i in range(warmup):
        answer(requests[i % len(requests)])
    gc.collect()
    times = []
    for i in range(num):
        request = requests[i % len(requests)]
        if is_cuda:
            torch.cuda.synchronize(device)
        start = clock()
        answer(request)
        if is_cuda:
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return RequestTimes(tuple(times))
