"""A model that now and then keeps a request waiting."""

import time
from copy import deepcopy

from torch import nn

from transformer_problems.checkpoints.subject import Subject

_EVERY, _STALL_S = 5, 0.15


class Stalling:
    """Every fifth pass waits before it begins, as behind a lock, a page fault or a collector of garbage."""

    problem = 18
    name = f"every {_EVERY}th request waits {_STALL_S:g} s"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        model.register_forward_pre_hook(_Stall(seed % _EVERY))
        return subject.with_model(model)


class _Stall:
    def __init__(self, num_passes: int) -> None:
        self.num_passes = num_passes

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self.num_passes += 1
        if self.num_passes % _EVERY == 0:
            time.sleep(_STALL_S)


FAULT = Stalling()
