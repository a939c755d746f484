"""FlashAttention: both back ends against the formula, and the tiles' memory and arithmetic counted."""

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import (
    ArgumentError,
    CombinationError,
    DeviceError,
    MissingDependencyError,
    UnknownNameError,
)
from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.kernels import flash_attention_amx
from transformer_problems.kernels.race import raced
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.solutions.attention import fused_kernels
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.t5 import T5RelativeBias

HEADS, DIM = 4, 8
BACKENDS: dict[str, Callable[[], FlashAttention]] = {
    "sdpa": lambda: FlashAttention(backend="sdpa"),
    "tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "one tile": lambda: FlashAttention(backend="tiled", block_size=128),
}


@pytest.fixture(params=BACKENDS)
def op(request: pytest.FixtureRequest) -> FlashAttention:
    return BACKENDS[request.param]()


def draw(num_queries: int, num_keys: int, *, groups: int = HEADS, batch: tuple[int, ...] = (2,)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(*batch, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

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


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(op: FlashAttention, length: int, groups: int) -> None:
    q, k, v = draw(length, length, groups=groups)
    check_close(op(q, k, v), naive(q, k, v), (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 64), (7, 50), (50, 50), (101, 101), (50, 7)])
def test_causal_queries_are_the_last_ones(op: FlashAttention, num_queries: int, num_keys: int, masked: bool) -> None:
    q, k, v = draw(num_queries, num_keys)
    row, column = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    allowed = column <= row + num_keys - num_queries
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, num_keys, generator=torch.Generator().manual_seed(2)) < 0.5
        allowed = allowed & mask
    check_close(op(q, k, v, mask=mask, is_causal=True), naive(q, k, v, allowed=allowed), (q, k, v))


@pytest.mark.parametrize("shape", [(2, 1, 1, 40), (2, 4, 40, 40), (1, 1, 40, 1), (40, 40), (40,)])
def test_masks_of_every_shape_and_rows_without_a_key(op: FlashAttention, shape: tuple[int, ...]) -> None:
    q, k, v = draw(40, 40)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    if len(shape) > 1:
        mask[0] = False
    check_close(op(q, k, v, mask=mask), naive(q, k, v, allowed=mask), (q, k, v))


def test_nothing_to_attend_to_gives_zeros(op: FlashAttention) -> None:
    q, k, v = draw(20, 20)
    y = op(q, k, v, mask=torch.zeros(1, 1, 1, 20, dtype=torch.bool))
    assert (y == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize("batch", [(), (3, 2)])
def test_any_leading_dimensions(op: FlashAttention, batch: tuple[int, ...]) -> None:
    q, k, v = draw(20, 20, batch=batch)
    mask = torch.rand(*batch, 1, 1, 20, generator=torch.Generator().manual_seed(4)) < 0.7
    check_close(op(q, k, v, mask=mask), naive(q, k, v, allowed=mask), (q, k, v))


ENCODINGS: dict[str, Callable[[], PositionEncoding]] = {
    "no gradient": lambda: ALiBi(HEADS),
    "parameters": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=30, dtype=torch.float64),
    "parameters and queries": lambda: ShawRelative(DIM, max_distance=5, dtype=torch.float64),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bias_and_everything_it_is_made_of(op: FlashAttention, encoding: str, is_causal: bool) -> None:
    built = ENCODINGS[encoding]()
    q, k, v = draw(40, 50)
    row, column = torch.arange(10, 50), torch.arange(50)
    bias = PositionBias(built, q, row, column)
    allowed = column <= row[:, None] if is_causal else None
    inputs = (q, k, v, *built.parameters())
    ours = op(q, k, v, bias=bias, is_causal=is_causal)
    check_close(ours, naive(q, k, v, allowed=allowed, bias=bias.dense()), inputs)


def test_large_scores_do_not_overflow(op: FlashAttention) -> None:
    q, k, v = (x.detach().float() for x in draw(40, 40))
    y = op(q * 1000, k, v)
    # scores of some thousands, rounded to 2^-12 at worst; rows are all but one-hot, and a near tie moves by the same
    torch.testing.assert_close(y, DenseAttention()(q * 1000, k, v), atol=2**-9, rtol=0)
    assert y.isfinite().all()


def test_bfloat16(op: FlashAttention) -> None:
    q, k, v = (x.detach() for x in draw(64, 64))
    half = op(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    # a bfloat16 step is 2^-8: scores up to 4 are off by 2^-7 or less, then inputs, weights and output by 2^-9 each
    torch.testing.assert_close(half.double(), op(q, k, v), atol=2**-5, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal: bool) -> None:
    op = FlashAttention(backend="tiled", block_size=3)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(1, heads, n, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, n in [(2, 5), (1, 7), (1, 7)]
    )
    mask = torch.tensor([True, True, False, True, True, True, False])
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, mask=mask, is_causal=is_causal), inputs)


def test_gradcheck_of_a_bias() -> None:
    op = FlashAttention(backend="tiled", block_size=2)
    encoding = ShawRelative(3, max_distance=2, dtype=torch.float64)
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)

    def run(q: Tensor, weight: Tensor) -> Tensor:
        return op(q, k, v, bias=PositionBias(encoding, q, positions, positions), is_causal=True)

    assert torch.autograd.gradcheck(run, (q.requires_grad_(), encoding.weight))


def test_self_attention_with_it_equals_dense_self_attention(op: FlashAttention) -> None:
    torch.manual_seed(0)
    position = T5RelativeBias(HEADS, num_buckets=8, max_distance=30)
    flash = SelfAttention(32, HEADS, op=op, position=position).double()
    dense = SelfAttention(32, HEADS, position=position).double()
    dense.load_state_dict(flash.state_dict())
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    flash(x).square().sum().backward()
    flash_grads = [p.grad.clone() for p in flash.parameters()]
    dense.zero_grad()
    position.zero_grad()
    dense(x).square().sum().backward()
    # float64 sums over a hundred tokens of gradients of order ten
    torch.testing.assert_close(flash_grads, [p.grad for p in dense.parameters()], atol=1e-9, rtol=1e-10)


def saved_bytes(op: nn.Module, length: int, **arguments: object) -> int:
    """Bytes that the backward pass holds on to."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.randn(3, 1, HEADS, length, DIM).unbind()
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op(*leaves, **arguments)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_backward_needs_grows_linearly(is_causal: bool) -> None:
    tiled = FlashAttention(backend="tiled", block_size=32)
    # q, k, v and the output of D floats, and one log-sum-exp, for each token and head
    for length in (128, 256, 512):
        assert saved_bytes(tiled, length, is_causal=is_causal) == 4 * HEADS * length * (4 * DIM + 1)
    dense = DenseAttention()
    assert saved_bytes(dense, 512, is_causal=is_causal) > 3 * saved_bytes(dense, 256, is_causal=is_causal)


def test_peak_memory_of_a_training_step_grows_linearly() -> None:
    tiled, position = FlashAttention(backend="tiled", block_size=32), ALiBi(HEADS)

    def peak(op: nn.Module, length: int) -> int:
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, HEADS, length, DIM).unbind())
        places = torch.arange(length)
        bias = PositionBias(position, q.detach(), places, places)
        return peak_memory_bytes(lambda: op(q, k, v, bias=bias, is_causal=True).sum().backward(), device="cpu")

    assert peak(tiled, 512) < 2.1 * peak(tiled, 256)
    assert peak(DenseAttention(), 512) > 3.5 * peak(DenseAttention(), 256)  # the meter sees what grows as N^2


def flops(op: nn.Module, length: int, *, is_causal: bool, backward: bool) -> int:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, HEADS, length, DIM).unbind())
    y = op(q, k, v, is_causal=is_causal)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward() if backward else op(q, k, v, is_causal=is_causal)
    return int(counter.get_total_flops())


def test_arithmetic_stays_quadratic() -> None:
    tiled, dense = FlashAttention(backend="tiled", block_size=32), DenseAttention()
    for length in (64, 128, 256):
        forward = 2 * 2 * HEADS * length**2 * DIM  # two products of N x N x D, two operations each
        assert flops(dense, length, is_causal=False, backward=False) == forward
        assert flops(tiled, length, is_causal=False, backward=False) == forward
        assert flops(dense, length, is_causal=False, backward=True) == 2 * forward
        assert flops(tiled, length, is_causal=False, backward=True) == 2.5 * forward  # the scores once more


def test_causal_tiles_above_the_diagonal_are_skipped() -> None:
    tiled = FlashAttention(backend="tiled", block_size=32)
    tiles = 8
    whole = flops(tiled, 32 * tiles, is_causal=False, backward=False)
    causal = flops(tiled, 32 * tiles, is_causal=True, backward=False)
    assert causal * tiles**2 == whole * tiles * (tiles + 1) / 2
    whole = flops(tiled, 32 * tiles, is_causal=False, backward=True)
    causal = flops(tiled, 32 * tiles, is_causal=True, backward=True)
    assert causal * tiles**2 == whole * tiles * (tiles + 1) / 2


def test_a_frozen_bias_is_asked_tile_by_tile() -> None:
    class Watched(ALiBi):
        def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
            sizes.append(len(q_positions) * len(k_positions))
            return super().bias(q, q_positions, k_positions)

    sizes: list[int] = []
    q, k, v = draw(64, 64)
    places = torch.arange(64)
    FlashAttention(backend="tiled", block_size=16)(q, k, v, bias=PositionBias(Watched(HEADS), q, places, places))
    assert max(sizes) == 16 * 16


def test_which_back_end_runs_is_said() -> None:
    assert FlashAttention().runs == "sdpa"
    assert FlashAttention(backend="tiled").runs == "tiled"
    assert "runs='tiled', block_size=64" in repr(FlashAttention(backend="tiled", block_size=64))
    auto, tiled = FlashAttention(), FlashAttention(backend="tiled")
    assert auto.last_run is None
    q, k, v = (x.detach() for x in draw(3, 3))
    auto(q, k, v), tiled(q, k, v)
    assert (auto.last_run, tiled.last_run) == ("sdpa", "tiled")
    auto(q[..., -1:, :].bfloat16(), k.bfloat16(), v.bfloat16())
    assert auto.last_run == "sdpa in float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("winner", ["sdpa", "sdpa in float32"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("num_keys", [20, 30])
def test_training_in_half_precision_takes_what_won_the_race(
    dtype: torch.dtype, winner: str, with_mask: bool, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[tuple[object, ...]] = []

    def fastest(
        kind: tuple[object, ...], prepare: Callable[[], dict[str, Callable[[], object]]], device: object
    ) -> str:
        kinds.append(kind)
        for way in prepare().values():
            way()  # each can be run
        return winner

    monkeypatch.setattr(fused_kernels, "fastest", fastest)
    op = FlashAttention()
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in draw(20, num_keys))
    mask = None
    if with_mask:
        mask = torch.rand(2, 1, 1, num_keys, generator=torch.Generator().manual_seed(2)) < 0.5
        mask[0] = False  # queries without a key
    y = op(q, k, v, mask=mask, is_causal=True)
    assert op.last_run == winner and kinds == [("attention", "cpu", str(dtype), torch.get_num_threads())]
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected = DenseAttention()(*wide, mask=mask, is_causal=True)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    exact = torch.autograd.grad(expected.sum(), wide)
    for ours, theirs in zip((y, *grads), (expected, *exact), strict=True):
        # each result is rounded once, and in "sdpa" weights and gradients of scores are too
        bound = 4 * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)
    with torch.no_grad():
        op(q, k, v, is_causal=True)
    assert op.last_run == "sdpa" and len(kinds) == 1


def test_triton_is_asked_for_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match=r"triton is not installed.*transformer-problems\[gpu\]"):
        FlashAttention(backend="triton")


def test_triton_refuses_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    op = FlashAttention(backend="triton")
    assert op.runs == "triton" and not op.accepts_bias
    with pytest.raises(CombinationError, match="ALiBi adds a bias to the scores, which FlashAttention never forms"):
        SelfAttention(32, HEADS, op=op, position=ALiBi(HEADS))
    q, k, v = (x.detach() for x in draw(6, 6))
    places = torch.arange(6)
    with pytest.raises(CombinationError, match="bias must be None for backend='triton'; got that of ALiBi. Use"):
        op(q, k, v, bias=PositionBias(ALiBi(HEADS), q, places, places))
    with pytest.raises(ArgumentError, match=r"mask must be a key mask .* FlashAttention\(backend='triton'\)"):
        op(q, k, v, mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="must be float16, bfloat16 or float32, all the same, for Triton; got"):
        op(q, k, v)


def test_amx_is_asked_for_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_amx, "processor_has_amx", lambda: False)
    with pytest.raises(
        DeviceError, match=r"^FlashAttention\(backend='amx'\) needs an x86-64 processor .*amx_bf16; this"
    ):
        FlashAttention(backend="amx")


def test_amx_refuses_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_amx, "processor_has_amx", lambda: True)
    op = FlashAttention(backend="amx")
    assert op.runs == "amx" and not op.accepts_bias
    with pytest.raises(CombinationError, match="ALiBi adds a bias to the scores, which FlashAttention never forms"):
        SelfAttention(32, HEADS, op=op, position=ALiBi(HEADS))
    q, k, v = (x.detach().bfloat16() for x in draw(6, 6))
    places = torch.arange(6)
    with pytest.raises(CombinationError, match="bias must be None for backend='amx'; got that of ALiBi. Use"):
        op(q, k, v, bias=PositionBias(ALiBi(HEADS), q, places, places))
    with pytest.raises(ArgumentError, match=r"mask must be a key mask .* FlashAttention\(backend='amx'\)"):
        op(q, k, v, mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="must be bfloat16 for AMX; got torch.float32"):
        op(q.float(), k.float(), v.float())
    with pytest.raises(ArgumentError, match="must need no gradient for AMX"):
        op(q.requires_grad_(), k, v)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backend 'tile'\. Nearest: tiled"):
        FlashAttention(backend="tile")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="block_size must be positive; got 0"):
        FlashAttention(block_size=0)
    with pytest.raises(ArgumentError, match="block_size must be a positive whole number; got 5.5"):
        FlashAttention(block_size=5.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_single_query_in_half_precision_is_rounded_once(dtype: torch.dtype, with_mask: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (1, 33, 33))
    mask = torch.rand(2, 1, 1, 33) < 0.5 if with_mask else None
    ours = FlashAttention()(q, k, v, mask=mask, is_causal=True)
    exact = DenseAttention()(q.double(), k.double(), v.double(), mask=mask, is_causal=True)
    assert ours.dtype == dtype
    # float32 all the way, then one rounding to `dtype`: half a step of the largest values, about 1
    torch.testing.assert_close(ours.double(), exact, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_mask", [False, True])
def test_auto_on_a_gpu_takes_what_won_the_race(with_mask: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 200, 64, generator=generator, device="cuda").bfloat16().unbind()
    mask = torch.arange(200, device="cuda").expand(2, 1, 1, 200) % 3 > 0 if with_mask else None
    op = FlashAttention()
    y = op(q, k, v, mask=mask, is_causal=True)
    assert op.last_run in ("sdpa", "triton") and any(kind[1] == str(q.device) for kind in raced())
    exact = DenseAttention()(q.double(), k.double(), v.double(), mask=mask, is_causal=True)
    # inputs are exact; weights and the output, up to about 4, are rounded once each
    torch.testing.assert_close(y.double(), exact, atol=4 * torch.finfo(torch.bfloat16).eps, rtol=0)
    op(q, k, v, mask=torch.ones(200, 200, dtype=torch.bool, device="cuda"))
    assert op.last_run == "sdpa"
