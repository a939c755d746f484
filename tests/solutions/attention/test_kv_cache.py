"""KVCache: what it holds and lets go of, that holders never see it change, and that gradients pass."""

import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.kv_cache import KVCache

BATCH, GROUPS, DIM = 2, 3, 4


def tokens(length: int, *, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, GROUPS, length, DIM, generator=generator).requires_grad_(requires_grad)


def test_an_empty_cache_holds_nothing() -> None:
    cache = KVCache.empty(BATCH)
    assert (len(cache), cache.num_seen, cache.num_bytes, cache.tensors()) == (0, 0, 0, {})
    assert cache.detach() is cache and cache.trimmed() is cache


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lookback=st.none() | st.integers(1, 12),
    requires_grad=st.booleans(),
)
def test_it_holds_the_last_of_all_that_was_appended(
    sizes: list[int], lookback: int | None, requires_grad: bool
) -> None:
    total = sum(sizes)
    k, v = tokens(total, seed=1, requires_grad=requires_grad), tokens(total, seed=2)
    cache, seen = KVCache.empty(BATCH, lookback=lookback), 0
    for size in sizes:
        new = slice(seen, seen + size)
        cache, seen = cache.append(k[:, :, new], v[:, :, new]).trimmed(), seen + size
        held = seen if lookback is None else min(seen, max(lookback, 0))
        assert (len(cache), cache.num_seen) == (held, seen)
        assert torch.equal(cache.keys, k[:, :, seen - held : seen])
        assert torch.equal(cache.values, v[:, :, seen - held : seen])
        assert cache.positions.tolist() == list(range(seen - held, seen))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6), st.booleans()), min_size=1, max_size=12))
def test_any_tree_of_continuations_stays_as_it_was(steps: list[tuple[int, int, bool]]) -> None:
    """Each step continues one of all caches made so far; afterwards every one still holds its own history."""
    made = [(KVCache.empty(BATCH, lookback=7), tokens(0), tokens(0))]
    for seed, (parent, size, trim) in enumerate(steps):
        cache, k, v = made[parent % len(made)]
        new_k, new_v = tokens(size, seed=2 * seed), tokens(size, seed=2 * seed + 1)
        cache, k, v = cache.append(new_k, new_v), torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        made.append((cache.trimmed() if trim else cache, k, v))
    for cache, k, v in made[1:]:
        assert cache.num_seen == k.shape[2]
        assert torch.equal(cache.keys, k[:, :, k.shape[2] - len(cache) :])
        assert torch.equal(cache.values, v[:, :, v.shape[2] - len(cache) :])


def test_trimming_leaves_what_a_query_can_see_and_costs_nothing_later() -> None:
    cache = KVCache.empty(BATCH, lookback=5).append(tokens(12), tokens(12))
    assert len(cache) == 12
    trimmed = cache.trimmed()
    assert len(trimmed) == 5 and len(cache) == 12 and trimmed.num_seen == 12
    assert trimmed.trimmed() is trimmed


def test_a_lookback_bounds_the_memory_of_a_long_stream() -> None:
    cache, token = KVCache.empty(BATCH, lookback=5), tokens(1)
    for _ in range(200):
        cache = cache.append(token, token).trimmed()
        assert stored_bytes(cache) <= most_bytes(cache)


def stored_bytes(cache: KVCache) -> int:
    assert cache._buffer is not None
    return sum(x.untyped_storage().nbytes() for x in (cache._buffer.k, cache._buffer.v))


def most_bytes(cache: KVCache) -> int:
    """Twice what is held, and room for 16 tokens."""
    return 2 * cache.num_bytes + 2 * 16 * BATCH * GROUPS * DIM * 4


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    lookback=st.none() | st.integers(0, 40),
    num_sinks=st.integers(0, 4),
    requires_grad=st.booleans(),
)
def test_storage_is_at_most_twice_what_is_held_and_a_little(
    sizes: list[int], lookback: int | None, num_sinks: int, requires_grad: bool
) -> None:
    cache, made = KVCache.empty(BATCH, lookback=lookback, num_sinks=num_sinks), []
    for seed, size in enumerate(sizes):
        k = tokens(size, seed=seed, requires_grad=requires_grad)
        cache = cache.append(k, k).trimmed()
        assert stored_bytes(cache) <= most_bytes(cache)
        made.append((cache, cache.keys.detach().clone()))
    assert all(torch.equal(older.keys, keys) for older, keys in made), "an older cache changed"


def test_a_long_chunk_is_let_go_of_by_the_cache_and_by_what_is_pickled() -> None:
    for num_sinks in (0, 4):
        cache = KVCache.empty(BATCH, lookback=32, num_sinks=num_sinks).append(tokens(10_000), tokens(10_000)).trimmed()
        assert stored_bytes(cache) == cache.num_bytes
        # two tensors, each with its storage, and some hundred bytes of names
        assert len(pickle.dumps(cache)) < cache.num_bytes + 2_000


@pytest.mark.parametrize("size", [1, 2, 7, 20, 40, 56, 57, 64, 500])
def test_a_window_copies_a_few_tokens_for_each_that_comes(size: int) -> None:
    """A move copies what was held, letting go copies what is kept: together at most 3 tokens for each new one."""
    cache, copied, chunk, num_chunks = KVCache.empty(BATCH, lookback=40), 0, tokens(size), max(4, 2000 // size)
    for _ in range(num_chunks):
        longer = cache.append(chunk, chunk)
        copied += len(cache) * (longer._buffer is not cache._buffer)
        cache = longer.trimmed()
        copied += len(cache) * (cache._buffer is not longer._buffer)
    assert copied <= 3 * size * num_chunks


def test_appending_a_token_seldom_copies() -> None:
    cache, token, moves = KVCache.empty(BATCH), tokens(1), 0
    for _ in range(256):
        longer = cache.append(token, token)
        moves += len(cache) == 0 or longer.keys.data_ptr() != cache.keys.data_ptr()
        cache = longer
    assert moves <= 9  # at lengths 1, 2, 4, ...: each copy doubles the room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_counts_keys_and_values_without_spare_room(dtype: torch.dtype) -> None:
    cache = KVCache.empty(BATCH)
    for length in (1, 2, 3):
        cache = cache.append(tokens(length).to(dtype), tokens(length).to(dtype))
    assert cache.num_bytes == 2 * BATCH * GROUPS * 6 * DIM * dtype.itemsize
    assert cache.num_bytes == sum(t.numel() * t.element_size() for t in cache.tensors().values())


@pytest.mark.parametrize("trained", ["keys and values", "keys", "values"])
def test_gradients_reach_every_chunk(trained: str) -> None:
    chunks = [
        (tokens(n, seed=n, requires_grad="keys" in trained), tokens(n, seed=9, requires_grad="values" in trained))
        for n in (2, 1, 3)
    ]
    cache, loss = KVCache.empty(BATCH), torch.zeros(())
    for k, v in chunks:
        cache = cache.append(k, v)
        loss = loss + cache.keys.square().sum() + cache.values.square().sum()  # squares save what they are given
    loss.backward()
    for i, chunk in enumerate(chunks):
        for tensor in chunk:
            if tensor.requires_grad:
                # chunk i is seen by the steps i, i + 1, ..., and each adds twice the value; small exact multiples
                torch.testing.assert_close(tensor.grad, 2 * (len(chunks) - i) * tensor.detach())


def test_detach_cuts_the_history_and_keeps_the_tokens() -> None:
    k = tokens(3, requires_grad=True)
    cache = KVCache.empty(BATCH).append(k, k * 2)
    detached = cache.detach()
    assert torch.equal(detached.keys, k) and detached.num_seen == 3
    assert not detached.keys.requires_grad and cache.keys.requires_grad
    longer = detached.append(tokens(2), tokens(2))
    assert len(longer) == 5 and torch.equal(cache.keys, k)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lookback=st.none() | st.integers(1, 12),
    num_sinks=st.integers(0, 3),
    data=st.data(),
)
def test_tokens_of_the_last_append_can_be_taken_back(
    sizes: list[int], lookback: int | None, num_sinks: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    left = data.draw(st.integers(total - sizes[-1], total))
    k, v = tokens(total, seed=1), tokens(total, seed=2)
    sinks = 0 if lookback is None else num_sinks

    def filled(parts: list[int]) -> KVCache:
        cache, seen = KVCache.empty(BATCH, lookback=lookback, num_sinks=sinks), 0
        for size in parts:
            new = slice(seen, seen + size)
            cache, seen = cache.append(k[:, :, new], v[:, :, new]).trimmed(), seen + size
        return cache

    longer = filled(sizes)
    before = longer.keys.clone()
    shorter, expected = longer.truncated(left), filled([left] if left else [])
    assert (len(shorter), shorter.num_seen) == (len(expected), left)
    for cache in (shorter, shorter.append(tokens(2), tokens(2))):
        same = expected if cache is shorter else expected.append(tokens(2), tokens(2))
        if len(cache):
            assert torch.equal(cache.keys, same.keys) and torch.equal(cache.values, same.values)
            assert torch.equal(cache.positions, same.positions)
    assert torch.equal(longer.keys, before), "the longer cache changed"


def test_taking_back_more_than_is_there_is_refused() -> None:
    cache = KVCache.empty(BATCH).append(tokens(3), tokens(3))
    for num_tokens in (-1, 4):
        with pytest.raises(ArgumentError, match=f"num_tokens must be from 0 to the 3 tokens seen; got {num_tokens}"):
            cache.truncated(num_tokens)
    assert len(cache.truncated(0)) == 0
    window = KVCache.empty(BATCH, lookback=5)
    for _ in range(100):
        window = window.append(tokens(1), tokens(1)).trimmed()
    with pytest.raises(ArgumentError, match=r"num_tokens must be at least \d+; got 50.*Keep the earlier cache"):
        window.truncated(50)


def test_a_cache_of_inference_mode_goes_on_without_it() -> None:
    k = tokens(6)
    with torch.inference_mode():
        cache = KVCache.empty(BATCH).append(k[:, :, :2], k[:, :, :2])
        held = cache.append(k[:, :, 2:3], k[:, :, 2:3])
    with torch.no_grad():
        for start in range(3, 6):
            now = k[:, :, start : start + 1]
            cache, held = held, held.append(now, now)
            assert torch.equal(cache.keys, k[:, :, :start])
    assert torch.equal(held.keys, k) and not held.keys.is_inference()


def test_a_last_append_far_longer_than_the_window_cannot_be_taken_back() -> None:
    cache = KVCache.empty(BATCH, lookback=5).append(tokens(3), tokens(3)).trimmed()
    longest = tokens(5 + 16)
    assert cache.append(longest, longest).trimmed().truncated(3).keys.equal(cache.keys)
    longer = cache.append(tokens(100), tokens(100)).trimmed()
    assert longer.truncated(103) == longer
    with pytest.raises(ArgumentError, match=r"num_tokens must be at least 103; got 102.*Keep the earlier cache"):
        longer.truncated(102)


def test_another_batch_is_refused() -> None:
    with pytest.raises(ArgumentError, match="batch size of its state, 3; got 2"):
        KVCache.empty(BATCH + 1).append(tokens(1), tokens(1))


@pytest.mark.parametrize("trained", [False, True])
def test_what_does_not_fit_the_tokens_held_is_refused(trained: bool) -> None:
    good = tokens(2)
    empty = KVCache.empty(BATCH)
    filled = empty.append(tokens(3, requires_grad=trained), tokens(3))
    for cache in (empty, filled, filled.append(good, good)):
        for v in (good[:, :, :1], good[:, :1], good[..., :1], good[:1], good[0]):
            shapes = re.escape(f"got [2, 3, 2, 4] and {list(v.shape)}")
            with pytest.raises(ArgumentError, match=rf"k and v must both be \[B, G, n, D\]; {shapes}"):
                cache.append(good, v)
        with pytest.raises(ArgumentError, match=r"k and v must both be \[B, G, n, D\]; got \[2, 3, 2\]"):
            cache.append(good[..., 0], good[..., 0])
        with pytest.raises(ArgumentError, match=r"v must be \[2, 3, n, 4\] torch.float32 on cpu, .*; got .*float64"):
            cache.append(good, good.double())
    for other in (good[:, :1], good[..., :2], good.double(), good.to("meta")):
        for cache in (filled, filled.append(good, good)):
            with pytest.raises(ArgumentError, match=r"k must be \[2, 3, n, 4\] torch.float32 on cpu, .*; got"):
                cache.append(other, other)
    assert len(filled) == 3


@pytest.mark.parametrize("name", ["batch_size", "lookback", "num_sinks"])
def test_negative_sizes_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must not be negative; got -3"):
        KVCache.empty(**{"batch_size": BATCH, name: -3})
    with pytest.raises(ArgumentError, match=f"{name} must be a whole number; got 1.5"):
        KVCache.empty(**{"batch_size": BATCH, name: 1.5})


def test_an_empty_cache_has_nothing_to_read_until_it_knows_a_shape() -> None:
    cache = KVCache.empty(BATCH)
    for read in ("keys", "values", "positions"):
        with pytest.raises(ArgumentError, match="an empty cache has no keys, values or positions yet.*Append"):
            getattr(cache, read)
    known = cache.append(tokens(0), tokens(0))
    assert known.keys.shape == known.values.shape == (BATCH, GROUPS, 0, DIM) and len(known.positions) == 0
