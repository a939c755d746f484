"""What attention ops refuse in common, and what each of them gives without queries."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import AttentionOp, PositionBias
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.entmax import EntmaxAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.packing import PackedAttention
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.attention.sparse import SparseAttention
from transformer_problems.solutions.attention.topk import TopKAttention
from transformer_problems.solutions.attention.watched import WatchedAttention
from transformer_problems.solutions.position.alibi import ALiBi

HEADS, DIM = 4, 8
OPS: dict[str, Callable[[], AttentionOp]] = {
    "dense": DenseAttention,
    "entmax": EntmaxAttention,
    "flash_sdpa": lambda: FlashAttention(backend="sdpa"),
    "flash_tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "linformer": lambda: Linformer(64, 8, dtype=torch.float64),
    "memory_efficient": lambda: MemoryEfficientAttention(8, 16),
    "packed": PackedAttention,
    "performer": lambda: Performer(DIM),
    "sinks": lambda: AttentionSinks(5, num_sinks=2),
    "sparse_fixed": lambda: SparseAttention(8, pattern="fixed"),
    "sparse_strided": lambda: SparseAttention(8),
    "top_k": lambda: TopKAttention(4, block_size=16),
    "watched": lambda: WatchedAttention(block_size=16),
    "window": lambda: SlidingWindow(5),
    "window_dilated_by_head": lambda: SlidingWindow(5, dilation=(1, 1, 2, 3)),
}
every_op = pytest.mark.parametrize("name", OPS)


def draw(
    num_queries: int, num_keys: int, *, lead: tuple[int, ...] = (2,), groups: int = HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(*lead, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    return heads(HEADS, num_queries), heads(groups, num_keys), heads(groups, num_keys)


@every_op
@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@pytest.mark.parametrize("num_keys", [1, 40])
def test_no_queries_give_an_empty_output_and_zero_gradients(num_keys: int, lead: tuple[int, ...], name: str) -> None:
    op, inputs = OPS[name](), draw(0, num_keys, lead=lead, groups=2)
    bias = PositionBias(ALiBi(HEADS).double(), inputs[0], torch.arange(0), torch.arange(num_keys))
    for is_causal in [False] + [True] * getattr(op, "accepts_causal", True):
        for asked in [None] + [bias] * getattr(op, "accepts_bias", True):
            y = op(*inputs, bias=asked, is_causal=is_causal)
            assert y.shape == (*lead, HEADS, 0, DIM) and y.dtype == torch.float64
            assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(y.sum(), inputs))


@every_op
@pytest.mark.parametrize("length", [19, 21, 40])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_every_key_has_one_value(num_queries: int, length: int, name: str) -> None:
    (q, k, _), (_, _, v) = draw(num_queries, 20), draw(20, length)
    with pytest.raises(ArgumentError, match=f"v must have one value for each of the 20 keys; got {length}"):
        OPS[name]()(q, k, v)


@every_op
def test_queries_and_keys_are_equally_wide(name: str) -> None:
    q, k, v = draw(20, 20)
    message = "q and k must have the same last dimension, D; got 8 and 6, in [2, 4, 20, 8] and [2, 4, 20, 6]."
    with pytest.raises(ArgumentError, match=re.escape(message)):
        OPS[name]()(q, k[..., :6], v)


@every_op
def test_values_may_be_wider_than_keys(name: str) -> None:
    op, (q, k, v) = OPS[name](), draw(20, 20)
    wide = op(q, k, torch.cat([v, 2 * v], dim=-1))
    narrow = op(q, k, v)
    # float64 sums of twenty terms of order one
    torch.testing.assert_close(wide, torch.cat([narrow, 2 * narrow], dim=-1), atol=1e-12, rtol=0)


@every_op
@pytest.mark.parametrize(
    "shape",
    [(19,), (21,), (20, 19), (1, 21), (21, 20), (3, 20, 20), (2, 1, 1, 19), (2, 1, 1, 21), (3, 1, 1, 20), (1,) * 5],
)
def test_masks_that_do_not_fit_the_scores_are_refused(shape: tuple[int, ...], name: str) -> None:
    message = (
        f"mask must be bool, True may attend, and broadcastable to the scores [2, 4, 20, 20]; got torch.bool {[*shape]}"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        OPS[name]()(*draw(20, 20), mask=torch.ones(shape, dtype=torch.bool))


@every_op
def test_masks_of_numbers_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="mask must be bool.*; got torch.float32"):
        OPS[name]()(*draw(20, 20), mask=torch.ones(2, 1, 1, 20))


def test_streaming_ops_refuse_the_same() -> None:
    op, (q, k, v) = Performer(DIM), draw(20, 20)
    state = op.initial_state(2)
    with pytest.raises(ArgumentError, match="v must have one value for each of the 20 keys; got 19"):
        op.stream(q, k, v[..., 1:, :], state)
    with pytest.raises(ArgumentError, match="q and k must have the same last dimension, D; got 8 and 6"):
        op.stream(q, k[..., :6], v, state)


def test_packed_sequences_have_one_value_for_every_key() -> None:
    op, (q, k, _), (_, _, v) = PackedAttention(), draw(5, 5, lead=(1,)), draw(6, 6, lead=(1,))
    with op.packed(torch.tensor([2, 3])), pytest.raises(ArgumentError, match="each of the 5 keys; got 6"):
        op(q, k, v)


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_no_keys_or_no_sequences_are_no_error_for_flash_attention(backend: str) -> None:
    op = FlashAttention(backend=backend)  # type: ignore[arg-type]
    assert torch.equal(op(*draw(3, 0)), torch.zeros(2, HEADS, 3, DIM, dtype=torch.float64))
    assert op(*draw(3, 3, lead=(0,)), is_causal=True).shape == (0, HEADS, 3, DIM)


@every_op
def test_what_are_no_heads_are_refused(name: str) -> None:
    q, k, v = draw(3, 5)
    for given, message in (
        (
            (q[0, 0], k[0, 0], v[0, 0]),
            r"q must be floats \[..., H, N, D\]; got torch.float64 \[3, 8\]. Give one head as q",
        ),
        ((q.long(), k.long(), v.long()), r"q must be floats \[..., H, N, D\]; got torch.int64"),
        (([1.0], k, v), r"q must be floats \[..., H, N, D\]; got \[1.0\]"),
        ((q[..., :0], k[..., :0], v), "q and k must have a last dimension, D, of one at least; got 0"),
        (
            (q, torch.cat([k, k]), torch.cat([v, v])),
            r"q and k must be of the same sequences; got \[2, 4, 3, 8\] and \[4,",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            OPS[name]()(*given)


@pytest.mark.parametrize("name", ["dense", "flash_sdpa", "flash_tiled", "memory_efficient"])
def test_no_keys_give_zeros_and_zero_gradients(name: str) -> None:
    inputs = draw(3, 0)
    y = OPS[name]()(*inputs)
    assert y.shape == (2, HEADS, 3, DIM) and not y.any()
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(y.sum(), inputs))


@every_op
def test_several_dtypes_are_one_clear_error(name: str) -> None:
    op, (q, k, v) = OPS[name](), (x.detach().float() for x in draw(20, 20))
    for given in ((q.bfloat16(), k, v), (q, k.bfloat16(), v.bfloat16()), (q, k, v.double()), (q.double(), k, v)):
        q_dtype, k_dtype, v_dtype = (x.dtype for x in given)
        message = f"q, k and v must have one dtype; got {q_dtype}, {k_dtype} and {v_dtype}. Convert them, as in k.to"
        with pytest.raises(ArgumentError, match=re.escape(message)):
            op(*given)


@every_op
def test_autocast_makes_half_and_single_precision_alike_and_no_double(name: str) -> None:
    op, (q, k, v) = OPS[name](), (x.detach().float() for x in draw(20, 20))
    if name == "top_k":
        op = TopKAttention(20)  # rounding may turn which four keys are the best
    expected = op(*(x.double() for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        for given in ((q, k, v.bfloat16()), (q.bfloat16(), k, v), (q, k.bfloat16(), v.bfloat16())):
            # bfloat16 keeps 8 bits, and several roundings add up where the largest value is of order one
            torch.testing.assert_close(op(*given).double(), expected, rtol=0, atol=2**-4)
        with pytest.raises(ArgumentError, match="q, k and v must have one dtype; got torch.float32, torch.float64 and"):
            op(q, k.double(), v)


@every_op
def test_several_devices_are_one_clear_error(name: str) -> None:
    op, (q, k, v) = OPS[name](), draw(20, 20)
    for given, found in (
        ((q.to("meta"), k, v), "meta, cpu and cpu"),
        ((q, k.to("meta"), v), "cpu, meta and cpu"),
        ((q, k, v.to("meta")), "cpu, cpu and meta"),
    ):
        with pytest.raises(
            ArgumentError, match=f"q, k and v must be on one device; got {found}. Move them, as in k.to"
        ):
            op(*given)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool, device="meta")
    with pytest.raises(ArgumentError, match=r"mask must be on cpu, as q; got meta. Pass mask.to\(q.device\)"):
        op(q, k, v, mask=mask)


@every_op
def test_what_is_no_mask_no_bias_or_too_narrow_is_refused(name: str) -> None:
    op, (q, k, v) = OPS[name](), draw(20, 20)
    with pytest.raises(ArgumentError, match=r"mask must be bool, .*scores \[2, 4, 20, 20\]; got \[\[True"):
        op(q, k, v, mask=[[True] * 2])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"bias must be a PositionBias, .*; got torch.float64 \[4, 20, 20\]"):
        op(q, k, v, bias=torch.zeros(4, 20, 20, dtype=torch.float64))  # type: ignore[arg-type]
    narrow = (x.detach().to(torch.float8_e4m3fn) for x in (q, k, v))
    with pytest.raises(ArgumentError, match="must be of 16 bits a number or more; got torch.float8_e4m3fn. Make them"):
        op(*narrow)


@every_op
@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 0), (0, 0), (40, 7), (40, 33)])
@pytest.mark.parametrize("groups", [2, 4])
def test_more_queries_than_keys_are_refused_or_the_first_see_nothing(
    groups: int, num_queries: int, num_keys: int, name: str
) -> None:
    op, inputs = OPS[name](), draw(num_queries, num_keys, groups=groups)
    for is_causal in [False] + [True] * getattr(op, "accepts_causal", True):
        try:
            y = op(*inputs, is_causal=is_causal)
        except ArgumentError as error:
            assert f"the number of queries must not exceed the number of keys; got {num_queries} and" in str(error)
            continue
        assert y.shape == (2, HEADS, num_queries, DIM)
        hidden = num_queries - num_keys if is_causal or not num_keys else 0
        assert not y[..., :hidden, :].any() and (y[..., hidden:, :] != 0).all()
        grads = torch.autograd.grad(y.sum(), inputs)
        assert not grads[0][..., :hidden, :].any() and all(bool(grad.isfinite().all()) for grad in grads)


@every_op
def test_no_sequences_give_an_empty_output(name: str) -> None:
    op, inputs = OPS[name](), draw(3, 5, lead=(0,), groups=2)
    for is_causal in [False] + [True] * getattr(op, "accepts_causal", True):
        y = op(*inputs, is_causal=is_causal)
        assert y.shape == (0, HEADS, 3, DIM)
        assert all(grad.shape == x.shape for grad, x in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True))


@every_op
def test_inputs_with_gaps_or_repeats_in_memory_give_what_copies_give(name: str) -> None:
    op, inputs = OPS[name](), [x.detach() for x in draw(40, 40)]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda x: x.mT.contiguous().mT,
        "every other": lambda x: torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
        "one sequence and head for all": lambda x: x[:1, :1].expand(2, HEADS, 40, DIM),
        "one token for all": lambda x: x[..., :1, :].expand(2, HEADS, 40, DIM),
        "one channel for all": lambda x: x[..., :1].expand(2, HEADS, 40, DIM),
    }
    for way in ways.values():
        given = [way(x) for x in inputs]
        # float64 sums of forty terms of order one, perhaps in another order
        torch.testing.assert_close(op(*given), op(*(x.contiguous() for x in given)), atol=1e-12, rtol=0)
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool).expand(2, 1, 1, 40)
    torch.testing.assert_close(op(*inputs, mask=mask), op(*inputs), atol=1e-12, rtol=0)
