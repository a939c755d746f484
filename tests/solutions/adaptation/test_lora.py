"""Adapters start as nothing, learn as peft's do, and leave no trace once merged or undone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA, LoRALinear, adapter_state, load_adapter
from transformer_problems.solutions.adaptation.qlora import NF4Linear, QLoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0, dtype: torch.dtype = torch.float64) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False)).to(dtype).eval()


def wander(model: nn.Module) -> None:
    """As if trained: whatever learns moves."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(p.dtype)


def test_adapters_start_as_nothing_and_alone_learn() -> None:
    model = encoder()
    adapted = LoRA(rank=3, targets=("body.blocks.*",), train=("head.*",))(model)
    assert torch.equal(adapted(TOKENS), model(TOKENS))
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in learning)
    assert len(learning) == 2 * 6 * 2 + 2
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.peer
def test_outputs_and_gradients_are_those_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)).double()
    ours = LoRA(rank=3, alpha=7.0)(model)
    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], lora_dropout=0.0))
    wander(ours)
    for path in ("0", "2"):
        peer = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            peer.lora_A["default"].weight.copy_(ours.get_submodule(path).lora_a)
            peer.lora_B["default"].weight.copy_(ours.get_submodule(path).lora_b)
    x, y = (torch.randn(4, 3, 12, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    theirs = theirs.double()
    torch.testing.assert_close(ours(x), theirs(y), rtol=1e-12, atol=1e-12)
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for path in ("0", "2"):
        peer, mine = theirs.base_model.model.get_submodule(path), ours.get_submodule(path)
        torch.testing.assert_close(mine.lora_a.grad, peer.lora_A["default"].weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine.lora_b.grad, peer.lora_B["default"].weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_weights_give_equal_outputs_and_undone_ones_the_old(dtype: torch.dtype) -> None:
    model, transform = encoder(dtype=dtype), LoRA(rank=4)
    adapted = transform(model)
    wander(adapted)
    merged, undone = transform.merge(adapted), transform.undo(adapted)
    assert not any(isinstance(part, LoRALinear) for part in (*merged.modules(), *undone.modules()))
    # weights of order one are rounded once more by merging, and six products deep that grows some times
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(merged(TOKENS), model(TOKENS), rtol=0.01, atol=0.01)
    assert torch.equal(undone(TOKENS), model(TOKENS))
    assert type(merged.head) is type(model.head) and all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("transform", [LoRA(rank=2), QLoRA(rank=2)])
def test_saved_and_read_back_outputs_are_equal(transform: LoRA, tmp_path: Path) -> None:
    adapted = transform(encoder(dtype=torch.float32))
    wander(adapted)
    save_treated(adapted, tmp_path / "model.safetensors")
    read = load_treated(tmp_path / "model.safetensors", encoder(1, torch.float32), transform)
    assert torch.equal(read(TOKENS), adapted(TOKENS))


def test_a_task_is_kept_apart_from_its_base() -> None:
    transform = LoRA(rank=2, train=("head.bias",), skip=("head",))
    trained, fresh = transform(encoder()), transform(encoder())
    wander(trained)
    state = adapter_state(trained)
    assert sum(t.numel() for t in state.values()) == 2 * 2 * (4 * 32 + 2 * 80) + 11
    load_adapter(fresh, state)
    assert torch.equal(fresh(TOKENS), trained(TOKENS))
    with pytest.raises(ArgumentError, match="is in one of them alone"):
        load_adapter(fresh, {})
    name = next(iter(state))
    with pytest.raises(ArgumentError, match=r"tensors must have the model's shapes; .* is \(1,\) in place of"):
        load_adapter(fresh, {**state, name: torch.ones(1)})


def test_dropout_acts_on_the_adapters_alone() -> None:
    layer = nn.Linear(8, 8, dtype=torch.float64)
    adapted = LoRA(rank=2, dropout=0.5)(nn.Sequential(layer))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(adapted.train()(x), layer(x))
    wander(adapted)
    assert not torch.equal(adapted(x), adapted(x))
    assert torch.equal(adapted.eval()(x), adapted(x))


def test_a_shared_layer_has_one_adapter() -> None:
    layer = nn.Linear(8, 8)
    adapted = LoRA(rank=2)(nn.Sequential(layer, layer))
    assert adapted[0] is adapted[1]
    merged = LoRA().merge(adapted)
    assert merged[0] is merged[1]


def test_empty_inputs_have_empty_outputs() -> None:
    for transform in (LoRA(rank=2), QLoRA(rank=2)):
        assert transform(nn.Sequential(nn.Linear(8, 4)))(torch.empty(0, 3, 8)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LoRA(rank=0), ArgumentError, "rank"),
        (lambda: LoRA(alpha=0), ArgumentError, "alpha"),
        (lambda: LoRA(dropout=1.0), ArgumentError, "dropout must be"),
        (lambda: LoRA(rank=12)(encoder()), ArgumentError, "rank must be at most .*got 12 for head of 16 x 11"),
        (lambda: LoRA(targets=("blocks",))(encoder()), UnknownNameError, "unknown target 'blocks'"),
        (lambda: LoRA(train=("haed",))(encoder()), UnknownNameError, "unknown parameter 'haed'"),
        (lambda: LoRA(rank=2)(LoRA(rank=2)(encoder())), CombinationError, "it has adapters already"),
        (lambda: LoRA().merge(encoder()), ArgumentError, "model must hold adapters; this Encoder has none"),
    ],
)
def test_bad_arguments_are_refused(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_the_base_of_qlora_is_rounded_and_keeps_no_float_weight_for_its_backward_pass() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, dtype=torch.float64)
    packed = NF4Linear.from_linear(layer)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    rounded = packed.dequantized_weight()
    assert 0 < (rounded - layer.weight).norm() / layer.weight.norm() < 0.15
    torch.testing.assert_close(packed(x), nn.functional.linear(x, rounded, layer.bias), rtol=1e-12, atol=1e-12)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = packed(x)
    assert max(saved, default=0) < layer.weight.numel()
    y.square().sum().backward()
    assert torch.autograd.gradcheck(packed, torch.randn(2, 96, dtype=torch.float64, requires_grad=True))


def test_qlora_takes_little_more_than_four_bits_and_merges_into_floats() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(3, 256)
    adapted = QLoRA(rank=2)(model)
    bits = 8 * sum(b.nbytes for name, b in adapted[0].base.named_buffers() if name != "bias") / 256**2
    assert bits == pytest.approx(4.127, abs=0.002)
    wander(adapted)
    merged = QLoRA().merge(adapted)
    assert type(merged[0]) is nn.Linear
    # outputs of order one, in float32
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-4)
    assert isinstance(QLoRA().undo(adapted)[0], NF4Linear)
