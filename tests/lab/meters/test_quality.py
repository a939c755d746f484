"""Bits per byte against values known on paper."""

import math

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.quality import bits_per_byte


def test_a_uniform_guess_over_256_bytes_costs_8_bits():
    targets = torch.randint(256, (3, 5))
    assert bits_per_byte(torch.zeros(3, 5, 256), targets).tolist() == pytest.approx([8.0] * 3, rel=1e-6)  # float32


def test_known_probabilities():
    """p = 1/2, 1/4, 1/8 for the three targets: (1 + 2 + 3) / 3 bits."""
    probabilities = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.125, 0.875]]], dtype=torch.float64)
    bits = bits_per_byte(probabilities.log(), torch.tensor([[0, 1, 0]]))
    assert bits.item() == pytest.approx(2.0, rel=1e-14)  # float64


def test_masked_tokens_do_not_count_whatever_they_are():
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 0] = math.inf  # NaN bits, but masked out
    mask = torch.tensor([[False, True, True], [True, False, True]])
    bits = bits_per_byte(logits, torch.zeros(2, 3, dtype=torch.long), mask=mask)
    assert bits.tolist() == pytest.approx([2.0, 2.0], rel=1e-6)


def test_a_mask_weighs_the_tokens_it_leaves_equally():
    probabilities = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.125, 0.875]]])
    bits = bits_per_byte(probabilities.log(), torch.tensor([[0, 1, 0]]), mask=torch.tensor([[True, False, True]]))
    assert bits.item() == pytest.approx(2.0, rel=1e-6)


def test_half_precision_logits_are_averaged_in_float32():
    logits = torch.randn(2, 4096, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 4096, dtype=torch.uint8)
    bits = bits_per_byte(logits, targets)
    assert bits.dtype == torch.float32
    torch.testing.assert_close(bits, bits_per_byte(logits.double(), targets).float(), rtol=1e-5, atol=0)


def test_cross_entropy_agrees():
    logits, targets = torch.randn(4, 7, 11, dtype=torch.float64), torch.randint(11, (4, 7))
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
    torch.testing.assert_close(bits_per_byte(logits, targets), nats / math.log(2))


def test_gradients_flow():
    logits = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.tensor([[0, 4, 2]]), torch.tensor([[True, True, False]])
    assert torch.autograd.gradcheck(lambda x: bits_per_byte(x, targets, mask=mask), logits)


def test_mismatched_targets_are_refused():
    with pytest.raises(ArgumentError, match=r"targets must have the shape .*\(2, 3\); got \(2, 4\)"):
        bits_per_byte(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_an_example_without_tokens_is_refused():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ArgumentError, match="mask"):
        bits_per_byte(torch.zeros(2, 2, 5), torch.zeros(2, 2, dtype=torch.long), mask=mask)
