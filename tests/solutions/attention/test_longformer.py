"""LongformerAttention against its definition with explicit N x N masks, against transformers, and in chunks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention.longformer import LongformerAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding

WIDTH, HEADS, DIM = 32, 4, 8
POSITIONS: dict[str, Callable[[], PositionEncoding | None]] = {
    "none": lambda: None,
    "rotary": lambda: RotaryEmbedding(DIM),
    "alibi": lambda: ALiBi(HEADS),
    "shaw": lambda: ShawRelative(DIM, max_distance=9),
}
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms of size 1


def build(**options: object) -> LongformerAttention:
    torch.manual_seed(0)
    return LongformerAttention(WIDTH, HEADS, **{"window_size": 6, **options}).double()


def draw(length: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)


def naive(layer: LongformerAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Two dense attentions, one with each set of projections; global rows are taken from the second."""
    n = x.shape[1]
    index = torch.arange(n)
    is_global = torch.tensor([i in layer.global_tokens for i in range(n)])
    dilations = (layer.dilation,) * HEADS if isinstance(layer.dilation, int) else layer.dilation
    distance = index[:, None] - index
    window = torch.stack([(distance.abs() <= layer.window_size * d) & (distance % d == 0) for d in dilations])
    past = distance >= 0 if layer.is_causal else torch.ones(n, n, dtype=torch.bool)
    keys = torch.ones(len(x), 1, 1, n, dtype=torch.bool) if key_mask is None else key_mask[:, None, None, :]
    local = attend(layer, x, (layer.q_proj, layer.k_proj, layer.v_proj), (window | is_global) & past & keys)
    wide = attend(layer, x, (layer.global_q_proj, layer.global_k_proj, layer.global_v_proj), past & keys)
    return layer.out_proj(torch.where(is_global[:, None], wide, local).transpose(1, 2).flatten(-2))


def attend(layer: LongformerAttention, x: Tensor, projections: tuple[torch.nn.Linear, ...], rule: Tensor) -> Tensor:
    q, k, v = (p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for p in projections)
    positions, bias = torch.arange(x.shape[1]), None
    if layer.position is not None:
        bias = layer.position.bias(q, positions, positions)
        q, k = layer.position.rotate(q, k, positions, positions)
    scores = q @ k.transpose(-2, -1) / DIM**0.5 + (0.0 if bias is None else bias)
    return (scores.masked_fill(~rule, -1e300).softmax(-1) * rule) @ v


def assert_same_with_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad(actual, inputs, weight, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, inputs, weight, allow_unused=True, materialize_grads=True)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0.0)  # sums over all tokens as well


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("dilation", "global_tokens"), [(1, (0,)), (2, (70, 3, 0)), ((1, 1, 2, 3), (0, 1, 62, 99)), (1, (500,))]
)
@pytest.mark.parametrize("n", [1, 63, 64, 100, 101])
def test_equals_the_definition(
    n: int, dilation: int | tuple[int, ...], global_tokens: tuple[int, ...], is_causal: bool
) -> None:
    layer, x = build(dilation=dilation, global_tokens=global_tokens, is_causal=is_causal, bias=True), draw(n)
    assert_same_with_gradients(layer(x), naive(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_positions_and_key_mask(position: str, is_causal: bool) -> None:
    options = {"dilation": (1, 2, 1, 3), "global_tokens": (0, 2, 50)}
    layer, x = build(position=POSITIONS[position](), is_causal=is_causal, **options), draw(101)
    keep = torch.rand(2, 101) < 0.7
    keep[0, :20] = False  # a global token is masked, and in the causal form some tokens see nothing
    actual = layer(x, key_mask=keep)
    assert_same_with_gradients(actual, naive(layer, x, keep), [x, *layer.parameters()])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("global_tokens", [(0,), (0, 1, 17, 40)])
@pytest.mark.parametrize("sizes", [(70,), (1,) * 70, (3, 40, 1, 26)])
def test_streamed_equals_whole(sizes: tuple[int, ...], global_tokens: tuple[int, ...], position: str) -> None:
    options = {"dilation": (1, 2, 1, 3), "global_tokens": global_tokens, "position": POSITIONS[position]()}
    layer, x = build(is_causal=True, **options), draw(70).detach()
    state, outputs = layer.initial_state(2), []
    with torch.no_grad():
        for chunk in x.split(sizes, dim=1):
            y, state = layer.stream(chunk, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x), **TOLERANCE)
    # the window of the widest head and the global tokens before it; the past ended with the last global token
    assert len(state.window) == 18 and len(state.past) == 0
    assert state.num_bytes == 2 * 2 * WIDTH * 8 * (18 + len(global_tokens))


def test_streamed_gradients_equal_those_of_the_whole() -> None:
    layer, x = build(is_causal=True, global_tokens=(0, 9)), draw(30)
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(7, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    assert_same_with_gradients(torch.cat(outputs, 1), layer(x), [x, *layer.parameters()])


def test_gradcheck() -> None:
    layer = build(window_size=2, global_tokens=(1,))
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("backward", [False, True])
def test_work_is_linear(backward: bool) -> None:
    layer = LongformerAttention(WIDTH, HEADS, window_size=32, global_tokens=(0, 1))

    def flops(length: int) -> int:
        x = torch.randn(1, length, WIDTH)
        return count_flops(lambda: layer(x).sum().backward() if backward else layer(x))

    assert 1.9 < flops(8192) / flops(4096) < 2.1  # the two edges do not grow


@pytest.mark.peer
@pytest.mark.parametrize("global_tokens", [(0,), (0, 5, 30)])
@pytest.mark.parametrize("num_padding", [0, 9])
def test_equals_transformers(num_padding: int, global_tokens: tuple[int, ...]) -> None:
    from transformers.models.longformer.configuration_longformer import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    # their window counts both sides, and they want a length that is a multiple of it
    config = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[12],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    peer = LongformerSelfAttention(config, layer_id=0).double()
    layer = build(global_tokens=global_tokens, bias=True)
    layer.out_proj = torch.nn.Identity()  # theirs is another module
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    names |= {f"global_{ours}": f"{theirs}_global" for ours, theirs in names.items()}
    for ours, theirs in names.items():
        getattr(layer, ours).load_state_dict(getattr(peer, theirs).state_dict())

    n = 96
    x, keep = draw(n), torch.ones(2, n, dtype=torch.bool)
    keep[1, n - num_padding :] = False
    code = torch.where(keep, 0.0, -10_000.0).double()  # negative: masked; positive: global
    code[:, list(global_tokens)] = 10_000.0
    (theirs,) = peer(
        x, attention_mask=code, is_index_masked=code < 0, is_index_global_attn=code > 0, is_global_attn=True
    )
    ours = layer(x, key_mask=keep)
    torch.testing.assert_close(ours[keep], theirs[keep], atol=1e-6, rtol=0.0)  # their softmax is float32
    weight = torch.randn_like(ours) * keep[..., None]
    pairs = [(x, x)]
    for mine, other in names.items():
        pairs += zip(getattr(layer, mine).parameters(), getattr(peer, other).parameters(), strict=True)
    found = torch.autograd.grad(ours, [p for p, _ in pairs], weight)
    wanted = torch.autograd.grad(theirs, [p for _, p in pairs], weight)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=0.0)  # sums over 192 tokens of such errors


def test_refusals() -> None:
    for global_tokens in ((), (-1,), (3, 3)):
        with pytest.raises(ArgumentError, match="global_tokens must be distinct"):
            build(global_tokens=global_tokens)
    for global_tokens in ((0, 2.5), ("0",), "0", 3, None):
        with pytest.raises(ArgumentError, match="^global_tokens must be a tuple of whole numbers; got "):
            build(global_tokens=global_tokens)
    for dilation in (2.0, "2", (1, 1, 1, 1.5), (1, 1, 1, "2")):
        with pytest.raises(ArgumentError, match="^dilation must be a positive whole number; got "):
            build(dilation=dilation)
    with pytest.raises(ArgumentError, match="dilation must have one entry"):
        build(dilation=(1, 2))
    with pytest.raises(ArgumentError, match="window_size must be positive"):
        build(window_size=0)
    with pytest.raises(CombinationError, match="adds to the embeddings"):
        build(position=SinusoidalEncoding(WIDTH))
    with pytest.raises(ArgumentError, match="is_causal must be True"):
        build().initial_state(1)
