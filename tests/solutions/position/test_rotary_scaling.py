"""Every scaling method against Transformers' rotary functions, and against what the papers promise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding, inverse_frequencies
from transformer_problems.solutions.position.rotary_scaling import Method, ScaledRotaryEmbedding

TRAINED = 64
HEAD_DIM = 16
CASES: list[tuple[Method, str, float, dict[str, float]]] = [
    ("linear", "linear", 4.0, {}),
    ("dynamic_ntk", "dynamic", 1.0, {}),
    ("dynamic_ntk", "dynamic", 3.0, {}),
    ("yarn", "yarn", 4.0, {}),
    ("yarn", "yarn", 16.0, {"beta_fast": 8.0, "beta_slow": 2.0}),
    ("yarn", "yarn", 4.0, {"attention_factor": 1.5}),
]


def peer_embedding(rope_type: str, factor: float, extra: dict[str, float]) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": factor, **extra}
    max_length = TRAINED
    if rope_type == "yarn":
        parameters["original_max_position_embeddings"] = TRAINED
        max_length = int(TRAINED * factor)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_length,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.peer
@pytest.mark.parametrize(("method", "rope_type", "factor", "extra"), CASES)
@pytest.mark.parametrize("length", [1, 63, 101, 251])
def test_equals_transformers(
    method: Method, rope_type: str, factor: float, extra: dict[str, float], length: int
) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(2, 4, length, HEAD_DIM), torch.randn(2, 2, length, HEAD_DIM)
    q.requires_grad_(), k.requires_grad_()
    positions = torch.arange(length)
    cos, sin = peer_embedding(rope_type, factor, extra)(q, positions[None])
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    encoding = ScaledRotaryEmbedding(HEAD_DIM, method=method, factor=factor, trained_length=TRAINED, **extra)
    ours = encoding.rotate(q, k, positions, positions)
    # frequencies differ by a few float32 steps, angles reach `length` rad, features stay below 5 (times 1.5)
    tolerance = {"atol": 30 * length * 2**-23, "rtol": 0.0}
    weights = [torch.randn_like(y) for y in ours]
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, peer, **tolerance)
    for mine, peer in zip(_gradients(ours, weights, q, k), _gradients(theirs, weights, q, k), strict=True):
        torch.testing.assert_close(mine, peer, **tolerance)


@pytest.mark.peer
@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_static_ntk_is_the_dynamic_one_at_the_stretched_length(factor: float) -> None:
    """Transformers has no static form: its dynamic one with factor 1 at `factor` times the length is the same."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    embedding = peer_embedding("dynamic", 1.0, {})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](embedding.config, None, seq_len=int(TRAINED * factor))
    # exponents are formed in another order: a few float32 steps
    torch.testing.assert_close(frequencies("ntk", factor), expected, rtol=2**-20, atol=0)


def frequencies(method: Method, factor: float, *, last_position: int = 0, **extra: float) -> Tensor:
    """The frequencies in use, read off one-hot queries at a position of one thousandth."""
    q = torch.eye(HEAD_DIM // 2, HEAD_DIM, dtype=torch.float64)[None, :, None, :]  # pair i of head i
    encoding = ScaledRotaryEmbedding(HEAD_DIM, method=method, factor=factor, trained_length=TRAINED, **extra)
    small = torch.tensor([1e-3])
    rotated, _ = encoding.rotate(q, q, small, torch.tensor([float(last_position)]))
    pair = torch.arange(HEAD_DIM // 2)
    angle = torch.atan2(rotated[0, pair, 0, pair + HEAD_DIM // 2], rotated[0, pair, 0, pair])
    return (angle / small).float()


def test_ntk_keeps_the_highest_and_divides_the_lowest_frequency() -> None:
    plain = inverse_frequencies(HEAD_DIM, 10_000.0, torch.device("cpu"))
    scaled = frequencies("ntk", 8.0)
    # one float32 angle of a thousandth, divided back
    torch.testing.assert_close(scaled[0], plain[0], rtol=2**-20, atol=0)
    torch.testing.assert_close(scaled[-1], plain[-1] / 8, rtol=2**-20, atol=0)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    plain = inverse_frequencies(HEAD_DIM, 10_000.0, torch.device("cpu"))
    ratio = frequencies("yarn", 8.0) / plain
    torch.testing.assert_close(ratio[0], torch.tensor(1.0), rtol=2**-20, atol=0)
    torch.testing.assert_close(ratio[-1], torch.tensor(1 / 8), rtol=2**-20, atol=0)
    assert (ratio.diff() <= 2**-20).all()


def test_yarn_sharpens_scores_by_the_papers_temperature() -> None:
    q = torch.randn(1, 1, 1, HEAD_DIM, dtype=torch.float64)
    encoding = ScaledRotaryEmbedding(HEAD_DIM, method="yarn", factor=8.0, trained_length=TRAINED)
    start = torch.zeros(1)
    rotated_q, rotated_k = encoding.rotate(q, q, start, start)
    expected = (0.1 * math.log(8) + 1) ** 2 * (q * q).sum()
    torch.testing.assert_close((rotated_q * rotated_k).sum(), expected, rtol=2**-22, atol=0)  # cos(0) in float32


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_dynamic_ntk_leaves_trained_lengths_alone(factor: float) -> None:
    q = torch.randn(1, 1, TRAINED, HEAD_DIM)
    positions = torch.arange(TRAINED)
    encoding = ScaledRotaryEmbedding(HEAD_DIM, method="dynamic_ntk", factor=factor, trained_length=TRAINED)
    plain = RotaryEmbedding(HEAD_DIM).rotate(q, q, positions, positions)
    assert torch.equal(encoding.rotate(q, q, positions, positions)[0], plain[0])


def test_dynamic_ntk_depends_on_the_largest_position_and_refuses_to_stream() -> None:
    near = frequencies("dynamic_ntk", 1.0, last_position=TRAINED - 1)
    far = frequencies("dynamic_ntk", 1.0, last_position=4 * TRAINED - 1)
    torch.testing.assert_close(far, frequencies("ntk", 4.0), rtol=2**-20, atol=0)
    assert far[-1] < near[-1]
    encoding = ScaledRotaryEmbedding(8, method="dynamic_ntk", factor=1.0, trained_length=TRAINED)
    with pytest.raises(CombinationError, match="ScaledRotaryEmbedding depends on the final length"):
        SelfAttention(16, num_heads=2, position=encoding).initial_state(1)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_factor_one_is_plain_rope(method: Method) -> None:
    q = torch.randn(1, 2, 90, HEAD_DIM)
    positions = torch.arange(90)
    encoding = ScaledRotaryEmbedding(HEAD_DIM, method=method, factor=1.0, trained_length=TRAINED)
    plain, _ = RotaryEmbedding(HEAD_DIM).rotate(q, q, positions, positions)
    assert torch.equal(encoding.rotate(q, q, positions, positions)[0], plain)


def test_no_tokens_are_no_error() -> None:
    none = torch.zeros(1, 2, 0, HEAD_DIM), torch.arange(0)
    q, k = ScaledRotaryEmbedding(HEAD_DIM, method="dynamic_ntk", factor=2.0, trained_length=TRAINED).rotate(
        none[0], none[0], none[1], none[1]
    )
    assert q.shape == k.shape == none[0].shape


def test_wrong_arguments_are_named() -> None:
    good: dict[str, Any] = {"method": "yarn", "factor": 2.0, "trained_length": 8}
    with pytest.raises(UnknownNameError, match=r"unknown rotary scaling method 'yarm'\. Nearest: yarn"):
        ScaledRotaryEmbedding(8, **{**good, "method": "yarm"})
    with pytest.raises(ArgumentError, match=r"factor must be at least 1; got 0\.5"):
        ScaledRotaryEmbedding(8, **{**good, "factor": 0.5})
    with pytest.raises(ArgumentError, match="beta_fast must be more than beta_slow=40; got 32"):
        ScaledRotaryEmbedding(8, **good, beta_slow=40.0)
    with pytest.raises(ArgumentError, match="head_dim must be more than 2"):
        ScaledRotaryEmbedding(2, **good)


def _gradients(outputs: tuple[Tensor, ...], weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs)
