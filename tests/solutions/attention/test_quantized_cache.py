"""QuantizedKVCache: packing, error bounds from the ranges, byte counts, and attention against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.quantized_cache import (
    Bits,
    QuantizedKVCache,
    RoundedTensor,
    pack_int4,
    unpack_int4,
)
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.testing import check_mixer

BATCH, GROUPS, DIM = 2, 2, 8
EPS = torch.finfo(torch.float64).eps


def tokens(length: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, GROUPS, length, DIM, dtype=dtype, generator=generator)


def filled(k: Tensor, v: Tensor, sizes: list[int], **arguments: int) -> QuantizedKVCache:
    cache = QuantizedKVCache.empty(BATCH, **arguments)  # type: ignore[arg-type]
    for new_k, new_v in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        cache = cache.append(new_k, new_v).trimmed()
    return cache


def test_int4_packing_is_lossless_and_halves_the_bytes() -> None:
    every_pair = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)  # [256, 2]
    packed = pack_int4(every_pair)
    assert packed.shape == (256, 1) and packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), every_pair)
    codes = torch.randint(16, (3, 5, 10), dtype=torch.uint8)
    assert pack_int4(codes).shape == (3, 5, 5) and torch.equal(unpack_int4(pack_int4(codes)), codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [-1, -2])
def test_every_number_is_restored_to_half_a_step(bits: Bits, dim: int) -> None:
    x = tokens(50) * torch.logspace(-3, 3, DIM, dtype=torch.float64)
    x[0, 0, 7] = x[0, 0, 7, 0]  # a slice of one value
    rounded = RoundedTensor.of(x, bits=bits, dim=dim)
    step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
    # half a step, and a few float64 roundings of numbers up to twice the slice's size
    assert ((rounded.restored() - x).abs() <= step / 2 + 16 * EPS * x.abs().amax(dim, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_come_back_as_they_went(dtype: torch.dtype) -> None:
    x = tokens(20, dtype=torch.float32).to(dtype)
    restored = RoundedTensor.of(x, bits=8, dim=-1).restored()
    assert restored.dtype == dtype
    step = (x.float().amax(-1, keepdim=True) - x.float().amin(-1, keepdim=True)) / 255
    # half a step; the step, the lowest and the result are each rounded once to the dtype, of numbers below eight
    assert ((restored.float() - x.float()).abs() <= step / 2 + 3 * torch.finfo(dtype).eps * 8).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("largest", [1.0, 40_000.0, 65_504.0])
def test_ranges_beyond_the_largest_float16_keep_the_stated_error(largest: float, bits: Bits) -> None:
    x = (tokens(40, dtype=torch.float32).clamp(-3, 3) / 3 * largest).half()
    x[..., 0], x[..., 1] = largest, -largest  # the range, 2 * largest, may be more than float16 holds
    restored = RoundedTensor.of(x, bits=bits, dim=-1).restored()
    assert restored.dtype == torch.float16 and bool(restored.isfinite().all())
    step, eps = 2 * largest / (2**bits - 1), torch.finfo(torch.float16).eps
    # half a step; the scale is rounded by eps / 2, in up to 2^bits - 1 steps, and so is the result
    assert ((restored.float() - x.float()).abs() <= step / 2 + eps / 2 * 2 * largest + eps / 2 * largest).all()


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    bits=st.sampled_from([8, 4]),
    group_size=st.integers(1, 5),
    num_recent=st.integers(0, 7),
)
def test_new_tokens_are_exact_and_old_ones_within_half_a_step(
    sizes: list[int], bits: Bits, group_size: int, num_recent: int
) -> None:
    total = sum(sizes)
    k, v = tokens(total, seed=1), tokens(total, seed=2)
    cache = filled(k, v, sizes, bits=bits, group_size=group_size, num_recent=num_recent)
    assert len(cache) == cache.num_seen == total and cache.positions.tolist() == list(range(total))
    old = max(0, total - num_recent) // group_size * group_size
    assert torch.equal(cache.keys[:, :, old:], k[:, :, old:])
    assert torch.equal(cache.values[:, :, old:], v[:, :, old:])
    if old == 0:
        return
    groups = k[:, :, :old].unflatten(2, (-1, group_size))
    key_step = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / (2**bits - 1)
    key_error = (cache.keys[:, :, :old].unflatten(2, (-1, group_size)) - groups).abs()
    past = v[:, :, :old]
    value_step = (past.amax(-1, keepdim=True) - past.amin(-1, keepdim=True)) / (2**bits - 1)
    value_error = (cache.values[:, :, :old] - past).abs()
    for error, step in ((key_error, key_step), (value_error, value_step)):
        assert (error <= step / 2 + 64 * EPS).all()  # and roundings of float64 numbers below eight


def test_a_chunk_is_attended_to_before_it_is_rounded() -> None:
    k, v = tokens(20, seed=1), tokens(20, seed=2)
    cache = QuantizedKVCache.empty(BATCH, bits=4, group_size=4, num_recent=0).append(k, v)
    assert torch.equal(cache.keys, k) and torch.equal(cache.values, v)
    assert not torch.equal(cache.trimmed().keys, k) and torch.equal(cache.keys, k)


def test_one_prefix_continues_in_several_ways() -> None:
    k = tokens(10)
    prefix = filled(k, k, [10], bits=8, group_size=4, num_recent=2)
    before = prefix.keys.clone()
    one, other = (prefix.append(tokens(9, seed=s), tokens(9, seed=s)).trimmed() for s in (1, 2))
    assert torch.equal(prefix.keys, before)
    assert torch.equal(one.keys[:, :, :8], other.keys[:, :, :8]) and len(one) == len(other) == 19


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_counted(bits: Bits) -> None:
    k = tokens(70, dtype=torch.float32)
    cache = filled(k, k, [70], bits=bits, group_size=32, num_recent=6)
    assert cache.num_bytes == sum(x.numel() * x.element_size() for x in cache.tensors().values())
    codes = 2 * 64 * DIM * bits // 8  # keys and values of the 64 rounded tokens
    ranges = 2 * 4 * (64 // 32 * DIM + 64)  # scale and low: a channel of a group for keys, a token for values
    recent = 2 * 6 * DIM * 4
    assert cache.num_bytes == BATCH * GROUPS * (codes + ranges + recent)
    empty = QuantizedKVCache.empty(BATCH)
    assert (len(empty), empty.num_bytes, empty.tensors()) == (0, 0, {}) and empty.trimmed() is empty
    assert cache.detach() is cache


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_attention_stays_within_the_bound_that_the_steps_give(length: int, bits: Bits) -> None:
    """Score errors of at most d change the weights by at most e^(2d) - 1 in sum, values by half their step."""
    k, v, q = tokens(length, seed=1), tokens(length, seed=2), tokens(1, seed=3)
    cache = filled(k, v, [length], bits=bits, group_size=16, num_recent=4)
    exact = (q @ k.mT / DIM**0.5).softmax(-1) @ v
    lossy = (q @ cache.keys.mT / DIM**0.5).softmax(-1) @ cache.values
    old = max(0, length - 4) // 16 * 16
    if old == 0:
        assert torch.equal(lossy, exact)
        return
    groups, past = k[:, :, :old].unflatten(2, (-1, 16)), v[:, :, :old]
    key_step = ((groups.amax(3) - groups.amin(3)) / (2**bits - 1)).amax(2)  # [B, G, D], the widest group
    score_error = (q.abs() @ (key_step / 2)[..., None]) / DIM**0.5  # [B, G, 1, 1]
    value_error = ((past.amax(-1) - past.amin(-1)) / (2**bits - 1) / 2).amax(-1)[..., None, None]
    bound = (2 * score_error).expm1() * v.abs().amax((-2, -1), keepdim=True) + value_error
    # and float64 rounding of a hundred terms below eight
    assert ((lossy - exact).abs() <= bound + 1000 * EPS).all()


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_a_layer_keeps_the_contract_within_the_rounding(bits: Bits, tolerance: float) -> None:
    # half a step of a range of some five standard deviations is 1% (8 bits) or 17% (4 bits) of one; scores, values
    # and the output's projection pass it on about once each, and the largest output is above one deviation
    torch.manual_seed(0)
    layer = SelfAttention(
        16,
        4,
        num_kv_heads=2,
        position=RotaryEmbedding(4),
        cache=lambda batch_size: QuantizedKVCache.empty(batch_size, bits=bits, group_size=8, num_recent=8),
    )
    check_mixer(layer, embed_dim=16, stream_tolerance=tolerance)


def test_keys_and_values_of_different_shapes_are_refused() -> None:
    cache, k = QuantizedKVCache.empty(BATCH), tokens(3)
    for v in (k[:, :, :2], k[:, :1], k[..., :4], k[0], k[:1]):
        with pytest.raises(ArgumentError, match=r"k and v must both be \[B, G, n, D\]; got \[2, 2, 3, 8\] and"):
            cache.append(k, v)
    with pytest.raises(ArgumentError, match=r"k and v must both be \[B, G, n, D\]; got \[2, 2, 3\]"):
        cache.append(k[..., 0], k[..., 0])


@pytest.mark.parametrize("trimmed", [False, True])
def test_what_does_not_continue_the_tokens_held_is_refused(trimmed: bool) -> None:
    cache = QuantizedKVCache.empty(BATCH, group_size=4, num_recent=0).append(tokens(8), tokens(8))
    cache = cache.trimmed() if trimmed else cache
    for other in (tokens(1)[:, :1], tokens(1)[..., :4], tokens(1).float(), tokens(1, dtype=torch.float64).to("meta")):
        with pytest.raises(ArgumentError, match=r"k must be \[2, 2, n, 8\] torch.float64 on cpu, as the cache is; got"):
            cache.append(other, other)
    with pytest.raises(ArgumentError, match=r"v must be .* torch.float64 on cpu, .*; got .*float32"):
        cache.append(tokens(1), tokens(1).float())
    assert len(cache) == 8 and len(cache.append(tokens(1), tokens(1))) == 9


def test_an_empty_cache_has_nothing_to_read_until_it_knows_a_shape() -> None:
    cache = QuantizedKVCache.empty(BATCH)
    for read in ("keys", "values", "positions"):
        with pytest.raises(ArgumentError, match="an empty cache has no keys, values or positions yet.*Append"):
            getattr(cache, read)
    known = cache.append(tokens(0), tokens(0)).trimmed()
    assert known.keys.shape == (BATCH, GROUPS, 0, DIM) and len(known.positions) == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="batch_size must not be negative; got -1"):
        QuantizedKVCache.empty(-1)
    with pytest.raises(ArgumentError, match="bits must be 8 or 4; got 2"):
        QuantizedKVCache.empty(1, bits=2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="group_size must be positive"):
        QuantizedKVCache.empty(1, group_size=0)
    with pytest.raises(ArgumentError, match="num_recent must not be negative; got -1"):
        QuantizedKVCache.empty(1, num_recent=-1)
    with pytest.raises(ArgumentError, match="num_recent must be a whole number; got 1.5"):
        QuantizedKVCache.empty(1, num_recent=1.5)  # type: ignore[arg-type]
    odd = torch.zeros(1, 1, 1, 3)
    with pytest.raises(ArgumentError, match="head_dim must be even for bits=4; got 3"):
        QuantizedKVCache.empty(1, bits=4).append(odd, odd)
    with pytest.raises(ArgumentError, match="must not need gradients"):
        QuantizedKVCache.empty(BATCH).append(tokens(1).requires_grad_(), tokens(1))
    with pytest.raises(CombinationError, match="Performer keeps a state of its own.*cache=None"):
        SelfAttention(16, 4, op=Performer(4), cache=QuantizedKVCache.empty)
