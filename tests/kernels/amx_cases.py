"""Cases for the AMX kernel, run by test_flash_attention_amx.py in a process of their own.

They need a processor with AMX or `amx_emulation.cpp` in its place, which EMULATED_TILES in the environment says. It
handles signals of the whole process, so never run them beside other tests.
"""

import ctypes
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems import FlashAttention
from transformer_problems.core.errors import KernelBuildError
from transformer_problems.kernels import flash_attention_amx as kernel
from transformer_problems.kernels.flash_attention_amx import flash_attention_amx
from transformer_problems.solutions.attention import fused_kernels

EMULATED = "EMULATED_TILES" in os.environ
UNIT = 2.0**-8  # largest relative error of a number rounded to bfloat16
BEFORE = 2.0**-13  # of all that comes before roundings, and of the exact result's own, far less


def emulated(asked: str) -> int:
    function = getattr(ctypes.CDLL(None), asked)
    function.restype = ctypes.c_int64
    return int(function())


if "BFLOAT16_CONVERSIONS" in os.environ and EMULATED and not emulated("converts_to_bfloat16"):
    pytest.skip("needs a processor that converts to bfloat16", allow_module_level=True)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if EMULATED:
        monkeypatch.setattr(kernel, "processor_has_amx", lambda: True)
    if "BFLOAT16_CONVERSIONS" in os.environ:
        monkeypatch.setattr(kernel, "_FLAGS", (*kernel._FLAGS, "-mavx512bf16"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    if EMULATED:
        assert emulated("threads_with_tiles") == 0  # every thread releases what it configured


def draw(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, *, scale: float = 1.0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim)]
    q, k, v = (torch.randn(shape, generator=draws) for shape in shapes)
    return [(q * scale).bfloat16(), k.bfloat16(), v.bfloat16()]


def visible(q: Tensor, k: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    seen = torch.ones(q.shape[0], 1, queries, keys, dtype=torch.bool)
    if is_causal:
        places = torch.arange(keys - queries, keys)
        seen = seen & (torch.arange(keys) <= places[:, None])
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """By the definition, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    beside_sdpa: bool = True,
) -> Tensor:
    """Within what rounding weights and output once each can cost, and as near on average as PyTorch's kernel."""
    y = flash_attention_amx(q, k, v, key_mask=key_mask, is_causal=is_causal)
    seen = visible(q, k, key_mask, is_causal)
    expected = exact(q, k, v, seen)
    assert y.dtype == torch.bfloat16 and y.shape == q.shape
    error = (y.double() - expected).abs()
    bound = (UNIT + BEFORE) * (expected.abs() + exact(q, k, v.abs(), seen)) + 1e-30
    assert (error <= bound).all(), f"{(error / bound).max():.3f} times the bound"
    assert (y[~seen.any(-1).expand(y.shape[:-1])] == 0).all()
    if beside_sdpa:
        wide_k, wide_v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        some = seen | ~seen.any(-1, keepdim=True)
        theirs = scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=some).double() - expected
        theirs = theirs.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        # both round weights and output; a tenth for which roundings chance made large
        assert error.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt() + 1e-30
    return y


def test_products_are_those_of_tiles() -> None:
    before = emulated("emulated_products") if EMULATED else 0
    check(*draw(1, 1, 1, 100, 300, 64))
    if EMULATED:
        # 4 blocks of 32 queries; 320 keys by 64 terms for the scores, and as many for the output: 16 x 16 x 32 each
        assert emulated("emulated_products") - before == 4 * 2 * (2 * 20 * 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [1, 63, 64, 100, 127])
@pytest.mark.parametrize("keys", [1, 31, 64, 127, 513])
def test_lengths(queries: int, keys: int, is_causal: bool) -> None:
    """Fewer queries than keys and more, around tiles of 16, blocks of 32 queries and of 256 keys."""
    check(*draw(1, 2, 2, queries, keys, 64), is_causal=is_causal, beside_sdpa=queries * keys > 1000)


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 32, 33, 48, 80, 96, 128, 192, 255, 256])
def test_head_dims(dim: int) -> None:
    check(*draw(1, 2, 1, 65, 70, dim), is_causal=True)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_heads(groups: int) -> None:
    check(*draw(2, 6, groups, 40, 50, 32))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [1, 47, 300])
def test_key_masks(queries: int, is_causal: bool) -> None:
    """One sequence sees nothing, one only its last key, one only its first block of keys, one a scattered half."""
    q, k, v = draw(4, 2, 2, queries, 300, 32)
    key_mask = torch.rand(4, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    key_mask[0], key_mask[1], key_mask[2] = False, torch.arange(300) == 299, torch.arange(300) < 9
    y = check(q, k, v, key_mask=key_mask, is_causal=is_causal)
    changed_k, changed_v = (torch.where(key_mask[:, None, :, None], x, 3e38).bfloat16() for x in (k, v))
    assert torch.equal(y, flash_attention_amx(q, changed_k, changed_v, key_mask=key_mask, is_causal=is_causal))
    transposed = key_mask.T.contiguous().T
    assert torch.equal(y, flash_attention_amx(q, k, v, key_mask=transposed, is_causal=is_causal))


def test_what_comes_later_has_no_influence() -> None:
    q, k, v = draw(1, 2, 2, 100, 100, 32)
    y = flash_attention_amx(q, k, v, is_causal=True)
    k[:, :, 50:], v[:, :, 50:] = 1e30, -3e38
    assert torch.equal(y[:, :, :50], flash_attention_amx(q, k, v, is_causal=True)[:, :, :50])


@pytest.mark.parametrize("is_causal", [False, True])
def test_large_scores_are_not_rounded(is_causal: bool) -> None:
    """Standard deviation 40, so that few keys share a query; a score rounded to bfloat16 would be wrong by 0.1."""
    check(*draw(1, 2, 2, 200, 600, 64, scale=40.0), is_causal=is_causal)


def test_two_close_leaders_keep_their_ratio() -> None:
    """Scores 40 and 40 + 1/16, one in each of two blocks of keys: equal in bfloat16, weights 0.484 and 0.516."""
    q, k, v = (torch.zeros(1, 1, n, 64, dtype=torch.bfloat16) for n in (32, 400, 400))
    q[..., 0], q[..., 1] = 64.0, 1.0
    k[..., 10, 0], k[..., 390, 0], k[..., 390, 1] = 5.0, 5.0, 0.5  # divided by sqrt(64)
    v[..., 10, :], v[..., 390, :] = 1.0, -1.0
    ratio = torch.tensor(1 / 16, dtype=torch.float64).exp()
    expected = (1 - ratio) / (1 + ratio)
    assert torch.tensor(40.0625).bfloat16() == 40
    y = check(q, k, v).double()
    # both weights, about a half, are off by a unit of rounding at most; rounded scores would give 0, off by 0.031
    assert ((y - expected).abs() < 2 * UNIT).all()


def test_weights_are_the_exponentials_rounded_to_nearest() -> None:
    """Weights e^-s from a half to 1, read off the output to the last bit: it is their difference from 3/4, small."""
    s = torch.linspace(0, 0.69, 512).bfloat16()
    q, k, v = (torch.zeros(1, 1, n, 16, dtype=torch.bfloat16) for n in (512, 2, 2))
    q[..., 0], k[..., 1, 0] = s, -4.0  # divided by sqrt(16)
    v[..., 0, :], v[..., 1, :] = -0.75, 1.0
    y = flash_attention_amx(q, k, v)[0, 0, :, 0].double()
    weights = (-s.double()).exp()
    ours, step = y * (1 + weights) + 0.75, 2 * UNIT * 0.5
    ours = (ours / step).round() * step
    # float32 errors decide only where the exact weight is as near to the middle between two neighbours
    slack = 2.0**-17
    assert ((ours - weights).abs() <= step / 2 + slack).all()
    assert (ours[1:] - ours[:-1] <= 0).all() and len(ours.unique()) > 100


def test_ties_go_to_even() -> None:
    """The mean of two neighbours lies in the middle between them."""
    q, k, v = (torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    v[..., 0, :8], v[..., 1, :8] = 1.0, 1.0 + 2 * UNIT
    v[..., 0, 8:], v[..., 1, 8:] = 1.0 + 2 * UNIT, 1.0 + 4 * UNIT
    y = flash_attention_amx(q, k, v)
    assert (y[..., :8] == 1.0).all() and (y[..., 8:] == 1.0 + 4 * UNIT).all()


def test_the_largest_score_may_come_last_or_first() -> None:
    for turned in (False, True):
        q, k, v = draw(1, 1, 1, 33, 1100, 32)
        slope = torch.linspace(-60, 60, 1100).flip(0) if turned else torch.linspace(-60, 60, 1100)
        q[..., 0], k[..., 0] = 32**0.5, slope.bfloat16()
        check(q, k, v)


def test_scores_far_apart_weigh_exactly_nothing() -> None:
    q, k, v = (torch.zeros(1, 1, n, 16, dtype=torch.bfloat16) for n in (3, 40, 40))
    q[..., 0], k[..., 0], k[..., 7, 0] = 4.0, -400.0, 400.0
    v[:], v[..., 7, :] = 3e38, 1.0
    assert (flash_attention_amx(q, k, v) == 1).all()


def test_nan_reaches_the_rows_it_belongs_to() -> None:
    q, k, v = draw(1, 1, 1, 40, 300, 32)
    q[..., 5, 3] = float("nan")
    y = flash_attention_amx(q, k, v)
    assert y[..., 5, :].isnan().all() and not y[..., :5, :].isnan().any() and not y[..., 6:, :].isnan().any()
    q, k, v = draw(1, 1, 1, 40, 300, 32)
    v[..., 280, 4] = float("nan")
    y = flash_attention_amx(q, k, v)
    assert y[..., 4].isnan().all() and not y[..., :4].isnan().any()


def test_inputs_of_any_strides() -> None:
    q, k, v = draw(2, 4, 4, 70, 70, 32)
    y = check(q, k, v)
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)  # as a layer's one projection gives them
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    assert not any(x.is_contiguous() for x in views) and torch.equal(y, flash_attention_amx(*views))
    columns = [x.mT.contiguous().mT for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in columns) and torch.equal(y, flash_attention_amx(*columns))
    assert y.transpose(1, 2).is_contiguous()  # heads merge without a copy
    one = k[:, :1].expand_as(k)
    assert torch.equal(flash_attention_amx(q, one, one), flash_attention_amx(q, k[:, :1], k[:, :1]))


def test_threads_do_not_change_the_result() -> None:
    q, k, v = draw(2, 3, 3, 150, 300, 64)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(check(q, k, v, is_causal=True))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_call_from_another_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = draw(1, 2, 2, 64, 64, 32)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(flash_attention_amx, q, k, v) for _ in range(4)]
        assert all(torch.equal(flash_attention_amx(q, k, v), call.result()) for call in calls)


def test_nothing_to_attend_to() -> None:
    q, k, v = draw(2, 2, 2, 5, 3, 16)
    assert (flash_attention_amx(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert flash_attention_amx(q[:, :, :0], k, v).shape == (2, 2, 0, 16)
    assert flash_attention_amx(q[:0], k[:0], v[:0]).shape == (0, 2, 5, 16)


def test_a_lack_of_memory_is_an_error() -> None:
    q, k, _ = draw(1, 1, 1, 16, 1, 64)
    k = k.expand(1, 1, 2**41, 64)  # of which a copy is larger than any address
    with pytest.raises(MemoryError, match="no memory for a copy of k and v"):
        flash_attention_amx(q, k, k)


def test_meters_count_it() -> None:
    q, k, v = draw(1, 4, 2, 33, 70, 16)
    with FlopCounterMode(display=False) as counter:
        flash_attention_amx(q, k, v, is_causal=True)
    assert counter.get_total_flops() == 2 * 2 * 4 * 33 * 70 * 16
    operator = torch.ops.transformer_problems.flash_attention_amx.default
    torch.library.opcheck(operator, (q, k, v, None, True), test_utils=("test_schema", "test_faketensor"))


def test_flash_attention_answers_by_it() -> None:
    op = FlashAttention(backend="amx")
    assert op.runs == "amx" and not op.accepts_bias
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, heads, 40, 16, generator=draws).bfloat16() for heads in (4, 2, 2))
    mask = torch.rand(2, 3, 1, 1, 40, generator=draws) < 0.5
    y = op(q, k, v, mask=mask, is_causal=True)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    expected = flash_attention_amx(*flat, key_mask=mask.flatten(0, 1)[:, 0, 0], is_causal=True)
    assert op.last_run == "amx" and torch.equal(y, expected.view_as(y))
    assert torch.equal(op(q[0, 0], k[0, 0], v[0, 0]), flash_attention_amx(q[0, :1], k[0, :1], v[0, :1])[0])


def test_auto_takes_what_wins_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernels, "_RACED_SCORES", 2 * 2 * 100 * 100)
    monkeypatch.setattr(fused_kernels, "_RACED_LENGTH", 128)
    for winner in ("amx", "sdpa"):
        kinds: list[tuple[object, ...]] = []

        def fastest(kind, prepare, device, winner=winner, kinds=kinds):  # type: ignore[no-untyped-def]
            ways = prepare()
            if "amx" not in ways:  # of training
                return "sdpa"
            kinds.append(kind)
            for way in ways.values():
                way()
            assert list(ways) == ["sdpa", "amx"]
            return winner

        monkeypatch.setattr(fused_kernels, "fastest", fastest)
        op = FlashAttention()
        q, k, v = draw(2, 2, 1, 100, 100, 32)
        mask = torch.ones(2, 1, 1, 100, dtype=torch.bool)
        mask[0] = False
        op(q, k, v, is_causal=True)
        assert op.last_run == winner
        y = op(q, k, v, mask=mask)
        assert op.last_run == winner and (y[0] == 0).all()
        assert len(set(kinds)) == 2
        kinds.clear()
        refused = [
            (q[:, :, 1:], k, v, None),  # too little to matter
            (q.requires_grad_(), k, v, None),
            (q.detach().float(), k.float(), v.float(), None),
            (q.detach(), k, v, torch.ones(100, 100, dtype=torch.bool)),
            (q.detach(), k, v.repeat(1, 1, 1, 2), None),
        ]
        for *inputs, mask in refused:
            op(*inputs, mask=mask)
            assert op.last_run == "sdpa"
        with torch.no_grad():
            op(q, k, v)
        assert op.last_run == winner and len(kinds) == 1


def test_exports_hold_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernels, "_RACED_SCORES", 1)
    monkeypatch.setattr(fused_kernels, "fastest", lambda *args: "amx")
    op, inputs = FlashAttention(), tuple(draw(1, 2, 2, 40, 40, 16))
    called = {str(node.target) for node in torch.export.export(op, inputs).graph.nodes}
    assert op.last_run is None and any("scaled_dot_product_attention" in name for name in called)
    assert not any("amx" in name for name in called)
    op(*inputs)
    assert op.last_run == "amx"


@pytest.mark.skipif(not EMULATED, reason="needs a system that can be told to refuse")
def test_a_system_that_refuses_tiles_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel._library.cache_clear(), kernel.has_amx.cache_clear()
    monkeypatch.setenv("TILES_REFUSED", "1")
    q, k, v = draw(1, 1, 1, 4, 4, 16)
    with pytest.raises(KernelBuildError, match="the system refuses this process the use of AMX tiles: Operation not"):
        flash_attention_amx(q, k, v)
    with pytest.warns(UserWarning, match="attention in bfloat16 uses its slower PyTorch path: the system refuses"):
        assert not kernel.has_amx()
    kernel._library.cache_clear(), kernel.has_amx.cache_clear()
