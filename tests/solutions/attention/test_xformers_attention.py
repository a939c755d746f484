"""XFormersAttention: what it hands to xFormers, played here by a naive one, and what it answers by itself."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from transformer_problems import ALiBi, DenseAttention, SelfAttention
from transformer_problems.core.errors import ArgumentError, DeviceError, MissingDependencyError, UnknownNameError
from transformer_problems.solutions.attention import xformers_attention as module
from transformer_problems.solutions.attention.xformers_attention import XFormersAttention


class BottomRight:
    """xFormers' causal mask, whose queries are the last of the keys."""


def naive(query: Tensor, key: Tensor, value: Tensor, attn_bias: BottomRight | None = None) -> Tensor:
    """The operator as xFormers documents it, a head and a sequence at a time. query: [B, N, H, D]."""
    assert query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == key.shape[2] == value.shape[2]
    y = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    num_queries, num_keys = query.shape[1], key.shape[1]
    for b in range(len(query)):
        for h in range(query.shape[2]):
            scores = query[b, :, h] @ key[b, :, h].T / query.shape[-1] ** 0.5
            if attn_bias is not None:
                hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
                scores = scores.masked_fill(hidden, float("-inf"))
            y[b, :, h] = scores.softmax(-1) @ value[b, :, h]
    return y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, object]]:
    """A fake package whose operator notes its calls; a CPU passes for CUDA."""
    noted: list[tuple[torch.Size, object]] = []

    def operator(query: Tensor, key: Tensor, value: Tensor, attn_bias: BottomRight | None = None) -> Tensor:
        noted.append((query.shape, attn_bias))
        if query.shape[-1] > 16:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        return naive(query, key, value, attn_bias)

    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    modules["xformers.ops"].memory_efficient_attention = operator  # type: ignore[attr-defined]
    modules[names[3]].LowerTriangularFromBottomRightMask = BottomRight  # type: ignore[attr-defined]
    for name, fake in modules.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(module, "_can_run", lambda: True)
    real: Callable[[Tensor, Tensor, bool], bool] = module._takes
    on_cuda = torch.device("cuda")

    class OnCuda:
        """A tensor's sizes and dtype, with the device of another."""

        def __init__(self, x: Tensor) -> None:
            self.shape, self.dtype, self.numel, self.device = x.shape, x.dtype, x.numel, on_cuda

    monkeypatch.setattr(module, "_takes", lambda q, k, is_causal: real(OnCuda(q), OnCuda(k), is_causal))
    return noted


def draw(*, num_queries: int = 5, num_keys: int = 7, kv_heads: int = 4, head_dim: int = 8) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, num_queries, head_dim), *[(2, 3, kv_heads, num_keys, head_dim)] * 2]
    return tuple(torch.randn(shape, generator=draws).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_xformers_answers_in_its_own_layout(
    calls: list[tuple[torch.Size, object]], kv_heads: int, is_causal: bool
) -> None:
    op, given = XFormersAttention(), draw(kv_heads=kv_heads)
    y, expected = op(*given, is_causal=is_causal), DenseAttention()(*given, is_causal=is_causal)
    assert op.runs == op.last_run == "xformers"
    ((shape, bias),) = calls
    assert shape == (6, 5, 4, 8) and isinstance(bias, BottomRight) == is_causal
    torch.testing.assert_close(y, expected)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), given) for out in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_xformers_does_not_take_is_answered_by_the_library(calls: list[tuple[torch.Size, object]]) -> None:
    op, given = XFormersAttention(), draw()
    mask = torch.rand(2, 3, 1, 1, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    longer = draw(num_queries=9)
    for q, k, v, options in (
        (*given, {"mask": mask}),
        (*(x.double() for x in given), {}),
        (*longer, {"is_causal": True}),
    ):
        y = op(q, k, v, **options)
        assert op.last_run == "own"
        torch.testing.assert_close(y, DenseAttention()(q, k, v, **options))
    layer = SelfAttention(32, 4, op=op, position=ALiBi(4))
    layer(torch.randn(1, 6, 32))
    assert op.last_run == "own"
    assert not calls
    assert op(*draw(num_queries=0)).shape == (2, 3, 4, 0, 8) and not calls


def test_where_xformers_has_no_kernel_the_library_answers(calls: list[tuple[torch.Size, object]]) -> None:
    op, given = XFormersAttention(), draw(head_dim=32)
    y = op(*given)
    assert len(calls) == 1 and op.last_run == "own"
    torch.testing.assert_close(y, DenseAttention()(*given))


def test_a_named_back_end_answers_or_says_why_not(
    calls: list[tuple[torch.Size, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, named, given = XFormersAttention(backend="own"), XFormersAttention(backend="xformers"), draw()
    torch.testing.assert_close(own(*given), named(*given))
    assert (own.last_run, named.last_run, len(calls)) == ("own", "xformers", 1)
    with pytest.raises(ArgumentError, match="float64"):
        named(*(x.double() for x in given))
    with pytest.raises(UnknownNameError, match="auto, xformers, own"):
        XFormersAttention(backend="cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_can_run", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install xformers"):
        XFormersAttention(backend="xformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(DeviceError, match="CUDA"):
        XFormersAttention(backend="xformers")


@pytest.mark.parametrize(("installed", "has_cuda"), [(False, True), (True, False), (True, True)])
def test_it_runs_where_both_the_package_and_cuda_are_there(
    monkeypatch: pytest.MonkeyPatch, installed: bool, has_cuda: bool
) -> None:
    package = ModuleType("xformers")
    package.__spec__ = ModuleSpec("xformers", None)
    if not installed and importlib.util.find_spec("xformers") is not None:
        pytest.skip("xFormers is installed")
    if installed:
        monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert XFormersAttention().runs == ("xformers" if installed and has_cuda else "own")


def test_here_the_library_answers() -> None:
    op, given = XFormersAttention(), draw()
    assert op.last_run is None
    torch.testing.assert_close(op(*given, is_causal=True), DenseAttention()(*given, is_causal=True))
    assert op.last_run == "own"


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_real_package_gives_what_dense_attention_gives(is_causal: bool) -> None:
    pytest.importorskip("xformers")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    op, given = XFormersAttention(), [x.detach().cuda().half() for x in draw()]
    y = op(*given, is_causal=is_causal)
    expected = DenseAttention()(*(x.float() for x in given), is_causal=is_causal)
    assert op.last_run == "xformers"
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)  # float16 keeps three digits
