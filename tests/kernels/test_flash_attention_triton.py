"""The Triton kernels against the formula in float64: on a GPU, and in Triton's interpreter where there is none."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError
from transformer_problems.kernels import flash_attention_triton as wrapper
from transformer_problems.kernels.flash_attention_triton import flash_attention_triton, has_triton, triton_refusal
from transformer_problems.lab.meters.flops import count_flops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = find_spec("triton") is not None
_RUNS = HAS_TRITON and (INTERPRETED or torch.cuda.is_available())


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """A test that launches kernels, or has them interpreted."""
    test = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")(test)
    return pytest.mark.gpu(pytest.mark.skipif(not _RUNS, reason="needs Triton and a CUDA device")(test))


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    masked: bool = False


CASES = (
    Case(1, 1, 16, 1, 1),
    Case(63, 64, 16, 2, 1, masked=True),
    Case(20, 40, 40, 4, 2),
    Case(40, 70, 40, 2, 1, masked=True),
    Case(50, 7, 64, 2, 2),  # causal: the first queries see no key
    Case(1, 97, 8, 3, 1),
    Case(129, 131, 128, 1, 1),
)


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v with gaps of three kinds between their values, the output's gradient and a key mask."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    N, M, D, H, G, masked = case
    q, grad = normal(2, N, H, D).transpose(1, 2), normal(2, N, H, D).transpose(1, 2)
    k, v = normal(2, G, D, M).mT, normal(2, G, 2 * M, D)[:, :, ::2]
    key_mask = (torch.rand(M, 2, generator=generator) < 0.5).t().to(DEVICE) if masked else None
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad, key_mask


def naive(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if is_causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total) @ v


def check(case: Case, dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v, grad, key_mask = draw(case, dtype)
    ours = flash_attention_triton(q, k, v, key_mask=key_mask, is_causal=is_causal)
    assert ours.dtype == dtype and ours.shape == q.shape
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = naive(*wide, key_mask, is_causal)
    pairs = [(ours, expected)]
    if expected.requires_grad:
        grads = torch.autograd.grad(ours, (q, k, v), grad)
        pairs += zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True)
    for one, other in pairs:
        # weights, gradients of scores and the result are rounded once each; float32 has its sums of a hundred terms
        steps = 16 if dtype == torch.float32 else 4
        bound = steps * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@on_device
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_the_formula(dtype: torch.dtype, case: Case, is_causal: bool) -> None:
    check(case, dtype, is_causal)


@on_device
def test_large_scores_do_not_overflow() -> None:
    q, k, v, grad, _ = draw(Case(40, 40, 16, 2, 1), torch.float32)
    y = flash_attention_triton(1000 * q, k, v, is_causal=True)
    expected = naive_by_softmax(1000 * q.detach().double(), k.detach().double(), v.detach().double())
    # scores of some thousands, rounded to 2^-12 at worst; rows are all but one-hot, and a near tie moves by the same
    torch.testing.assert_close(y.double(), expected, atol=2**-9, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y, (q, k, v), grad))


def naive_by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, one key head."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@on_device
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NumPy tells of what hidden keys lead to
def test_hidden_keys_with_extreme_scores_reach_nothing() -> None:
    q, k, v, grad, _ = draw(Case(33, 40, 16, 2, 1), torch.float32)
    key_mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    key_mask[:, ::3] = False
    factor = torch.where(key_mask, 1.0, 1e4)[:, None, :, None]
    results = []
    for keys in (k, k * factor):
        y = flash_attention_triton(q, keys, v, key_mask=key_mask)
        results.append((y, *torch.autograd.grad(y, (q, k, v), grad)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (results[0][2][:, :, ::3] == 0).all() and (results[0][3][:, :, ::3] == 0).all()


@on_device
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(num_queries: int, num_keys: int) -> None:
    q, k, v, grad, _ = draw(Case(num_queries, num_keys, 16, 2, 1), torch.float32)
    y = flash_attention_triton(q, k, v, is_causal=True)
    assert y.shape == (2, 2, num_queries, 16) and (y == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(y, (q, k, v), grad))


@on_device
def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    q, k, v, _, key_mask = draw(Case(17, 20, 16, 2, 1, masked=True), torch.float32)
    operator = torch.ops.transformer_problems.flash_attention_triton.default
    torch.library.opcheck(operator, (q, k, v, key_mask, True))


@on_device
def test_meters_count_what_runs() -> None:
    q, k, v, grad, _ = draw(Case(32, 64, 16, 4, 2), torch.float32)
    product = 2 * 2 * 4 * 32 * 64 * 16  # B H N M D, two operations each
    assert count_flops(lambda: flash_attention_triton(q, k, v)) == 2 * product
    y = flash_attention_triton(q, k, v)
    assert count_flops(lambda: y.backward(grad)) == 7 * product


@on_device
def test_gradients_cannot_be_differentiated_again() -> None:
    q, k, v, _, _ = draw(Case(3, 3, 16, 1, 1), torch.float32)
    with pytest.raises(ArgumentError, match="create_graph must be False through Triton's kernels"):
        torch.autograd.grad(flash_attention_triton(q, k, v).sum(), q, create_graph=True)


@on_device
def test_a_key_mask_that_does_not_fit_is_refused() -> None:
    q, k, v, _, _ = draw(Case(3, 5, 16, 1, 1), torch.float32)
    misfits = (torch.ones(2, 3, dtype=torch.bool, device=DEVICE), torch.ones(2, 5, device=DEVICE), [[True] * 5] * 2)
    for mask in (*misfits, torch.ones(2, 5, dtype=torch.bool, device="meta")):
        with pytest.raises(ArgumentError, match=r"key_mask must be bool, True may attend, \[2, 5\] on"):
            flash_attention_triton(q, k, v, key_mask=mask)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "one sequence for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one token for all": lambda x: x[:, :, :1].expand_as(x),
    "one channel for all": lambda x: x[..., :1].expand_as(x),
    "backwards": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@on_device
@pytest.mark.parametrize("way", WAYS)
def test_repeats_in_memory_give_the_formula_and_its_gradients_in_float32(way: str) -> None:
    q, k, v, grad, _ = draw(Case(17, 20, 16, 2, 2), torch.float32)
    key_mask = (torch.arange(20, device=DEVICE) % 3 > 0)[None].expand(2, 20)
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y = flash_attention_triton(*map(WAYS[way], ours), key_mask=key_mask, is_causal=True)
    expected = naive(*map(WAYS[way], wide), key_mask, True)
    grads = torch.autograd.grad(y, ours, grad[:, :1, :1].expand_as(y))
    exact = torch.autograd.grad(expected, wide, grad[:, :1, :1].double().expand_as(y))
    for one, other in zip((y, *grads), (expected, *exact), strict=True):
        # sums of some hundred terms, of repeated inputs over all their repeats
        bound = 64 * torch.finfo(torch.float32).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, outside its interpreter")
@pytest.mark.parametrize("part", ["float32", "not float32"])
def test_everything_above_holds_in_the_interpreter(part: str) -> None:
    """Triton reads the variable when it is first imported, and so does the compiler of other tests: a process apart."""
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k", f"{part}"]
    done = subprocess.run(
        [*command, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, outside its interpreter")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("name", ["forward_kernel", "grad_q_kernel", "grad_kv_kernel"])
def test_it_compiles_for_a_gpu_that_is_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes Python that the compiler refuses. Shared memory has to fit a GPU of 2020, 99 KB a block."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = require("triton", extra="gpu")
    target = require("triton.backends.compiler", extra="gpu").GPUTarget("cuda", 80, 32)
    direction = "forward" if name == "forward_kernel" else "backward"
    function = getattr(wrapper._kernels(direction), name)
    x = torch.empty(1, 2, 1, 128, dtype=torch.bfloat16)
    tile = wrapper._tile(direction, x)
    sizes = wrapper._arguments(x, x, x, None, True, tile)
    kinds = {"key_mask": "*i1", "log_sums": "*fp32", "mean_grads": "*fp32", "scale": "fp32", "softmax_scale": "fp32"}
    pointers = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    signature = {
        argument: "constexpr" if argument.isupper() else "*bf16" if argument in pointers else kinds.get(argument, "i32")
        for argument in function.arg_names
    }
    constants = {argument: sizes[argument] for argument, kind in signature.items() if kind == "constexpr"}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
    built = triton.compile(source, target=target, options=options)
    assert "mma.sync" in built.asm["ptx"]  # matrix instructions
    assert built.metadata.shared <= 99 * 1024


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((1, 2, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16)), torch.float64, "must be float16, bfloat16 or float32, all the"),
        (((2, 3, 16), (2, 3, 16), (2, 3, 16)), torch.float32, r"q must be \[B, H, N, D\], .* got \[2, 3, 16\]"),
        (((1, 2, 3, 16), (1, 2, 3, 16), (1, 2, 3, 32)), torch.float32, r"and \[1, 2, 3, 32\]. Reshape them"),
        (((1, 2, 3, 256), (1, 2, 3, 256), (1, 2, 3, 256)), torch.float32, "head_dim must be from 1 to 128 .* got 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_everywhere(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        flash_attention_triton(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


def test_what_are_no_tensors_of_floats_is_refused_everywhere() -> None:
    q, k, v = torch.zeros(3, 1, 2, 3, 16)
    for given, message in (
        ((q.tolist(), k, v), "q must be a floating-point tensor; got an object of type list"),
        ((q, k.numpy(), v), "k must be a floating-point tensor; got an object of type ndarray"),
        ((q, k, v.int()), r"v must be floating point; got torch.int32 \[1, 2, 3, 16\]"),
        ((q, k, v.half()), "the same, for Triton; got torch.float32, torch.float32 and torch.float16. Convert them"),
        ((q, k.to("meta"), v), "must be on one CUDA device for Triton; got cpu, meta and cpu. Move them"),
        ((q[..., :0], k[..., :0], v[..., :0]), "head_dim must be from 1 to 128 for Triton; got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            flash_attention_triton(*given)
    with pytest.raises(ArgumentError, match="is_causal must be True or False; got 'no'"):
        flash_attention_triton(q, k, v, is_causal="no")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_are_refused() -> None:
    reason = triton_refusal(*torch.zeros(3, 1, 2, 3, 16))
    assert reason is not None and "must be on one CUDA device for Triton; got cpu, cpu and cpu. Move them" in reason


def test_triton_is_looked_for_without_being_imported() -> None:
    assert has_triton() == HAS_TRITON
