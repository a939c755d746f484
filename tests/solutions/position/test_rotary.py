"""RotaryEmbedding against the formula and against Llama's implementation."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.rotary import RotaryEmbedding


def naive(x: Tensor, positions: list[int], base: float) -> Tensor:
    """Each half-pair turned by its angle, one by one."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for n, position in enumerate(positions):
        for i in range(half):
            angle = position * base ** (-i / half)
            first, second = x[..., n, i], x[..., n, i + half]
            out[..., n, i] = first * math.cos(angle) - second * math.sin(angle)
            out[..., n, i + half] = first * math.sin(angle) + second * math.cos(angle)
    return out


@pytest.mark.parametrize("length", [1, 63, 64, 101])
@pytest.mark.parametrize("base", [100.0, 10_000.0])
def test_equals_the_formula(length: int, base: float) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, length, 8, dtype=torch.float64)
    positions = torch.arange(5, 5 + length)
    rotated = RotaryEmbedding(8, base=base).rotate(q, k, positions, positions)
    for turned, x in zip(rotated, (q, k), strict=True):
        # angles reach 106 rad in float32, whose step there is 2^-17; features stay below 5
        torch.testing.assert_close(turned, naive(x, positions.tolist(), base), atol=5 * 2**-17, rtol=0)


@pytest.mark.peer
def test_equals_llama_in_outputs_and_gradients() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 100, 16, requires_grad=True), torch.randn(2, 2, 100, 16, requires_grad=True)
    positions = torch.stack([torch.arange(100), torch.arange(700, 800)])
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))(q, positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    ours = RotaryEmbedding(16).rotate(q, k, positions, positions)
    weights = [torch.randn_like(y) for y in ours]
    # frequencies may differ in their last bit, and angles reach 800 rad: 800 * 2^-23, times features below 5
    tolerance = {"atol": 5 * 800 * 2**-23, "rtol": 0.0}
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, peer, **tolerance)
    for mine, peer in zip(_gradients(ours, weights, q, k), _gradients(theirs, weights, q, k), strict=True):
        torch.testing.assert_close(mine, peer, **tolerance)


def test_keeps_lengths_of_vectors() -> None:
    x = torch.randn(1, 1, 50, 8, dtype=torch.float64)
    turned, _ = RotaryEmbedding(8).rotate(x, x, torch.arange(50), torch.arange(50))
    # cos^2 + sin^2 is 1 up to the float32 rounding of both
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=0, rtol=2**-22)


def test_gradcheck() -> None:
    q, k = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(5)
    assert torch.autograd.gradcheck(lambda q, k: RotaryEmbedding(4).rotate(q, k, positions, positions), (q, k))


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="head_dim must be a multiple of 2, a pair of features; got 15. Choose 14 or 16"
    ):
        RotaryEmbedding(15)


def _gradients(outputs: tuple[Tensor, ...], weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs)
