"""KVCache: what it holds, that holders never see it change, and that gradients pass."""

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
    storages = set()
    for _ in range(200):
        cache = cache.append(token, token).trimmed()
        storages.add(cache.keys.untyped_storage().nbytes())
    assert max(storages) <= 2 * 6 * BATCH * GROUPS * DIM * 4  # twice the lookback and the new token


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


def test_another_batch_is_refused() -> None:
    with pytest.raises(ArgumentError, match="batch size of its state, 3; got 2"):
        KVCache.empty(BATCH + 1).append(tokens(1), tokens(1))
    with pytest.raises(ArgumentError, match="batch_size must not be negative; got -1"):
        KVCache.empty(-1)
