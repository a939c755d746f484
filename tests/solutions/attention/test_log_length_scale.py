"""LogLengthScale against a loop over queries that counts keys one by one, and its streams."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.learned_temperature import LearnedTemperature
from transformer_problems.solutions.attention.log_length_scale import LogLengthScale
from transformer_problems.solutions.attention.packing import PackedAttention, run_packed
from transformer_problems.solutions.attention.paged_cache import PagedKVCache, PagePool
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.testing import check_mixer

OPS = {
    "dense": DenseAttention,
    "flash": FlashAttention,
    "tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "window": lambda: SlidingWindow(12),
    "sinks": lambda: AttentionSinks(7, num_sinks=3),
}


def draw(num_queries: int, num_keys: int, *, num_kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(num_keys)
    shapes = [(2, 4, num_queries, 8), (2, num_kv_heads, num_keys, 8), (2, num_kv_heads, num_keys, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def scale(num_keys: int, trained_len: int) -> float:
    return max(1.0, math.log(max(1, num_keys)) / math.log(trained_len))


def sees(op: str, query: int, key: int, is_causal: bool) -> bool:
    """Whether the query at a place of the sequence may see the key at another."""
    if is_causal and key > query:
        return False
    if op == "window":
        return abs(query - key) <= 12
    return op != "sinks" or abs(query - key) <= 7 or key < 3


def counted(op: str, q: Tensor, k: Tensor, v: Tensor, trained_len: int, *, is_causal: bool) -> Tensor:
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    rows = []
    for row in range(num_queries):
        place = row + num_keys - num_queries
        seen = [key for key in range(num_keys) if sees(op, place, key, is_causal)]
        scores = q[..., row : row + 1, :] @ k[..., seen, :].mT / 8**0.5
        rows.append((scores * scale(len(seen), trained_len)).softmax(-1) @ v[..., seen, :])
    return torch.cat(rows, dim=-2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (63, 63), (64, 64), (1, 100), (37, 101)])
@pytest.mark.parametrize("trained_len", [2, 9])
def test_equals_counting_in_outputs_and_gradients(op: str, num_queries: int, num_keys: int, trained_len: int) -> None:
    q, k, v = draw(num_queries, num_keys)
    expected = counted(op, q, k, v, trained_len, is_causal=True)
    found = LogLengthScale(trained_len, OPS[op]())(q, k, v, is_causal=True)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * cotangent).sum(), (q, k, v)) for y in (found, expected)]
    # float64 sums of up to 101 terms of scores up to 7 times as large as usual
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("op", ["dense", "flash", "tiled"])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_without_causality_every_query_counts_all_keys(op: str, length: int) -> None:
    q, k, v = draw(length, length)
    found = LogLengthScale(9, OPS[op]())(q, k, v)
    torch.testing.assert_close(found, counted(op, q, k, v, 9, is_causal=False), atol=1e-12, rtol=0)


def test_without_causality_a_window_reaches_to_both_sides() -> None:
    q, k, v = draw(40, 40)
    found, expected = LogLengthScale(9, SlidingWindow(12))(q, k, v), counted("window", q, k, v, 9, is_causal=False)
    whole = slice(12, 28)  # whose windows are not cut off
    torch.testing.assert_close(found[..., whole, :], expected[..., whole, :], atol=1e-12, rtol=0)
    everywhere = SlidingWindow(12)(q * scale(25, 9), k, v)
    torch.testing.assert_close(found, everywhere, atol=1e-12, rtol=0)


def test_gradcheck_with_grouped_heads_and_a_mask() -> None:
    q, k, v = draw(5, 5, num_kv_heads=2)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None, None]
    for is_causal in (False, True):
        op = LogLengthScale(2)
        assert torch.autograd.gradcheck(
            lambda *qkv, op=op, causal=is_causal: op(*qkv, mask=mask, is_causal=causal), (q, k, v)
        )


def factors(**options: object) -> Tensor:
    """What the op inside gets for queries of one: the scales themselves, [B, N]."""
    seen: list[Tensor] = []

    def watch(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        seen.append(q)
        return q

    mask = options.pop("mask", None)
    ones = torch.ones(2, 1, options.pop("num_queries", 6), 1, dtype=torch.float64)
    keys = torch.ones(2, 1, 6, 1, dtype=torch.float64)
    LogLengthScale(2, watch)(ones, keys, keys, mask=mask, **options)
    return seen[0][:, 0, :, 0]


def logs(*rows: list[int]) -> Tensor:
    return torch.tensor([[scale(n, 2) for n in row] for row in rows], dtype=torch.float64)


PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, logs([6] * 6, [6] * 6)),
        ({"is_causal": True}, logs([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])),
        ({"is_causal": True, "num_queries": 2}, logs([5, 6], [5, 6])),
        ({"is_causal": True, "num_queries": 8}, logs([0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6])),
        ({"mask": PADDED[:, None, None]}, logs([4] * 6, [3] * 6)),
        ({"mask": PADDED[:, None, None], "is_causal": True}, logs([1, 2, 3, 4, 4, 4], [0, 0, 1, 1, 2, 3])),
        ({"mask": PADDED[:, None, None], "is_causal": True, "num_queries": 2}, logs([4, 4], [2, 3])),
        (
            {"mask": PADDED[:, None, None], "is_causal": True, "num_queries": 8},
            logs([0, 0, 1, 2, 3, 4, 4, 4], [0, 0, 0, 0, 1, 1, 2, 3]),
        ),
        ({"mask": PADDED[0]}, logs([4] * 6, [4] * 6)),
        ({"mask": torch.ones(6, 6).tril().bool()}, logs([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])),
        ({"mask": torch.ones(6, 6).triu(-1).bool(), "is_causal": True}, logs([1] + [2] * 5, [1] + [2] * 5)),
        ({"mask": torch.tensor([1, 0, 1, 1, 1, 1]).bool()[:, None]}, logs([6, 0, 6, 6, 6, 6], [6, 0, 6, 6, 6, 6])),
    ],
)
def test_known_counts(options: dict[str, object], expected: Tensor) -> None:
    """log2 n, at least 1."""
    found = factors(**options)
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-14, rtol=0)


def test_known_scales() -> None:
    op = LogLengthScale(16, lambda q, k, v, **_: q)
    for num_keys, expected in {1: 1.0, 15: 1.0, 16: 1.0, 64: 1.5, 256: 2.0}.items():
        keys = torch.ones(1, 1, num_keys, 1, dtype=torch.float64)
        assert op(torch.ones(1, 1, 1, 1, dtype=torch.float64), keys, keys).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_up_to_the_trained_length_nothing_changes_in_bits(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in draw(50, 50))
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    for is_causal in (False, True):
        found = LogLengthScale(50)(q, k, v, mask=mask, is_causal=is_causal)
        assert torch.equal(found, DenseAttention()(q, k, v, mask=mask, is_causal=is_causal))


def test_many_equal_keys_take_no_more_from_the_wanted_one() -> None:
    """n - 1 keys of score 0 beside one of score 2 log 16: its weight grows with n as n^2 / (n^2 + n - 1)."""
    wanted = {}
    for num_keys in (16, 256, 4096):
        k = torch.zeros(1, 1, num_keys, 1, dtype=torch.float64)
        k[0, 0, 5] = 2 * math.log(16)
        wanted[num_keys] = LogLengthScale(16)(torch.ones(1, 1, 1, 1, dtype=torch.float64), k, k).item() / k.max().item()
    assert wanted == pytest.approx({n: n**2 / (n**2 + n - 1) for n in wanted})


CACHES = {
    "plain": None,
    "paged": lambda batch_size: PagedKVCache.empty(
        batch_size, pool=PagePool(200, page_size=4, num_kv_heads=2, head_dim=4, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cache", CACHES)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=6))
@torch.no_grad()
def test_streamed_equals_whole(op: str, cache: str, sizes: list[int]) -> None:
    """Whatever the cache forgets, a token's scale is that of its place in the text."""
    torch.manual_seed(0)
    position = ALiBi(4) if len(sizes) % 2 else ShawRelative(4, max_distance=3)
    layer = SelfAttention(
        16, 4, num_kv_heads=2, op=LogLengthScale(3, OPS[op]()), position=position, cache=CACHES[cache]
    ).double()
    x = torch.randn(2, sum(sizes), 16, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), atol=1e-12, rtol=0)


def test_a_padded_row_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, op=LogLengthScale(3)).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    for padding in ((0, 0, 7, 0), (0, 0, 0, 7)):  # before and after
        padded = torch.nn.functional.pad(x, padding)
        key_mask = padded[..., 0] != 0
        torch.testing.assert_close(layer(padded, key_mask=key_mask)[key_mask][None], layer(x), atol=1e-12, rtol=0)


def test_inside_packing_each_sequence_has_its_own_length() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, op=PackedAttention(LogLengthScale(3)), is_causal=False).double()
    key_mask = torch.arange(30) < torch.tensor([9, 30])[:, None]
    x = torch.randn(2, 30, 16, dtype=torch.float64) * key_mask[..., None]
    packed, padded = run_packed(layer, x, key_mask=key_mask), layer(x, key_mask=key_mask)
    torch.testing.assert_close(packed[key_mask], padded[key_mask], atol=1e-12, rtol=0)


def test_queries_are_multiplied_wherever_they_are_read() -> None:
    q, k, v = draw(20, 20)
    positions = torch.arange(20)
    factor = torch.tensor([scale(i + 1, 3) for i in range(20)], dtype=torch.float64)[:, None]
    future = torch.ones(20, 20).triu(1).bool()
    content = q @ k.mT / 8**0.5 * factor
    shaw = ShawRelative(8, max_distance=3, dtype=torch.float64)
    whole = {shaw: content + factor * shaw.bias(q, positions, positions), ALiBi(4): content}
    for encoding, scores in whole.items():
        if encoding is not shaw:
            scores = scores + encoding.bias(q, positions, positions)
        bias = PositionBias(encoding, q, positions, positions)
        found = LogLengthScale(3)(q, k, v, bias=bias, is_causal=True)
        expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_with_a_learned_temperature_both_count() -> None:
    q, k, v = draw(64, 64)
    both = LogLengthScale(8, LearnedTemperature(4, initial=0.5, dtype=torch.float64))
    torch.testing.assert_close(both(q, k, v), DenseAttention()(2 * q * scale(64, 8), k, v), atol=1e-12, rtol=0)
    check_mixer(SelfAttention(32, 4, op=both), embed_dim=32)


def test_bad_arguments_are_refused() -> None:
    for trained_len, message in [(1, "2 or more, since log 1 is 0; got 1"), (0, "positive; got 0"), (2.5, "whole")]:
        with pytest.raises(ArgumentError, match=f"trained_len must be .*{message}"):
            LogLengthScale(trained_len)
    q, k, v = draw(3, 3)
    with pytest.raises(ArgumentError, match="mask must be bool, True may attend"):
        LogLengthScale(2)(q, k, v, mask=torch.ones(2, 1, 1, 4, dtype=torch.bool), is_causal=True)


def test_ops_whose_keys_cannot_be_counted_are_refused() -> None:
    with pytest.raises(CombinationError, match="Performer keeps a state of its own, which does not tell"):
        LogLengthScale(16, Performer(8))
    for op in (PackedAttention(), LearnedTemperature(4, PackedAttention())):
        with pytest.raises(CombinationError, match=r"Wrap the other way: PackedAttention\(LogLengthScale"):
            LogLengthScale(16, op)
