"""Adapters start as nothing, learn as peft's do, and leave no trace once merged or undone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError, OutputError
from transformer_problems.core.transforms import Chain
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.kernels.linear import Linear
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA, adapter_state, load_adapter, save_adapter
from transformer_problems.solutions.adaptation.lora_linear import LoRALinear
from transformer_problems.solutions.adaptation.qlora import QLoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int4 import QuantizeInt4
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.smooth_quant import SmoothQuant
from transformer_problems.solutions.compression.wanda import Wanda

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


def test_saved_and_read_back_outputs_are_equal(tmp_path: Path) -> None:
    transform, path = LoRA(rank=2), tmp_path / "model.safetensors"
    adapted = transform(encoder(dtype=torch.float32))
    wander(adapted)
    save_treated(adapted, path)
    read = load_treated(path, encoder(1, torch.float32), transform)
    assert torch.equal(read(TOKENS), adapted(TOKENS))
    with pytest.raises(ArgumentError, match="its tensors do not fit"):
        load_treated(path, encoder(), LoRA(rank=3))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArgumentError, match="path must be a whole safetensors file"):
        load_treated(path, encoder(), transform)


def test_a_task_is_kept_apart_from_its_base() -> None:
    transform = LoRA(rank=2, train=("head.bias",), skip=("head",))
    trained, fresh = transform(encoder()), transform(encoder())
    wander(trained)
    state = adapter_state(trained)
    assert sum(t.numel() for t in state.values()) == 2 * 2 * (4 * 32 + 2 * 80) + 11
    load_adapter(fresh, state)
    assert torch.equal(fresh(TOKENS), trained(TOKENS))


def test_an_adapter_on_disk_is_small_and_gives_equal_outputs(tmp_path: Path) -> None:
    transform, path = LoRA(rank=2, skip=("head",)), tmp_path / "task.safetensors"
    trained, fresh = transform(encoder()), transform(encoder())
    wander(trained)
    # 8 bytes a number, and a header that names each of 24 tensors in some 100 bytes
    assert save_adapter(trained, path) < 8 * 2 * (4 * 32 + 2 * 80) * 2 + 24 * 120
    load_adapter(fresh, path)
    assert torch.equal(fresh(TOKENS), trained(TOKENS))
    with pytest.raises(OutputError, match="path must be writable"):
        save_adapter(trained, tmp_path / "none" / "task.safetensors")


def test_adapters_that_do_not_fit_are_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    model, path = LoRA(rank=2)(encoder()), tmp_path / "task.safetensors"
    wander(model)
    state, before = adapter_state(model), {name: t.clone() for name, t in model.state_dict().items()}
    last = list(state)[-1]
    save_adapter(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    zeros = {name: torch.zeros_like(t) for name, t in state.items()}
    for source, words in (
        ({}, "is in one of them alone"),
        ({**zeros, "more": torch.ones(1)}, "more is in one of them alone"),
        ({**zeros, last: torch.ones(1)}, r"tensors must have the model's shapes; .* is \(1,\) in place of"),
        ({**zeros, last: torch.full_like(state[last], torch.nan)}, "tensors must be finite"),
        (path, "source must be a whole safetensors file"),
        (tmp_path / "none", "source must be a whole safetensors file"),
    ):
        with pytest.raises(ArgumentError, match=words):
            load_adapter(model, source)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_dropout_acts_on_the_adapters_alone() -> None:
    layer = nn.Linear(8, 8, dtype=torch.float64)
    adapted = LoRA(rank=2, dropout=0.5)(nn.Sequential(layer))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(adapted.train()(x), layer(x))
    wander(adapted)
    assert not torch.equal(adapted(x), adapted(x))
    assert torch.equal(adapted.eval()(x), adapted(x))
    resting = LoRA(rank=2, dropout=0.5)(nn.Sequential(layer).eval())
    wander(resting)
    assert torch.equal(resting(x), resting(x))


def test_a_shared_layer_has_one_adapter_which_is_merged_once() -> None:
    layer, x = nn.Linear(8, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    for transform in (LoRA(rank=2), Chain(QuantizeInt4(group_size=8), LoRA(rank=2))):
        adapted = transform(nn.Sequential(layer, layer))
        assert adapted[0] is adapted[1]
        wander(adapted)
        merged = LoRA().merge(adapted)
        assert merged[0] is merged[1]
        torch.testing.assert_close(merged(x), adapted(x), rtol=1e-12, atol=1e-12)


def test_layers_keep_their_class_and_models_of_any_make_are_adapted() -> None:
    merged = LoRA().merge(LoRA(rank=2)(nn.Sequential(Linear(8, 4))))
    assert type(merged[0]) is Linear
    decoder = Decoder(11, 16, 2, lambda: SelfAttention(16, 2)).eval()
    assert torch.equal(LoRA(rank=2)(decoder)(TOKENS), decoder(TOKENS))
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    bert = transformers.BertModel(config).eval()
    adapted = LoRA(rank=2, targets=("*.query", "*.value"))(bert)
    assert sum(isinstance(part, LoRALinear) for part in adapted.modules()) == 4
    with torch.inference_mode():
        assert torch.equal(adapted(TOKENS).last_hidden_state, bert(TOKENS).last_hidden_state)


def test_what_train_names_learns_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    adapted = LoRA(rank=2, train=("1.*", "0.bias"))(model)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {"0.base.bias", "0.lora_a", "0.lora_b", "1.weight", "1.bias"}


def test_rounded_models_are_adapted_and_merged_into_floats() -> None:
    torch.manual_seed(0)
    rounded = QuantizeInt4(group_size=8)(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double())
    adapted, x = LoRA(rank=2)(rounded), torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(adapted(x), rounded(x))
    adapted(x).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())
    wander(adapted)
    merged = LoRA().merge(adapted)
    assert [type(part) for part in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(CombinationError, match="adapters need layers that pass gradients on; 0, a Int8Linear"):
        LoRA(rank=2)(QuantizeInt8()(nn.Sequential(nn.Linear(16, 16))))


def test_scales_of_inputs_are_merged_with_and_zeros_are_not_filled() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16)).double(), torch.randn(5, 16, dtype=torch.float64)
    transform = LoRA(rank=2)
    adapted = transform(SmoothQuant([x])(model))
    wander(adapted)
    torch.testing.assert_close(transform.merge(adapted)(x), adapted(x), rtol=1e-12, atol=1e-12)
    sparse = transform(Wanda([x], sparsity=0.5)(model))
    with pytest.raises(CombinationError, match="cannot be merged into a SparseLinear"):
        transform.merge(sparse)


def test_adapters_are_differentiable_and_empty_inputs_have_empty_outputs() -> None:
    layer = LoRALinear(nn.Linear(4, 3, dtype=torch.float64), rank=2, alpha=3.0)
    wander(layer)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, layer.lora_a, layer.lora_b))
    for shape in ((0, 3, 4), (2, 0, 4)):
        assert layer(torch.empty(shape, dtype=torch.float64)).shape == (*shape[:-1], 3)
    assert layer(x[0, 0]).shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank must be positive"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("inf")}, "alpha must be finite"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"dropout": -0.1}, "dropout must be a share"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        LoRA(**arguments)


@pytest.mark.parametrize(
    ("transform", "make", "words"),
    [
        (LoRA(rank=12), encoder, "rank must be at most .*got 12 for head of 16 x 11. Choose 11 or less"),
        (LoRA(targets=("q_proj",)), encoder, r"unknown target 'q_proj'. Nearest: body.\w+.0.\w+.q_proj"),
        (LoRA(targets=("head", "haed")), encoder, "unknown target 'haed'. Nearest: head"),
        (LoRA(train=("haed.bias",)), encoder, "unknown parameter 'haed.bias'. Nearest: head.bias"),
        (LoRA(skip=("layers.*",)), encoder, r"unknown layer to skip 'layers.\*'. Known: "),
        (LoRA(targets=("head",), skip=("h*",)), encoder, "targets must name a layer that skip and train leave"),
        (LoRA(rank=2), lambda: LoRA(rank=2)(encoder()), "it has adapters already"),
        (LoRA(rank=2), lambda: nn.LayerNorm(4), "model must hold linear layers; this LayerNorm holds none"),
        (LoRA(rank=2), lambda: nn.Linear(4, 4), "Put a layer that stands alone into a torch.nn.Sequential"),
    ],
)
def test_models_that_make_no_sense_are_refused_and_left_alone(
    transform: LoRA, make: Callable[[], nn.Module], words: str
) -> None:
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    learns = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ArgumentError, match=words):
        transform(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert [p.requires_grad for p in model.parameters()] == learns


@pytest.mark.parametrize("make", [LoRA, QLoRA])
@pytest.mark.parametrize("targets", [("*",), ("*out_proj",), ("linear1", "self_attn.*")])
def test_layers_whose_weight_is_read_without_a_call_are_refused(make: type[LoRA], targets: tuple[str, ...]) -> None:
    words = r"self_attn.out_proj is not, .*MultiheadAttention reads its weight. Pass skip=\('\*self_attn.out_proj',\)"
    with pytest.raises(ArgumentError, match=words):
        make(rank=2, targets=targets)(nn.TransformerEncoderLayer(16, 2, 32))
    with pytest.raises(ArgumentError, match=r"skip=\('\*multihead_attn.out_proj', '\*self_attn.out_proj'\) to adapt"):
        make(rank=2)(nn.TransformerDecoderLayer(16, 2, 32))
    rest = make(rank=2, targets=("*",), skip=("*self_attn.out_proj",))(nn.TransformerEncoderLayer(16, 2, 32))
    assert isinstance(rest.linear1, LoRALinear) and isinstance(rest.linear2, LoRALinear)
    assert isinstance(rest.self_attn.out_proj, nn.Linear)


def test_what_has_no_adapters_is_neither_merged_nor_undone() -> None:
    for take in (LoRA().merge, LoRA().undo):
        with pytest.raises(ArgumentError, match="model must hold adapters; this Encoder has none"):
            take(encoder())


def test_an_adapter_file_knows_its_factor(tmp_path: Path) -> None:
    adapted = LoRA(rank=4, alpha=16)(encoder())
    save_adapter(adapted, tmp_path / "adapter.safetensors")
    load_adapter(LoRA(rank=4, alpha=16)(encoder()), tmp_path / "adapter.safetensors")
    with pytest.raises(ArgumentError, match="had 4 and has 8. Adapt the model with the same alpha"):
        load_adapter(LoRA(rank=4, alpha=32)(encoder()), tmp_path / "adapter.safetensors")
    with pytest.raises(ArgumentError, match="model must hold adapters; this Encoder has none"):
        save_adapter(encoder(), tmp_path / "none.safetensors")
