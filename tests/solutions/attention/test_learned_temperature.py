"""LearnedTemperature against softmax(scores / tau) written out, in outputs and gradients, around several ops."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.learned_temperature import LearnedTemperature
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.testing import check_attention_op, check_mixer

OPS = {
    "dense": DenseAttention,
    "flash": FlashAttention,
    "tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "window": lambda: SlidingWindow(1000),  # wider than any input here
}
TEMPERATURES = [0.25, 1.0, 3.0, 40.0]


def draw(length: int, *, num_kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(2, 4, length, 8), (2, num_kv_heads, length, 8), (2, num_kv_heads, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_temperatures(op=None) -> LearnedTemperature:
    wrapped = LearnedTemperature(4, op, dtype=torch.float64)
    with torch.no_grad():
        wrapped.log_temperature.copy_(torch.tensor(TEMPERATURES, dtype=torch.float64).log())
    return wrapped


def divided_scores(q: Tensor, k: Tensor, log_temperature: Tensor) -> Tensor:
    return (q @ k.mT) / 8**0.5 / log_temperature.exp()[:, None, None]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_divided_scores_in_outputs_and_gradients(op: str, is_causal: bool, length: int) -> None:
    q, k, v = draw(length)
    wrapped = with_temperatures(OPS[op]())
    scores = divided_scores(q, k, wrapped.log_temperature)
    if is_causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    expected, found = scores.softmax(-1) @ v, wrapped(q, k, v, is_causal=is_causal)
    cotangent = torch.randn_like(expected)
    inputs = (q, k, v, wrapped.log_temperature)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (found, expected)]
    # float64 sums of up to 101 terms of scores up to 40, softened by the softmax
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_gradcheck_with_grouped_heads_and_a_mask() -> None:
    q, k, v = draw(5, num_kv_heads=2)
    wrapped = with_temperatures()
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None, None]

    def run(q: Tensor, k: Tensor, v: Tensor, log_temperature: Tensor) -> Tensor:
        return torch.func.functional_call(wrapped, {"log_temperature": log_temperature}, (q, k, v), {"mask": mask})

    assert torch.autograd.gradcheck(run, (q, k, v, wrapped.log_temperature.detach().requires_grad_()))


def test_a_temperature_of_one_changes_nothing() -> None:
    q, k, v = draw(33)
    assert torch.equal(LearnedTemperature(4)(q, k, v), DenseAttention()(q, k, v))


def test_known_weights() -> None:
    """Scores 0 and ln 3 give weights 1/4 and 3/4; at half the temperature 1/10 and 9/10, at double 1 to sqrt 3."""
    q = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    v = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    wrapped = LearnedTemperature(3, dtype=torch.float64)
    with torch.no_grad():
        wrapped.log_temperature.copy_(torch.tensor([1.0, 0.5, 2.0]).log())
    root = 3**0.5
    assert wrapped(q, k, v).flatten().tolist() == pytest.approx([0.75, 0.9, root / (1 + root)])


@pytest.mark.parametrize("initial", [0.1, 1.0, 7.0])
def test_it_starts_where_it_is_told(initial: float) -> None:
    assert LearnedTemperature(3, initial=initial).temperature().tolist() == pytest.approx([initial] * 3)


def test_descent_keeps_the_temperature_positive() -> None:
    wrapped = LearnedTemperature(2)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped.temperature().sum().backward()
        optimizer.step()
    assert (wrapped.temperature() > 0).all()
    assert (wrapped.temperature() < 1).all()


def score_of(encoding: PositionEncoding, q: Tensor, k: Tensor, tau: float) -> Tensor:
    """What an op adds up, [..., H, N, M], for queries divided by tau before anything reads them."""
    positions = torch.arange(q.shape[-2])
    bias = encoding.bias(q / tau, positions, positions)
    assert bias is not None
    return q / tau @ k.mT / 8**0.5 + bias


@pytest.mark.parametrize("encoding", [ALiBi(4), ShawRelative(8, max_distance=3)], ids=lambda e: type(e).__name__)
def test_queries_are_divided_wherever_they_are_read(encoding: PositionEncoding) -> None:
    encoding = encoding.double()
    q, k, v = draw(20)
    positions = torch.arange(20)
    bias = PositionBias(encoding, q, positions, positions)
    found = LearnedTemperature(4, initial=0.5, dtype=torch.float64)(q, k, v, bias=bias)
    torch.testing.assert_close(found, score_of(encoding, q, k, 0.5).softmax(-1) @ v, atol=1e-12, rtol=0)


def test_shaws_whole_score_is_divided_and_alibis_slope_is_not() -> None:
    q, k, _ = draw(20)
    shaw, alibi = ShawRelative(8, max_distance=3, dtype=torch.float64), ALiBi(4)
    torch.testing.assert_close(score_of(shaw, q, k, 0.5), 2 * score_of(shaw, q, k, 1.0))
    content = q @ k.mT / 8**0.5
    torch.testing.assert_close(score_of(alibi, q, k, 0.5) - 2 * content, score_of(alibi, q, k, 1.0) - content)


def test_of_transformer_xls_biases_u_is_divided_and_v_is_not() -> None:
    torch.manual_seed(0)
    encoding = TransformerXLRelative(32, 4).double()
    q, k, v = draw(20)
    positions = torch.arange(20)
    rotated, _ = encoding.rotate(q, k, positions, positions)
    bias = PositionBias(encoding, q, positions, positions)
    found = LearnedTemperature(4, initial=0.5, dtype=torch.float64)(rotated, k, v, bias=bias)
    content = 2 * (q + encoding.content_bias[:, None]) @ k.mT / 8**0.5
    expected = (content + encoding.bias(2 * q, positions, positions)).softmax(-1) @ v
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_it_streams_around_an_op_with_a_state_of_its_own() -> None:
    op = LearnedTemperature(4, Performer(8, num_features=16), initial=0.5, dtype=torch.float64)
    check_attention_op(op)
    check_mixer(SelfAttention(32, 4, op=op), embed_dim=32)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="initial must be positive; got 0"):
        LearnedTemperature(4, initial=0)
    with pytest.raises(CombinationError, match="LearnedTemperature is built for num_heads=2"):
        SelfAttention(16, 4, op=LearnedTemperature(2))
    q, k, v = draw(3)
    with pytest.raises(ArgumentError, match="num_heads must equal the number of query heads; got 1 and 4"):
        LearnedTemperature(1)(q, k, v)
