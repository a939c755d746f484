"""The base of QLoRA takes four bits a weight, on disk and in training, and passes on the gradients of what it holds."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA, adapter_state, load_adapter
from transformer_problems.solutions.adaptation.lora_linear import LoRALinear
from transformer_problems.solutions.adaptation.nf4 import quantize_nf4
from transformer_problems.solutions.adaptation.qlora import NF4Linear, QLoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int4 import QuantizeInt4
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.smooth_quant import SmoothQuant
from transformer_problems.solutions.compression.wanda import Wanda

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0, dtype: torch.dtype = torch.float32) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False)).to(dtype).eval()


def wander(model: nn.Module) -> None:
    """As if trained: whatever learns moves."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


def large_floats(least: int) -> list[Tensor]:
    """Tensors of so many floats that Python knows of."""
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return [t for t in tensors if t.is_floating_point() and t.numel() >= least]


def bytes_of_codes(layer: NF4Linear) -> int:
    return sum(buffer.nbytes for name, buffer in layer.named_buffers() if name != "bias")


def test_a_rounded_layer_multiplies_by_its_nearest_weight_and_passes_gradients_on() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, dtype=torch.float64)
    packed = NF4Linear.from_linear(layer)
    x = torch.randn(5, 96, dtype=torch.float64)
    weight = packed.dequantized_weight()
    # steps of a sixth of the largest of 64 normal values, which is some 2.4 deviations
    assert 0 < (weight - layer.weight).norm() / layer.weight.norm() < 0.15
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(packed, torch.randn(2, 96, dtype=torch.float64, requires_grad=True))


def test_outputs_and_gradients_are_those_of_lora_on_the_rounded_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).double()
    ours, dense = QLoRA(rank=3, alpha=7.0)(model), LoRA(rank=3, alpha=7.0)(model)
    wander(ours)
    load_adapter(dense, adapter_state(ours))
    for path in ("0", "2"):
        dense.get_submodule(path).base.weight.data = ours.get_submodule(path).base.dequantized_weight()
    x = torch.randn(4, 3, 32, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(ours(x), dense(y), rtol=1e-12, atol=1e-12)
    ours(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for (name, mine), peer in zip(adapter_state(ours).items(), adapter_state(dense).values(), strict=True):
        assert torch.equal(mine, peer)
        torch.testing.assert_close(
            ours.get_parameter(name).grad, dense.get_parameter(name).grad, rtol=1e-10, atol=1e-12
        )


def test_no_float_weight_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = QLoRA(rank=2)(nn.Sequential(nn.Linear(130, 132), nn.ReLU(), nn.Linear(132, 130)))
    x, saved = torch.randn(3, 130, requires_grad=True), []
    before = len(large_floats(130 * 132))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = adapted(x).square().sum()
    assert max(saved) < 130 * 132
    assert len(large_floats(130 * 132)) == before
    unpacked: list[NF4Linear] = []
    unpack = NF4Linear.dequantized_weight
    monkeypatch.setattr(NF4Linear, "dequantized_weight", lambda s, *a: unpacked.append(s) or unpack(s, *a))
    loss.backward()
    assert unpacked == [adapted[2].base, adapted[0].base]  # once more each, last first


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_a_weight_takes_some_four_bits_in_memory_and_on_disk(double_quant: bool, bits: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    adapted = QLoRA(rank=2, double_quant=double_quant)(model)
    adapters = sum(t.nbytes for t in adapter_state(adapted).values())
    # 4 bytes of a mean
    assert 8 * bytes_of_codes(adapted[0].base) / 512**2 == pytest.approx(bits, abs=2e-4)
    assert stored_bytes(adapted) == bytes_of_codes(adapted[0].base) + adapters
    # a header names six tensors in less than 1 kB
    on_disk = save_treated(adapted, tmp_path / "model.safetensors") - adapters
    assert 8 * (on_disk - 1024) / 512**2 < bits < 8 * on_disk / 512**2


@pytest.mark.parametrize("transform", [QLoRA(rank=2), QLoRA(rank=2, block_size=24, double_quant=False)])
def test_saved_and_read_back_outputs_are_equal_and_the_original_untouched(transform: QLoRA, tmp_path: Path) -> None:
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    adapted = transform(model)
    wander(adapted)
    save_treated(adapted, tmp_path / "model.safetensors")
    read = load_treated(tmp_path / "model.safetensors", encoder(1), transform)
    assert torch.equal(read(TOKENS), adapted(TOKENS))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="its tensors do not fit"):
        load_treated(tmp_path / "model.safetensors", encoder(1), QLoRA(rank=2, block_size=32))


def test_merged_layers_are_plain_and_undone_ones_stay_rounded() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 128)), torch.randn(3, 256)
    adapted = QLoRA(rank=2)(model)
    wander(adapted)
    merged, undone = QLoRA().merge(adapted), QLoRA().undo(adapted)
    assert type(merged[0]) is nn.Linear and isinstance(undone[0], NF4Linear)
    # sums of 256 products of order 1/16, in float32
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(undone(x), QLoRA(rank=2)(model)(x))
    again = LoRA(rank=2)(undone)
    assert torch.equal(again(x), undone(x)) and isinstance(again[0], LoRALinear)


def test_scales_of_inputs_go_into_the_codes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64) * torch.logspace(-2, 2, 64)
    smoothed = SmoothQuant([x])(model)
    plain, kept = QLoRA(rank=2)(model), QLoRA(rank=2)(smoothed)
    torch.testing.assert_close(kept[0].base.dequantized_weight(), plain[0].base.dequantized_weight(), rtol=0.02, atol=0)


def test_weights_that_a_layer_keeps_at_zero_stay_zero() -> None:
    torch.manual_seed(0)
    sparse = Wanda([torch.randn(5, 64)], sparsity=0.5)(nn.Sequential(nn.Linear(64, 32)))
    nn.init.normal_(sparse[0].weight)  # which its forward pass leaves half of out
    weight = QLoRA(rank=2)(sparse)[0].base.dequantized_weight()
    assert not weight[~sparse[0].keep].any() and weight[sparse[0].keep].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_rounded_model_may_change_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(100, 33), torch.randn(3, 100)
    adapted = QLoRA(rank=2)(nn.Sequential(layer)).to(dtype)
    codes = quantize_nf4(layer.weight)
    assert torch.equal(adapted[0].base.steps, codes.steps) and torch.equal(adapted[0].base.mean, codes.mean)
    y = adapted(x.to(dtype))
    y.sum().backward()
    assert y.dtype == adapted[0].lora_b.grad.dtype == QLoRA().merge(adapted)[0].weight.dtype == dtype


def test_training_under_autocast_may_end_outside_of_it() -> None:
    adapted, x = QLoRA(rank=2)(nn.Sequential(nn.Linear(32, 32))), torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    expected = adapted[0].base.dequantized_weight().sum(dim=0).expand(3, -1)
    # the weights are rounded to 8 bits, and so is their sum
    torch.testing.assert_close(x.grad, expected, rtol=2**-7, atol=2**-7)


def test_models_of_transformers_are_adapted_and_empty_inputs_answered() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    adapted = QLoRA(rank=2)(model)
    assert sum(isinstance(part, NF4Linear) for part in adapted.modules()) == 13
    with torch.inference_mode():
        ours, theirs = adapted(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state
    # a tenth of each weight, which the residual stream of this initialisation outweighs
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.05
    for shape in ((0, 3, 8), (2, 0, 8)):
        assert QLoRA(rank=2)(nn.Sequential(nn.Linear(8, 4)))(torch.empty(shape)).shape == (*shape[:-1], 4)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("transform", "make", "error", "words"),
    [
        (QLoRA(rank=2), lambda: QLoRA(rank=2)(plain()), CombinationError, "it has adapters already"),
        (QLoRA(rank=2), lambda: QuantizeInt8()(plain()), CombinationError, "QLoRA makes no sense on 0, a Int8Linear"),
        (QLoRA(rank=2), lambda: QuantizeInt4(group_size=8, skip=["0"])(plain()), CombinationError, "2, a Int4Linear"),
        (QuantizeInt8(), lambda: QLoRA(rank=2)(plain()), CombinationError, "Merge them first"),
        (QuantizeInt4(group_size=8), lambda: QLoRA().undo(QLoRA(rank=2)(plain())), CombinationError, "codes already"),
        (QLoRA(rank=2, train=("0.bias",)), plain, ArgumentError, "train must name .* 0.bias is rounded"),
        (QLoRA(rank=17), plain, ArgumentError, "rank must be at most .* got 17 for 0 of 16 x 16"),
        (QLoRA(targets=("1",)), plain, ArgumentError, "unknown target '1'. Known: 0, 2."),
    ],
)
def test_models_that_make_no_sense_are_refused_and_left_alone(
    transform: QLoRA, make: Callable[[], nn.Module], error: type[Exception], words: str
) -> None:
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=words):
        transform(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_block_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ArgumentError, match="block_size must be positive"):
        QLoRA(block_size=0)
