"""The memory meter against sizes known on paper. Float32 elements are 4 bytes; every figure is exact."""

import os

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.memory import _replayed_peak, peak_memory_bytes

N = 256
SQUARE = N * N * 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.ones(N, N, device="cuda") @ torch.ones(N, N, device="cuda")  # cuBLAS takes its workspace once
    return request.param


@pytest.fixture
def square(device):
    return torch.ones(N, N, device=device)


def test_nothing_allocates_nothing(device):
    assert peak_memory_bytes(lambda: None, device=device) == 0


def test_views_and_in_place_work_allocate_nothing(square, device):
    assert peak_memory_bytes(lambda: square.view(-1).add_(square.view(-1)), device=device) == 0


def test_a_sum_allocates_its_result(square, device):
    assert peak_memory_bytes(lambda: square + square, device=device) == SQUARE


def test_a_matmul_allocates_its_result(square, device):
    assert peak_memory_bytes(lambda: square @ square, device=device) == SQUARE


def test_a_chain_holds_two_at_a_time(square, device):
    def chain():
        y = square
        for _ in range(5):
            y = y + square  # the old y lives until the new one is there

    assert peak_memory_bytes(chain, device=device) == 2 * SQUARE


def test_what_is_freed_before_does_not_add(square, device):
    def function():
        big = torch.cat([square, square, square])
        del big
        return square + square

    assert peak_memory_bytes(function, device=device) == 3 * SQUARE


def test_what_is_kept_adds(square, device):
    assert peak_memory_bytes(lambda: [square + square for _ in range(4)], device=device) == 4 * SQUARE


def test_memory_kept_from_an_earlier_call_does_not_count(square, device):
    kept = []

    def function():
        kept.append(square + square)

    assert [peak_memory_bytes(function, device=device) for _ in range(3)] == [SQUARE] * 3


def test_softmax_attention_holds_two_score_matrices(device):
    """Scores and weights live together for a moment; the output is small beside them."""
    head_dim = 8
    q, k, v = torch.ones(3, N, head_dim, device=device)
    peak = peak_memory_bytes(lambda: (q @ k.T).softmax(-1) @ v, device=device)
    assert peak == 2 * SQUARE


def test_backward_counts_saved_activations_and_gradients(device):
    x = torch.ones(N, N, device=device, requires_grad=True)

    def step():
        y = x.exp()  # saved for its own backward
        y.sum().backward()

    scalar = 4 if device == "cpu" else 512  # the loss; CUDA rounds up to blocks of 512 bytes
    first = peak_memory_bytes(step, device=device)
    # y and x.grad; the sum's gradient is an expanded scalar beside the loss.
    assert first == 2 * SQUARE + 2 * scalar
    assert x.grad is not None


def test_a_training_step_of_linear_layers(device):
    """Three weight gradients at the end at least; at most those, two saved activations and one gradient on its way."""
    model = nn.Sequential(*(nn.Linear(N, N, bias=False, device=device) for _ in range(3)))
    x = torch.ones(N, N, device=device)
    peak = peak_memory_bytes(lambda: model(x).sum().backward(), device=device)
    assert 3 * SQUARE <= peak <= 6 * SQUARE


def test_on_the_cpu_releasing_older_memory_is_not_credited():
    held = [torch.ones(N, N) for _ in range(4)]

    def function():
        held.clear()
        return torch.ones(N, N)

    assert peak_memory_bytes(function, device="cpu") == SQUARE


def test_replay_ignores_stale_releases_and_uses_allocated_sizes():
    assert _replayed_peak([(1, -100), (1, 8), (2, 8), (1, -999), (3, 4)]) == 16
    assert _replayed_peak([]) == 0


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_memory_bytes(lambda: None, device="cpu")
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "1")
    peak_memory_bytes(lambda: None, device="cpu")
    assert os.environ["KINETO_LOG_LEVEL"] == "1"


def test_an_error_inside_the_function_comes_through_and_the_meter_still_works():
    def fail():
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        peak_memory_bytes(fail, device="cpu")
    assert peak_memory_bytes(lambda: torch.ones(10), device="cpu") == 40


def test_other_devices_are_refused():
    with pytest.raises(ArgumentError, match="device must be cpu or cuda"):
        peak_memory_bytes(lambda: None, device="meta")
