"""MemoryEfficientAttention against the formula, and what it saves, skips and computes, counted."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.testing import check_attention_op, check_mixer

HEADS, DIM = 4, 8
CHUNKS = [(16, 16), (8, 40), (40, 8), (1, 7), (128, 512)]


def draw(num_queries: int, num_keys: int, *, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(2, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    return heads(HEADS, num_queries), heads(groups, num_keys), heads(groups, num_keys)


def naive(q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // x.shape[-3], dim=-3) for x in (k, v))
    weights = (q @ k.mT / DIM**0.5 + (0.0 if bias is None else bias)).exp()
    if allowed is not None:
        weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total) @ v


def check_close(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    # float64 sums of about a hundred terms of order one
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(ours_grads, expected_grads, atol=1e-11, rtol=0)


def causal(num_queries: int, num_keys: int) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(length: int, groups: int, chunks: tuple[int, int]) -> None:
    op, inputs = MemoryEfficientAttention(*chunks), draw(length, length, groups=groups)
    check_close(op(*inputs), naive(*inputs), inputs)
    check_close(op(*inputs, is_causal=True), naive(*inputs, allowed=causal(length, length)), inputs)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_the_queries_may_be_the_last_of_the_tokens(chunks: tuple[int, int]) -> None:
    op, inputs = MemoryEfficientAttention(*chunks), draw(30, 73)
    check_close(op(*inputs, is_causal=True), naive(*inputs, allowed=causal(30, 73)), inputs)
    check_close(op(*inputs), naive(*inputs), inputs)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 50), (2, 4, 50, 50), (50, 50), (4, 50, 1), (50,)])
def test_masks_of_any_shape_and_empty_rows(shape: tuple[int, ...], chunks: tuple[int, int]) -> None:
    op, inputs = MemoryEfficientAttention(*chunks), draw(50, 50)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
    check_close(op(*inputs, mask=mask), naive(*inputs, allowed=mask), inputs)
    y = op(*inputs, mask=mask, is_causal=True)
    check_close(y, naive(*inputs, allowed=mask & causal(50, 50)), inputs)
    nothing = op(*inputs, mask=torch.zeros_like(mask))
    assert (nothing == 0).all()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    "encoding", [ALiBi(HEADS), T5RelativeBias(HEADS, num_buckets=8, max_distance=20), ShawRelative(DIM, max_distance=7)]
)
def test_biases_also_trained_ones(encoding: PositionEncoding, chunks: tuple[int, int]) -> None:
    op, (q, k, v), encoding = MemoryEfficientAttention(*chunks), draw(50, 50), encoding.double()
    places = torch.arange(50)
    bias = PositionBias(encoding, q, places, places)
    inputs = (q, k, v, *encoding.parameters())
    check_close(op(q, k, v, bias=bias), naive(q, k, v, bias=bias.dense()), inputs)
    ours = op(q, k, v, bias=bias, is_causal=True)
    check_close(ours, naive(q, k, v, bias=bias.dense(), allowed=causal(50, 50)), inputs)


@pytest.mark.parametrize("chunks", [(16, 16), (8, 40)])
def test_keeps_the_contracts(chunks: tuple[int, int]) -> None:
    check_attention_op(MemoryEfficientAttention(*chunks))
    check_mixer(SelfAttention(32, HEADS, op=MemoryEfficientAttention(*chunks)), embed_dim=32)


def test_scores_too_large_for_exp_are_safe() -> None:
    q, k, v = (x.detach() * 100 for x in draw(40, 40))
    expected = (q @ k.mT / DIM**0.5).softmax(-1) @ v
    torch.testing.assert_close(MemoryEfficientAttention(8, 8)(q, k, v), expected, atol=1e-10, rtol=0)


def test_a_trained_bias_is_never_whole() -> None:
    class Watched(T5RelativeBias):
        def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
            sizes.append(len(q_positions) * len(k_positions))
            return super().bias(q, q_positions, k_positions)

    sizes: list[int] = []
    (q, k, v), places = draw(64, 64), torch.arange(64)
    bias = PositionBias(Watched(HEADS).double(), q, places, places)
    MemoryEfficientAttention(16, 8)(q, k, v, bias=bias).sum().backward()
    assert max(sizes) == 16 * 8


def held_bytes(length: int, chunks: tuple[int, int]) -> int:
    """Bytes saved for the backward pass outside the inputs."""
    inputs, total = draw(length, length), 0
    own = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += 0 if tensor.untyped_storage().data_ptr() in own else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        MemoryEfficientAttention(*chunks)(*inputs, is_causal=True)
    return total


def test_nothing_is_saved_but_the_inputs() -> None:
    assert held_bytes(64, (8, 16)) == held_bytes(256, (8, 16)) == 0


def test_peak_memory_is_linear() -> None:
    def peak(length: int) -> int:
        inputs = draw(length, length)

        def step() -> None:
            grads = torch.autograd.grad(MemoryEfficientAttention(16, 32)(*inputs, is_causal=True).sum(), inputs)
            del grads

        return peak_memory_bytes(step, device="cpu")

    assert peak(512) < 2.2 * peak(256)
    assert peak(512) < 2 * HEADS * 512 * 512 * 8 / 2, "below half of one score matrix of each head and row of the batch"


def test_an_outer_checkpoint_lets_go_of_queries_keys_and_values() -> None:
    op, x, made = MemoryEfficientAttention(8, 16), draw(40, 40)[0], []

    def layer(x: Tensor) -> Tensor:
        heads = x * 2, x * 3, x * 4
        made.extend(weakref.ref(part) for part in heads)
        return op(*heads, is_causal=True)

    y = checkpoint(layer, x, use_reentrant=False)
    assert [part() for part in made] == [None] * 3
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, expected)


def flops(length: int, *, is_causal: bool, backward: bool) -> int:
    inputs = draw(length, length)
    with FlopCounterMode(display=False) as counter:
        y = MemoryEfficientAttention(16, 16)(*inputs, is_causal=is_causal)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def test_chunks_above_the_diagonal_are_left_out() -> None:
    for backward in (False, True):
        whole = flops(128, is_causal=False, backward=backward)
        half = flops(128, is_causal=True, backward=backward)
        assert half * 8**2 == whole * 8 * 9 / 2


def test_training_computes_scores_three_times() -> None:
    forward = flops(128, is_causal=False, backward=False)
    assert forward == 2 * 2 * 2 * HEADS * 128 * 128 * DIM
    extra = flops(128, is_causal=False, backward=True) - 3 * forward  # forward, and twice as much backward
    assert forward < extra <= 2 * forward  # recomputing may leave out products that no gradient needs


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_keys", [7, 40])
def test_no_queries_are_an_empty_output(num_keys: int, is_causal: bool) -> None:
    op, inputs = MemoryEfficientAttention(8, 16), draw(0, num_keys, groups=2)
    bias = PositionBias(ALiBi(HEADS).double(), inputs[0], torch.arange(0), torch.arange(num_keys))
    for arguments in ({}, {"bias": bias}, {"mask": torch.ones(2, 1, 1, num_keys, dtype=torch.bool)}):
        y = op(*inputs, is_causal=is_causal, **arguments)
        assert y.shape == (2, HEADS, 0, DIM) and y.dtype == torch.float64
        assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(y.sum(), inputs))
    layer = SelfAttention(32, HEADS, op=op)
    assert layer(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


def test_wrong_arguments_are_refused() -> None:
    for arguments in ({"query_chunk": 0}, {"key_chunk": 0}):
        with pytest.raises(ArgumentError, match="chunk must be positive; got 0"):
            MemoryEfficientAttention(**arguments)
    with pytest.raises(ArgumentError, match="key_chunk must be a positive whole number; got 8.5"):
        MemoryEfficientAttention(4, 8.5)  # type: ignore[arg-type]
    assert repr(MemoryEfficientAttention(4, 8)) == "MemoryEfficientAttention(query_chunk=4, key_chunk=8)"
