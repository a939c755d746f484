"""SelfAttention: the layer against the formula and PyTorch's, its streaming, and the combinations it refuses."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.quantized_cache import QuantizedKVCache
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative

WIDTH, HEADS = 16, 4
DIM = WIDTH // HEADS


def build(**arguments: object) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(WIDTH, HEADS, **arguments).double()  # type: ignore[arg-type]


def draw(length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def naive(layer: SelfAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Head by head with the layer's weights."""
    repeats, heads = layer.num_heads // layer.num_kv_heads, []
    for h in range(layer.num_heads):
        own, shared = slice(h * DIM, (h + 1) * DIM), slice(h // repeats * DIM, (h // repeats + 1) * DIM)
        q, k, v = x @ layer.q_proj.weight[own].T, x @ layer.k_proj.weight[shared].T, x @ layer.v_proj.weight[shared].T
        weights = (q @ k.mT / DIM**0.5).exp()
        if layer.is_causal:
            weights = weights.tril()
        if key_mask is not None:
            weights = weights * key_mask[:, None, :]
        total = weights.sum(-1, keepdim=True)
        heads.append(weights / torch.where(total == 0, 1.0, total) @ v)
    return torch.cat(heads, -1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(length: int, num_kv_heads: int, is_causal: bool) -> None:
    layer, x = build(num_kv_heads=num_kv_heads, is_causal=is_causal), draw(length).requires_grad_()
    key_mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.7
    key_mask[0, 0] = False  # with causality, a row without a key
    for mask in (None, key_mask):
        ours, theirs = layer(x, key_mask=mask), naive(layer, x, mask)
        # float64 sums of about a hundred terms of order one
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        inputs = (x, *layer.parameters())
        ours_grads, theirs_grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs))
        torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-10, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("bias", [False, True])
def test_equals_pytorch(bias: bool) -> None:
    layer, x = build(bias=bias), draw(50)
    peer = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    state = {"in_proj_weight": torch.cat([p.weight for p in projections]), "out_proj.weight": layer.out_proj.weight}
    if bias:
        state |= {"in_proj_bias": torch.cat([p.bias for p in projections]), "out_proj.bias": layer.out_proj.bias}
    peer.load_state_dict(state)
    hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
    theirs, _ = peer(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(layer(x), theirs, atol=1e-12, rtol=0)  # float64 sums of fifty terms


POSITIONS: dict[str, PositionEncoding | None] = {
    "none": None,
    "rotary": RotaryEmbedding(DIM),
    "alibi": ALiBi(HEADS),
    "shaw": ShawRelative(DIM, max_distance=4),
}


@pytest.mark.parametrize("position", POSITIONS)
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), num_kv_heads=st.sampled_from([1, 2, 4]))
def test_streamed_chunks_equal_the_whole(position: str, sizes: list[int], num_kv_heads: int) -> None:
    layer = build(num_kv_heads=num_kv_heads, position=POSITIONS[position])
    check_streaming(layer, sizes)


@pytest.mark.parametrize(
    "op", [FlashAttention(), FlashAttention(backend="tiled", block_size=8), SlidingWindow(5), Performer(DIM)], ids=repr
)
@settings(max_examples=10)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_streamed_chunks_equal_the_whole_with_other_ops(op: nn.Module, sizes: list[int]) -> None:
    check_streaming(build(num_kv_heads=2, op=op, position=RotaryEmbedding(DIM)), sizes)


def check_streaming(layer: SelfAttention, sizes: list[int]) -> None:
    x = draw(sum(sizes))
    state, parts = layer.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        parts.append(y)
    assert state.num_seen == sum(sizes)
    # the same float64 sums in another order; rotary angles are float32 and equal in both
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-12, rtol=0)


def test_one_prefix_continues_in_several_ways() -> None:
    layer, prefix, one, other = build(), draw(9), draw(5, seed=1), draw(5, seed=2)
    with torch.no_grad():
        _, state = layer.stream(prefix, layer.initial_state(2))
        for ending in (one, other, one):
            y, _ = layer.stream(ending, state)
            whole = layer(torch.cat([prefix, ending], 1))[:, 9:]
            torch.testing.assert_close(y, whole, atol=1e-12, rtol=0)  # float64 sums in another order


def test_streamed_gradients_equal_those_of_the_whole() -> None:
    layer, x = build(), draw(20)
    layer(x).square().sum().backward()
    whole = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    state, loss = layer.initial_state(2), torch.zeros((), dtype=torch.float64)
    for chunk in x.split([7, 1, 12], dim=1):
        y, state = layer.stream(chunk, state)
        loss = loss + y.square().sum()
    loss.backward()
    # float64 sums over forty tokens of gradients of order ten
    torch.testing.assert_close([p.grad for p in layer.parameters()], whole, atol=1e-11, rtol=0)


def test_positions_given_are_positions_used() -> None:
    layer, x = build(position=RotaryEmbedding(DIM)), draw(20)
    positions = torch.arange(20) * 3
    assert not torch.allclose(layer(x, positions=positions), layer(x))
    each = layer(x, positions=torch.stack([positions, torch.arange(20)]))
    torch.testing.assert_close(each[0], layer(x, positions=positions)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(each[1], layer(x)[1], atol=1e-12, rtol=0)


def test_the_state_is_the_ops_own_or_a_cache_with_its_lookback() -> None:
    assert build(op=Performer(DIM)).initial_state(2) == Performer(DIM).initial_state(2)
    cache = build(op=SlidingWindow(5)).initial_state(2)
    assert isinstance(cache, KVCache) and cache.lookback == 5
    assert build().initial_state(2).lookback is None


def test_bfloat16() -> None:
    layer, x = build(), draw(64)
    expected = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # a bfloat16 step is 2^-8; three matmuls, weights and outputs below one each add half a step of their size
    torch.testing.assert_close(half.double(), expected, atol=2**-5, rtol=0)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_autocast_streams_through_every_cache(bits: Literal[8, 4] | None) -> None:
    torch.manual_seed(0)
    rounded = None if bits is None else lambda n: QuantizedKVCache.empty(n, bits=bits, group_size=4, num_recent=4)
    layer, x = SelfAttention(32, 4, position=RotaryEmbedding(8), cache=rounded), torch.randn(2, 20, 32)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            state, parts = layer.initial_state(2), []
            for token in x.split(1, dim=1):
                y, state = layer.stream(token, state)
                parts.append(y)
    # bfloat16 rounds to 2^-8, codes to half of a fifteenth of a head's range at worst; outputs are of order one
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), expected, rtol=0, atol=2**-5)


def test_inputs_of_another_dtype_than_the_weights_are_one_clear_error() -> None:
    layer, x = SelfAttention(32, 4), torch.randn(2, 5, 32)
    message = "x must have the dtype of Linear's weights, torch.float32; got torch.bfloat16. Pass x.to"
    with pytest.raises(ArgumentError, match=message):
        layer(x.bfloat16())
    with pytest.raises(ArgumentError, match=message):
        layer.stream(x.bfloat16(), layer.initial_state(2))


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(CombinationError, match=r"Linformer cannot be causal.*is_causal=False"):
        build(op=Linformer(10, 4))
    for op in (Performer(DIM), Linformer(10, 4)):
        with pytest.raises(CombinationError, match=f"ALiBi adds a bias to the scores, which {type(op).__name__}"):
            build(op=op, position=ALiBi(HEADS), is_causal=False)
    with pytest.raises(CombinationError, match=r"SinusoidalEncoding .*not inside attention.*Decoder"):
        build(position=SinusoidalEncoding(WIDTH))
    dynamic = ScaledRotaryEmbedding(DIM, method="dynamic_ntk", factor=4, trained_length=16)
    with pytest.raises(CombinationError, match="depends on the final length"):
        build(position=dynamic).initial_state(2)
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build(is_causal=False).initial_state(2)


@pytest.mark.parametrize(
    ("op", "lookback", "num_sinks", "needed"),
    [
        (FlashAttention(), 8, 0, "FlashAttention can see every key"),
        (SlidingWindow(5), 4, 0, "SlidingWindow can see 5 keys before a query's own and the first 0"),
        (AttentionSinks(5, num_sinks=2), 5, 1, "AttentionSinks can see 5 keys before a query's own and the first 2"),
    ],
)
def test_a_cache_that_forgets_what_the_op_can_see_is_refused(
    op: nn.Module, lookback: int, num_sinks: int, needed: str
) -> None:
    layer = build(op=op, cache=lambda b: KVCache.empty(b, lookback=lookback, num_sinks=num_sinks))
    with pytest.raises(CombinationError, match=rf"{needed}; .* keeps {lookback} and the first {num_sinks}. Make"):
        layer.initial_state(2)


@pytest.mark.parametrize("op", [SlidingWindow(5), AttentionSinks(5, num_sinks=2)], ids=repr)
@pytest.mark.parametrize(("lookback", "num_sinks"), [(5, 2), (5, 3), (9, 2), (None, 0)])
def test_a_cache_that_keeps_what_the_op_can_see_or_more_streams_exactly(
    op: nn.Module, lookback: int | None, num_sinks: int
) -> None:
    layer = build(
        op=op,
        position=RotaryEmbedding(DIM),
        cache=lambda b: KVCache.empty(b, lookback=lookback, num_sinks=num_sinks),
    )
    check_streaming(layer, [3, 1, 20, 1, 1, 7])


def test_a_layer_with_a_window_lets_go_of_a_long_past() -> None:
    layer = build(op=AttentionSinks(32, num_sinks=4))
    with torch.no_grad():
        _, state = layer.stream(draw(5000), layer.initial_state(2))
    assert (len(state), state.num_bytes) == (36, 2 * 2 * 36 * WIDTH * 8)
    assert state._buffer.k.untyped_storage().nbytes() == state.num_bytes / 2


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"embed_dim must be a multiple of num_heads; got 16 and 3"):
        SelfAttention(16, 3)
    with pytest.raises(ArgumentError, match=r"num_heads must be a multiple of num_kv_heads; got 4 and 3"):
        SelfAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ArgumentError, match="num_heads must be a positive whole number; got '4'"):
        SelfAttention(16, "4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": RotaryEmbedding(2 * DIM)}, "RotaryEmbedding is built for head_dim=8, .* here has head_dim=4"),
        ({"position": ShawRelative(2 * DIM, max_distance=4)}, "ShawRelative is built for head_dim=8"),
        ({"position": TransformerXLRelative(2 * WIDTH, HEADS)}, "TransformerXLRelative is built for head_dim=8"),
        ({"position": ALiBi(2 * HEADS)}, "ALiBi is built for num_heads=8, .* here has num_heads=4"),
        ({"position": ALiBi(1)}, "ALiBi is built for num_heads=1"),
        ({"position": T5RelativeBias(1)}, "Build T5RelativeBias for num_heads=4"),
        ({"op": Performer(2 * DIM)}, "Performer is built for head_dim=8"),
        ({"op": Linformer(10, 4, num_heads=2), "is_causal": False}, "Linformer is built for num_heads=2"),
        ({"op": SlidingWindow(5, dilation=(1, 2))}, "SlidingWindow is built for num_heads=2"),
        ({"op": FlashAttention}, r"FlashAttention is a class, not an instance. Pass FlashAttention\("),
        ({"position": RotaryEmbedding}, "RotaryEmbedding is a class, not an instance"),
    ],
)
def test_parts_of_other_sizes_are_refused_when_it_is_built(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CombinationError, match=message):
        build(**arguments)


def test_wrong_inputs_are_named() -> None:
    layer, x = build(), draw(5)
    for key_mask in (torch.ones(2, 4), torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int64), torch.ones(5) > 0):
        with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 5\], True for real tokens; got torch\."):
            layer(x, key_mask=key_mask)
    state = layer.initial_state(2)
    for wrong in (x[0], x[..., :3]):
        with pytest.raises(ArgumentError, match=r"x must be \[B, N, 16\]; got"):
            layer(wrong)
        with pytest.raises(ArgumentError, match=r"x must be \[B, N, 16\]; got"):
            layer.stream(wrong, state)
    with pytest.raises(ArgumentError, match="state must come from initial_state or an earlier stream; got None"):
        layer.stream(x, None)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"op": Performer(DIM)}, {"cache": QuantizedKVCache.empty}],
    ids=["plain", "performer", "quantized"],
)
def test_a_chunk_of_another_batch_is_refused(arguments: dict[str, object]) -> None:
    layer, x = build(**arguments), draw(5)
    with torch.no_grad():
        _, state = layer.stream(x, layer.initial_state(2))
        with pytest.raises(ArgumentError, match="batch size of its state, 2; got 1"):
            layer.stream(x[:1], state)


@pytest.mark.parametrize("batch_size", [-1, "2", 1.5])
def test_wrong_batch_sizes_are_refused(batch_size: object) -> None:
    with pytest.raises(ArgumentError, match="batch_size must (not be negative|be a whole number); got"):
        build().initial_state(batch_size)  # type: ignore[arg-type]
