"""Compiled models answer and learn as the originals, come back and are refused where they must."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.core.transforms import Chain
from transformer_problems.lab.meters.kernels import count_compiled_kernels, count_kernels
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.deployment.compiled import CompiledModel, CompileGraph
from transformer_problems.solutions.deployment.fused_feed_forward import FuseFeedForward
from transformer_problems.solutions.deployment.fused_projections import FuseProjections

# PyTorch's compiler looks for a gradient on every tensor that it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TOKENS = torch.arange(14).view(2, 7) % 11


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(11, 16, 2, lambda: SelfAttention(16, 4)).eval()


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 4, is_causal=False)).eval()


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    y, expected = one(x), other(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # some tens of float32 roundings
    y.square().mean().backward()
    expected.square().mean().backward()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_compiled_models_are_the_model_and_compile_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: calls.append(options) or compile_(net, **options))
    model, transform, x = network(), CompileGraph(backend="aot_eager", dynamic=True), torch.randn(3, 8)
    compiled = transform(model)
    assert not calls
    assert_same(compiled, model, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(f"model.{name}").grad, parameter.grad)
    compiled(x)
    assert calls == [{"mode": "default", "backend": "aot_eager", "dynamic": True}]
    assert equal_states(transform.undo(compiled), model)
    assert type(transform.undo(compiled)) is nn.Sequential
    with pytest.raises(ArgumentError, match="model must be a CompiledModel"):
        transform.undo(model)
    with pytest.raises(ArgumentError, match="must not be compiled already"):
        transform(compiled)


def test_everything_but_a_call_goes_to_the_model_within() -> None:
    model = decoder()
    compiled = CompileGraph(backend="eager")(model)
    y, _ = compiled.stream(TOKENS, compiled.initial_state(2))
    torch.testing.assert_close(y, model(TOKENS), rtol=1e-5, atol=1e-5)
    assert compiled.train().model.body.norm.training
    with pytest.raises(AttributeError, match="nonsense"):
        _ = compiled.nonsense


def test_a_transform_after_compilation_treats_the_model_and_compiles_anew() -> None:
    compiled, x = CompileGraph(backend="eager")(network()), torch.randn(3, 8)
    before = compiled(x)
    adapted = LoRA(rank=2, targets=("*",))(compiled)
    assert isinstance(adapted, CompiledModel) and not isinstance(adapted.model[0], nn.Linear)
    assert torch.equal(adapted(x), before)  # an adapter begins with nothing to add
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert not torch.allclose(adapted(x), before)


def test_compilation_that_cannot_be_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown mode of compilation 'fast'"):
        CompileGraph("fast")
    with pytest.raises(UnknownNameError, match="unknown back end of torch.compile 'indctor'. Nearest: inductor"):
        CompileGraph(backend="indctor")(decoder())
    monkeypatch.delenv("CXX", raising=False)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("g++", "clang++", "c++") else found(name))
    with pytest.raises(MissingDependencyError, match="generates C.*no C.. compiler found.*Or pass backend='aot_eager'"):
        CompileGraph()(decoder())
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    with pytest.raises(MissingDependencyError, match="calls g.., which this machine lacks. Set .* CXX=clang"):
        CompileGraph()(decoder())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_inductor_launches_fewer_kernels_with_equal_outputs() -> None:
    model = Chain(FuseProjections(), FuseFeedForward())(encoder())
    compiled = CompileGraph()(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
        before, after = count_kernels(lambda: model(TOKENS)).kernels, count_compiled_kernels(lambda: compiled(TOKENS))
    assert after < before
