"""PagedKVCache: what it holds equals a plain cache, pages are shared, copied and given back, capacity is a rule."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.paged_cache import PagedKVCache, PagePool
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.testing import check_mixer

BATCH, GROUPS, DIM = 2, 2, 4


def make_pool(num_pages: int = 200, page_size: int = 4, **arguments: torch.dtype) -> PagePool:
    return PagePool(num_pages, page_size=page_size, num_kv_heads=GROUPS, head_dim=DIM, **arguments)  # type: ignore[arg-type]


def tokens(length: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, GROUPS, length, DIM, generator=torch.Generator().manual_seed(seed))


def test_an_empty_cache_holds_nothing() -> None:
    cache = PagedKVCache.empty(BATCH, pool=make_pool())
    assert (len(cache), cache.num_seen, cache.num_bytes, cache.tensors()) == (0, 0, 0, {})
    assert cache.trimmed() is cache and cache.detach() is cache


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=10),
    st.integers(1, 5),
)
def test_any_tree_of_continuations_stays_as_it_was(steps: list[tuple[int, int]], page_size: int) -> None:
    """Each step continues one of all caches made so far; afterwards every one still holds its own history."""
    pool = make_pool(num_pages=2000, page_size=page_size)
    made = [(PagedKVCache.empty(BATCH, pool=pool), tokens(0), tokens(0))]
    for seed, (parent, size) in enumerate(steps):
        cache, k, v = made[parent % len(made)]
        new_k, new_v = tokens(size, seed=2 * seed), tokens(size, seed=2 * seed + 1)
        made.append((cache.append(new_k, new_v), torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)))
    for cache, k, v in made[1:]:
        assert len(cache) == cache.num_seen == k.shape[2]
        assert torch.equal(cache.keys, k) and torch.equal(cache.values, v)
        assert cache.positions.tolist() == list(range(k.shape[2]))
    del made, cache
    assert pool.num_free == pool.num_pages


def test_pages_are_taken_one_at_a_time_and_shared_by_continuations() -> None:
    pool = make_pool()
    prefix = PagedKVCache.empty(BATCH, pool=pool).append(tokens(6), tokens(6))
    assert pool.num_pages - pool.num_free == 2 * BATCH  # six tokens in pages of four
    longer = prefix.append(tokens(2), tokens(2))
    assert pool.num_pages - pool.num_free == 2 * BATCH  # there was room
    other = prefix.append(tokens(1), tokens(1))
    assert pool.num_pages - pool.num_free == 3 * BATCH  # the page they part in was copied, the full one was not
    del longer
    assert pool.num_pages - pool.num_free == 3 * BATCH  # the prefix still holds it
    del prefix
    assert pool.num_pages - pool.num_free == 2 * BATCH
    del other
    assert pool.num_free == pool.num_pages


def test_num_bytes_counts_whole_pages() -> None:
    cache = PagedKVCache.empty(BATCH, pool=make_pool()).append(tokens(5), tokens(5))
    assert cache.num_bytes == 2 * BATCH * 2 * GROUPS * 4 * DIM * 4  # k and v, rows, pages, G, page_size, D, float32
    assert cache.num_bytes == sum(t.numel() * t.element_size() for t in cache.tensors().values())
    assert make_pool().num_bytes == 2 * 200 * GROUPS * 4 * DIM * 4


def test_more_than_the_capacity_is_one_clear_error_and_takes_nothing() -> None:
    pool = make_pool(num_pages=5)
    cache = PagedKVCache.empty(BATCH, pool=pool).append(tokens(8), tokens(8))
    message = "page pool must have room for 2 more pages; 1 of its 5 are free. Make num_pages larger"
    with pytest.raises(ArgumentError, match=message):
        cache.append(tokens(1), tokens(1))
    assert pool.num_free == 1 and len(cache) == 8
    del cache
    assert len(PagedKVCache.empty(BATCH, pool=pool).append(tokens(8), tokens(8))) == 8


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_a_grouped_layer_streams_as_the_formula_says(length: int, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    pool = PagePool(256, page_size=5, num_kv_heads=num_kv_heads, head_dim=4, dtype=torch.float64)
    layer = SelfAttention(
        16,
        4,
        num_kv_heads=num_kv_heads,
        cache=lambda batch_size: PagedKVCache.empty(batch_size, pool=pool),
        dtype=torch.float64,
    )
    x, heads = torch.randn(2, length, 16, dtype=torch.float64), []
    for h in range(4):
        own, shared = slice(4 * h, 4 * h + 4), slice(h * num_kv_heads // 4 * 4, h * num_kv_heads // 4 * 4 + 4)
        q, k, v = x @ layer.q_proj.weight[own].T, x @ layer.k_proj.weight[shared].T, x @ layer.v_proj.weight[shared].T
        weights = (q @ k.mT / 2).exp().tril()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    expected = torch.cat(heads, -1) @ layer.out_proj.weight.T
    state, parts = layer.initial_state(2), []
    with torch.no_grad():
        for chunk in x.split(7, dim=1):
            y, state = layer.stream(chunk, state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=0)  # float64 sums of a hundred terms


@pytest.mark.parametrize("op", [None, SlidingWindow(5)], ids=["full", "window"])
def test_a_layer_keeps_the_contract(op: SlidingWindow | None) -> None:
    pool = PagePool(1000, page_size=8, num_kv_heads=2, head_dim=4, dtype=torch.float64)
    layer = SelfAttention(16, 4, num_kv_heads=2, op=op, cache=lambda b: PagedKVCache.empty(b, pool=pool))
    check_mixer(layer, embed_dim=16)
    assert pool.num_free == pool.num_pages


def test_what_does_not_fit_the_pool_is_refused() -> None:
    cache = PagedKVCache.empty(BATCH, pool=make_pool())
    good = tokens(3)
    narrow, grouped, flat = good[..., : DIM - 1], good[:, :1], good[..., 0]
    for k, v in [(flat, flat), *((good, x) for x in (narrow, grouped, flat, good[:1], good[:, :, :2]))]:
        shapes = re.escape(f"{list(k.shape)} and {list(v.shape)}")
        with pytest.raises(ArgumentError, match=rf"k and v must both be \[B, G, n, D\]; got {shapes}"):
            cache.append(k, v)
    for other in (narrow, grouped):
        shape = re.escape(str(list(other.shape)))
        with pytest.raises(ArgumentError, match=rf"k must be \[2, 2, n, 4\] torch.float32 on cpu, .*; got {shape}"):
            cache.append(other, other)
    with pytest.raises(ArgumentError, match="batch size of its state, 2; got 1"):
        cache.append(good[:1], good[:1])
    for other, got in ((good.double(), "torch.float64 on cpu"), (good.to("meta"), "torch.float32 on meta")):
        for name, k, v in (("k", other, other), ("v", good, other)):
            message = rf"{name} must be \[2, 2, n, 4\] torch.float32 on cpu, .*; got \[2, 2, 3, 4\] {got}"
            with pytest.raises(ArgumentError, match=message):
                cache.append(k, v)
    assert cache.pool.num_free == cache.pool.num_pages
    with pytest.raises(ArgumentError, match="must not need gradients"):
        cache.append(tokens(1).requires_grad_(), tokens(1))
    with pytest.raises(ArgumentError, match="page_size must be positive; got 0"):
        make_pool(page_size=0)
    with pytest.raises(ArgumentError, match="batch_size must not be negative; got -1"):
        PagedKVCache.empty(-1, pool=make_pool())


def test_a_cache_without_tokens_shows_none() -> None:
    empty = PagedKVCache.empty(BATCH, pool=make_pool())
    for cache in (empty, empty.append(tokens(0), tokens(0))):
        assert cache.keys.shape == cache.values.shape == (BATCH, GROUPS, 0, DIM)
        assert len(cache) == len(cache.positions) == 0 and cache.pool.num_free == cache.pool.num_pages
        assert torch.equal(cache.append(tokens(3), tokens(3)).keys, tokens(3))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_the_pages_and_gives_them_back_with_the_last_holder(copied: Callable) -> None:
    pool = make_pool()
    cache = PagedKVCache.empty(BATCH, pool=pool).append(tokens(6), tokens(6))
    other = copied([cache])[0]
    taken = pool.num_pages - pool.num_free
    assert other.pool is pool and torch.equal(other.keys, tokens(6)) and taken == 2 * BATCH
    longer, another = other.append(tokens(1), tokens(1)), cache.append(tokens(1, seed=1), tokens(1, seed=1))
    assert torch.equal(longer.keys[:, :, 6:], tokens(1)) and torch.equal(another.keys[:, :, 6:], tokens(1, seed=1))
    del cache, longer, another
    assert torch.equal(other.keys, tokens(6))
    del other
    assert pool.num_free == pool.num_pages


def test_a_copied_pool_is_another_one_and_all_free() -> None:
    pool = make_pool(num_pages=7, dtype=torch.float64)
    cache = PagedKVCache.empty(BATCH, pool=pool).append(tokens(6).double(), tokens(6).double())
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert (other.num_free, other.page_size) == (7, 4)
        assert other.keys.shape == pool.keys.shape and other.keys.dtype == torch.float64
        PagedKVCache.empty(BATCH, pool=other).append(tokens(1).double(), tokens(1).double())
    assert torch.equal(cache.keys, tokens(6).double())


def test_a_cache_cannot_be_pickled_away_from_its_pool() -> None:
    cache = PagedKVCache.empty(BATCH, pool=make_pool()).append(tokens(6), tokens(6))
    with pytest.raises(ArgumentError, match=r"a PagedKVCache cannot be pickled.*append its keys and values"):
        pickle.dumps(cache)
