"""QueryKeyNorm against scaled cosines written out, its bound, and the encodings that it cannot have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.query_key_norm import QueryKeyNorm
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import Method, ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.position.xpos import XPos
from transformer_problems.solutions.training.drop_head import DropHead

OPS = {
    "dense": DenseAttention,
    "flash": FlashAttention,
    "tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "window": lambda: SlidingWindow(1000),  # wider than any input here
}
SCALES = [0.5, 1.0, 4.0, 20.0]


def draw(length: int, *, num_kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(2, 4, length, 8), (2, num_kv_heads, length, 8), (2, num_kv_heads, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_scales(op=None) -> QueryKeyNorm:
    wrapped = QueryKeyNorm(4, op, dtype=torch.float64)
    with torch.no_grad():
        wrapped.scale.copy_(torch.tensor(SCALES))
    return wrapped


def cosines(q: Tensor, k: Tensor) -> Tensor:
    norms = q.square().sum(-1).sqrt()[..., :, None] * k.square().sum(-1).sqrt()[..., None, :]
    return q @ k.mT / norms


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_scaled_cosines_in_outputs_and_gradients(op: str, is_causal: bool, length: int) -> None:
    q, k, v = draw(length)
    wrapped = with_scales(OPS[op]())
    scores = wrapped.scale[:, None, None] * cosines(q, k)
    if is_causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    expected, found = scores.softmax(-1) @ v, wrapped(q, k, v, is_causal=is_causal)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * cotangent).sum(), (q, k, v, wrapped.scale)) for y in (found, expected)]
    # float64 sums of up to 101 terms of scores up to 20, softened by the softmax
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_gradcheck_with_grouped_heads_and_a_mask() -> None:
    q, k, v = draw(5, num_kv_heads=2)
    wrapped = with_scales()
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None, None]

    def run(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(wrapped, {"scale": scale}, (q, k, v), {"mask": mask})

    assert torch.autograd.gradcheck(run, (q, k, v, wrapped.scale.detach().requires_grad_()))


@given(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4))
def test_norms_do_not_count(of_queries: float, of_keys: float) -> None:
    q, k, v = draw(9)
    wrapped = with_scales()
    torch.testing.assert_close(wrapped(q * of_queries, k * of_keys, v), wrapped(q, k, v), atol=1e-12, rtol=0)


def test_no_weight_exceeds_what_the_scale_allows() -> None:
    """A key along the query and n - 1 against it: e^g to (n - 1) e^-g, however long they are."""
    num_keys, scale = 5, 2.0
    q = torch.full((1, 1, 1, 4), 1e4, dtype=torch.float64)
    k = torch.cat([q, -q.expand(1, 1, num_keys - 1, 4)], dim=2)
    v = torch.zeros(1, 1, num_keys, 1, dtype=torch.float64)
    v[0, 0, 0] = 1
    weight = QueryKeyNorm(1, initial_scale=scale, dtype=torch.float64)(q, k, v).item()
    assert weight == pytest.approx(math.exp(scale) / (math.exp(scale) + (num_keys - 1) * math.exp(-scale)))


def test_norms_are_taken_in_float32() -> None:
    """A norm of 84,853 overflows float16, whose largest number is 65,504."""
    q = torch.full((1, 1, 4, 8), 30_000.0, dtype=torch.float16)
    assert QueryKeyNorm(1)(q, q, torch.ones_like(q)).isfinite().all()
    # queries become unit vectors times 10 sqrt(8), keys unit vectors; float16 rounds by 2^-11
    seen: list[Tensor] = []

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.extend((q, k))
        return v

    QueryKeyNorm(1, watch)(q, q, q)
    assert [x.dtype for x in seen] == [torch.float16] * 2
    assert [x.double().norm(dim=-1).mean().item() for x in seen] == pytest.approx([10 * 8**0.5, 1.0], rel=2**-10)


def test_zeros_stay_zeros_with_finite_gradients() -> None:
    q, k, v = (torch.zeros(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    QueryKeyNorm(1)(q, k, v).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_a_bias_is_added_to_the_bounded_scores() -> None:
    q, k, v = draw(20)
    positions = torch.arange(20)
    found = with_scales()(q, k, v, bias=PositionBias(ALiBi(4), q, positions, positions))
    scores = torch.tensor(SCALES)[:, None, None] * cosines(q, k) + ALiBi(4).bias(q, positions, positions)
    torch.testing.assert_close(found, scores.softmax(-1) @ v, atol=1e-12, rtol=0)


def test_a_bias_that_reads_queries_reads_normalised_ones() -> None:
    q, k, v = draw(20)
    shaw = ShawRelative(8, max_distance=3, dtype=torch.float64)
    positions = torch.arange(20)
    found = with_scales()(q, k, v, bias=PositionBias(shaw, q, positions, positions))
    unit_q = q / q.norm(dim=-1, keepdim=True)
    distances = (positions[None] - positions[:, None]).clamp(-3, 3) + 3
    by_position = torch.einsum("bhnd,nmd->bhnm", unit_q, shaw.weight[distances])
    scores = torch.tensor(SCALES)[:, None, None] * (cosines(q, k) + by_position)
    torch.testing.assert_close(found, scores.softmax(-1) @ v, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "position",
    [
        XPos(8),
        TransformerXLRelative(32, 4),
        ScaledRotaryEmbedding(8, method="yarn", factor=4, trained_length=16),
        ScaledRotaryEmbedding(8, method="linear", factor=4, trained_length=16, attention_factor=1.2),
    ],
    ids=lambda position: type(position).__name__,
)
def test_encodings_that_change_norms_are_refused(position: PositionEncoding) -> None:
    name = type(position).__name__
    for op in (QueryKeyNorm(4), DropHead(QueryKeyNorm(4))):
        with pytest.raises(CombinationError, match=f"{name} changes the norms .*, which {type(op).__name__} ignores"):
            SelfAttention(32, 4, op=op, position=position)
    SelfAttention(32, 4, op=DropHead(), position=position)


@pytest.mark.parametrize("method", ["linear", "ntk", "dynamic_ntk"])
def test_encodings_that_only_turn_are_welcome(method: Method) -> None:
    scaled = ScaledRotaryEmbedding(8, method=method, factor=4, trained_length=16)
    for position in (RotaryEmbedding(8), ALiBi(4), ShawRelative(8, max_distance=3), scaled):
        SelfAttention(32, 4, op=QueryKeyNorm(4), position=position)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="initial_scale must be positive; got -1"):
        QueryKeyNorm(4, initial_scale=-1)
    with pytest.raises(CombinationError, match="QueryKeyNorm is built for num_heads=2"):
        SelfAttention(16, 4, op=QueryKeyNorm(2))
    q, k, v = draw(3)
    with pytest.raises(ArgumentError, match="num_heads must equal the number of query heads; got 1 and 4"):
        QueryKeyNorm(1)(q, k, v)
