"""Fused attention is the textbook's, forward and backward, on both back ends, and is one operator to the meters."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.kernels import fused_attention as kernel
from transformer_problems.kernels.fused_attention import fused_attention, fused_backend
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import count_kernels

BACKENDS = ("cpp", "torch")
# batch, tokens, width, heads: one token, heads of odd width, lengths around blocks of 96 queries and panels of columns
SHAPES = [(1, 1, 8, 2), (2, 63, 48, 3), (3, 100, 64, 4), (1, 64, 33, 11), (2, 257, 96, 1), (5, 97, 20, 2)]


def draw(
    batch: int, tokens: int, width: int, *, bias: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """x, then weights and biases of both layers."""
    draws = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, width), (3 * width, width), (3 * width,), (width, width), (width,)]
    x, qkv, qkv_bias, out, out_bias = (torch.randn(s, generator=draws, dtype=torch.float64) for s in shapes)
    scaled = [x, qkv * width**-0.5, qkv_bias if bias else None, out * width**-0.5, out_bias if bias else None]
    return [None if t is None else t.to(dtype) for t in scaled]


def exact(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor | None, out: Tensor, out_bias: Tensor | None, num_heads: int, seen: Tensor
) -> Tensor:
    """By the definition, a head and a sequence at a time, in float64. `seen`: [B, N, N], True may attend."""
    dim = x.shape[-1] // num_heads
    projected = x @ qkv.T if qkv_bias is None else x @ qkv.T + qkv_bias
    q, k, v = projected.chunk(3, dim=-1)
    sequences = []
    for b in range(len(x)):
        heads = []
        for h in range(num_heads):
            own = slice(h * dim, (h + 1) * dim)
            scores = torch.exp(q[b, :, own] @ k[b, :, own].T / dim**0.5) * seen[b]
            total = scores.sum(-1, keepdim=True)
            heads.append(scores / torch.where(total > 0, total, 1.0) @ v[b, :, own])
        sequences.append(torch.cat(heads, dim=-1))
    y = torch.stack(sequences) @ out.T
    return y if out_bias is None else y + out_bias


def seen_by(is_causal: bool, batch: int, tokens: int, key_mask: Tensor | None) -> Tensor:
    seen = torch.ones(batch, tokens, tokens, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    return seen if key_mask is None else seen & key_mask[:, None, :]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["plain", "causal", "masked", "causal and masked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_all_gradients_are_those_of_the_formula(
    shape: tuple[int, int, int, int], variant: str, dtype: torch.dtype, backend: str
) -> None:
    batch, tokens, width, num_heads = shape
    is_causal, bias = "causal" in variant, variant != "plain"
    key_mask = None
    if "masked" in variant:
        key_mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
        key_mask[0] = False  # a sequence where nothing may be attended to
    given = [None if t is None else t.requires_grad_() for t in draw(batch, tokens, width, bias=bias, dtype=dtype)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    y = fused_attention(*given, num_heads=num_heads, is_causal=is_causal, key_mask=key_mask, backend=backend)
    reference = exact(*wide, num_heads, seen_by(is_causal, batch, tokens, key_mask))
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    (reference * weights).sum().backward()
    assert y.dtype == dtype and y.shape == reference.shape
    tolerance = 64 * torch.finfo(dtype).eps  # sums of up to some hundred terms, of values up to about `scale`

    def close(one: Tensor, other: Tensor, scale: float) -> None:
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)

    close(y, reference, 4.0)
    largest = max(float(t.grad.abs().max()) for t in wide if t is not None)  # a key's bias has no gradient but rounding
    for one, other in zip(given, wide, strict=True):
        if one is not None:
            close(one.grad, other.grad, largest)


@pytest.mark.parametrize("shape", [(2, 63, 48, 3), (2, 257, 96, 1)])
def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(shape: tuple[int, int, int, int]) -> None:
    *sizes, num_heads = shape
    given = draw(*sizes, dtype=torch.float32)
    plain = fused_attention(*given, num_heads=num_heads, is_causal=True, backend="cpp")
    training = fused_attention(given[0].requires_grad_(), *given[1:], num_heads=num_heads, is_causal=True)
    assert training.requires_grad and torch.equal(plain, training)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads: int) -> None:
    given = [t.requires_grad_() for t in draw(5, 130, 64, dtype=torch.float32)]
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        try:
            torch.set_num_threads(count)
            y = fused_attention(*given, num_heads=4, is_causal=True, backend="cpp")
            results.append((y, *torch.autograd.grad(y.square().sum(), given)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_many_keys_are_taken_with_fewer_queries_at_a_time() -> None:
    """2,400 keys in float64: blocks of 24 queries, of which the last has no more keys than the padding of its row."""
    given = [None if t is None else t.requires_grad_() for t in draw(1, 2401, 4, bias=False)]
    y, expected = (fused_attention(*given, num_heads=2, is_causal=True, backend=b) for b in BACKENDS)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    tensors = [t for t in given if t is not None]
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    x, qkv, _, out, _ = draw(1, 40, 16, bias=False, dtype=torch.float32)
    given = (x, 30 * qkv, None, out, None)
    y, expected = (fused_attention(*given, num_heads=2, is_causal=False, backend=b) for b in BACKENDS)
    assert y.isfinite().all()
    # Scores of some 1,000 carry a rounding of 1e-4, which is that of the weights.
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_gradients_of_first_and_second_order_are_those_of_the_outputs() -> None:
    given = tuple(t.requires_grad_() for t in draw(2, 5, 4))

    def call(*tensors: Tensor) -> Tensor:
        return fused_attention(*tensors, num_heads=2, is_causal=True, backend="cpp")

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    given = [t.requires_grad_() for t in draw(2, 9, 8, dtype=torch.float32)]
    mask = torch.rand(2, 9) < 0.7
    operator = torch.ops.transformer_problems.fused_attention.default
    torch.library.opcheck(operator, (*given, mask, 2, True, True))


def test_strided_inputs_are_answered_as_packed_ones() -> None:
    x, *weights = draw(2, 12, 8, dtype=torch.float32)
    turned = [x.mT.contiguous().mT, *(t.mT.contiguous().mT if t.dim() > 1 else t for t in weights)]
    one, other = (
        fused_attention(*given, num_heads=2, is_causal=True, backend="cpp") for given in (turned, [x, *weights])
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("is_causal", [False, True])
def test_repeats_in_memory_are_answered_as_copies(is_causal: bool) -> None:
    x, qkv, qkv_bias, out, out_bias = draw(2, 12, 8)
    repeated = (x[:1].expand(2, 12, 8), qkv, qkv_bias[:1].expand(24), out[:1].expand(8, 8), out_bias[::2].repeat(2))
    mask = (torch.arange(12) % 3 > 0).expand(2, 12)
    y = fused_attention(*repeated, num_heads=2, is_causal=is_causal, key_mask=mask, backend="cpp")
    copies = [t.contiguous() for t in repeated]
    assert torch.equal(
        y, fused_attention(*copies, num_heads=2, is_causal=is_causal, key_mask=mask.contiguous(), backend="cpp")
    )
    expected = exact(*copies, 2, seen_by(is_causal, 2, 12, mask))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)  # float64 sums of some tens of terms


def test_it_is_one_kernel_forward_and_moves_what_goes_in_and_out() -> None:
    given = draw(2, 50, 32, dtype=torch.float32)
    counted = count_kernels(lambda: fused_attention(*given, num_heads=4, is_causal=True, backend="cpp"))
    assert counted.kernels == 1
    assert counted.bytes_read == sum(t.numel() for t in given) * 4
    assert counted.bytes_written == given[0].numel() * 4
    apart = count_kernels(lambda: fused_attention(*given, num_heads=4, is_causal=True, backend="torch"))
    assert apart.kernels >= 3 and apart.bytes_moved > counted.bytes_moved


@pytest.mark.parametrize("backward", [False, True])
def test_its_flops_are_those_of_the_operators_apart(backward: bool) -> None:
    given = [t.requires_grad_(backward) for t in draw(2, 50, 32, dtype=torch.float32)]

    def call(backend: str) -> None:
        y = fused_attention(*given, num_heads=4, is_causal=True, backend=backend)
        if backward:
            y.sum().backward()

    one, other = (count_flops(lambda backend=backend: call(backend)) for backend in BACKENDS)
    assert one == other > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_of_nothing_it_gives_nothing(shape: tuple[int, int, int], backend: str) -> None:
    given = [t.requires_grad_() for t in draw(*shape, dtype=torch.float32)]
    y = fused_attention(*given, num_heads=2, is_causal=True, backend=backend)
    y.sum().backward()
    assert y.shape == shape and not given[1].grad.any()


def test_other_dtypes_autocast_and_compiled_graphs_take_pytorch_by_themselves() -> None:
    given = draw(1, 6, 8, dtype=torch.float32)
    assert fused_backend(given[0]) == "cpp" and fused_backend(given[0].bfloat16()) == "torch"
    half = [t.bfloat16() for t in given]
    assert fused_attention(*half, num_heads=2, is_causal=True).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_backend(given[0]) == "torch"
        assert fused_attention(*given, num_heads=2, is_causal=True).dtype == torch.bfloat16
    whole = torch.compile(lambda *t: fused_attention(*t, num_heads=2, is_causal=True), backend="eager", fullgraph=True)
    expected = fused_attention(*given, num_heads=2, is_causal=True, backend="torch")
    torch.testing.assert_close(whole(*given), expected)


def test_without_a_compiler_pytorch_answers_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise MissingDependencyError("no C++ compiler found")

    given = draw(1, 6, 8, dtype=torch.float32)
    monkeypatch.setattr(kernel, "load", refuse)
    kernel._is_built.cache_clear()
    try:
        with pytest.warns(UserWarning, match="fused_attention uses its slower PyTorch path: no C"):
            assert fused_backend(given[0]) == "torch"
    finally:
        kernel._is_built.cache_clear()


def test_what_it_cannot_take_is_refused() -> None:
    x, *weights = draw(2, 6, 8, dtype=torch.float32)
    for given, message in (
        ((x[0], *weights), r"x must be \[B, N, 8\]; got \[6, 8\]"),
        ((x, weights[0].T, *weights[1:]), r"qkv_weight must be \[24, 8\] on cpu, as x; got \[8, 24\]"),
        ((x, *weights[:3], weights[3][:4]), r"out_bias must be \[8\] on cpu, as x; got \[4\]"),
        ((x, None, *weights[1:]), r"qkv_weight must be a tensor \[24, 8\]; got None"),  # read at no address at all
        ((x, *weights[:2], None, weights[3]), r"out_weight must be a tensor \[8, 8\]; got None"),
        ((x, weights[0], [1.0], *weights[2:]), r"qkv_bias must be a tensor \[24\]; got \[1.0\]"),
        (([[1.0]], *weights), r"x must be a floating-point tensor; got \[\[1.0\]\]"),
        ((x.double(), *weights), "qkv_weight must be of x's dtype, torch.float64; got torch.float32. Convert"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fused_attention(*given, num_heads=2, is_causal=True)
    elsewhere = torch.ones(2, 6, dtype=torch.bool, device="meta")  # which the kernel would read at no address: no mask
    for mask, message in (
        (elsewhere, "key_mask must be on cpu, as its tokens; got meta. Move one of them"),
        ([[True] * 6] * 2, r"key_mask must be bool \[2, 6\], True for real tokens; got"),
        (torch.ones(2, 6), r"key_mask must be bool \[2, 6\], True for real tokens; got torch.float32"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fused_attention(x, *weights, num_heads=2, is_causal=True, key_mask=mask)
    with pytest.raises(ArgumentError, match="is_causal must be True or False; got 'no'"):
        fused_attention(x, *weights, num_heads=2, is_causal="no")
    with pytest.raises(ArgumentError, match="num_heads must divide the width of x; got 3 and 8"):
        fused_attention(x, *weights, num_heads=3, is_causal=True)
    with pytest.raises(ArgumentError, match="num_heads must be a positive whole number; got 2.0"):
        fused_attention(x, *weights, num_heads=2.0, is_causal=True)
    with pytest.raises(ArgumentError, match="'cpp' takes float32 and float64 on a CPU; got torch.bfloat16"):
        half = [t.bfloat16() for t in (x, *weights)]
        fused_attention(*half, num_heads=2, is_causal=True, backend="cpp")
    with pytest.raises(UnknownNameError, match="unknown back end of fused_attention 'cuda'"):
        fused_attention(x, *weights, num_heads=2, is_causal=True, backend="cuda")
