"""Treatments after each other, and inside PyTorch's own layers: what an earlier one keeps apart is not lost."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import Chain, ModelTransform
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.compression.factorised_embedding import FactoriseEmbedding
from transformer_problems.solutions.compression.gptq import GPTQ
from transformer_problems.solutions.compression.int4 import QuantizeInt4
from transformer_problems.solutions.compression.int8 import Int8Linear, QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.movement_pruning import MovementPruning
from transformer_problems.solutions.compression.smooth_quant import ScaledLinear, SmoothQuant
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.compression.wanda import Wanda


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 32)


def error(treated: nn.Module, model: nn.Module, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        expected = model(x)
        return float((treated(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("rounding", [QuantizeInt4(group_size=16), GPTQ([X], group_size=16)])
def test_scaled_models_can_be_rounded_to_four_bits(rounding: ModelTransform) -> None:
    model = plain()
    smoothed = Chain(SmoothQuant([X]), rounding)(model)
    assert error(smoothed, model) == pytest.approx(error(rounding(model), model), rel=0.05)


@pytest.mark.parametrize(
    "later", [MagnitudePruning(0.5), Wanda([X], 0.5), MovementPruning(0.5), StructuredPruning(), SmoothQuant([X])]
)
def test_scaled_models_are_not_pruned_or_scaled_again(later: ModelTransform) -> None:
    with pytest.raises(CombinationError, match="scale"):
        later(SmoothQuant([X])(plain()))


def test_heads_and_neurons_leave_before_single_weights_do() -> None:
    with pytest.raises(CombinationError, match="layers must be plain to become smaller; 0 is a SparseLinear"):
        Chain(MagnitudePruning(0.5), StructuredPruning())(plain())


def test_what_was_pruned_stays_zero_when_gptq_rounds() -> None:
    pruned = MagnitudePruning(0.5)(plain())
    rounded = GPTQ([X], group_size=16)(pruned)
    for before, after in ((pruned[0], rounded[0]), (pruned[2], rounded[2])):
        assert (after.dequantized_weight()[~before.keep] == 0).all()


def test_too_little_damping_is_told() -> None:
    with pytest.raises(ArgumentError, match="damping must be large enough"):
        GPTQ([torch.ones(2, 32)], group_size=16, damping=1e-12)(plain())


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizeInt4(group_size=16),
        lambda: MagnitudePruning(0.5),
        lambda: SmoothQuant([X]),
        lambda: MovementPruning(0.5),
    ],
)
def test_adapters_beside_treated_layers_keep_the_mode(make: Callable[[], ModelTransform]) -> None:
    for mode in (True, False):
        treated = make()(plain().train(mode))
        assert all(part.training == mode for part in treated.modules())
    model = LoRA(4, dropout=0.5)(QuantizeInt4(group_size=16)(plain().eval()))
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("make", [lambda: MagnitudePruning(0.5), lambda: SmoothQuant([X])])
def test_what_was_frozen_stays_frozen(make: Callable[[], ModelTransform]) -> None:
    frozen = make()(plain().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_calibration_leaves_each_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).train()
    model[1].eval()
    rounded = QuantizeInt8(calibration=[X])(model)
    assert rounded.training and not rounded[1].training


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # by the untreated model


def pytorch_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@NESTED
@pytest.mark.parametrize(
    ("make", "most"),
    [
        (QuantizeInt8, 0.05),
        (lambda: QuantizeInt4(group_size=16), 0.3),
        (lambda: SmoothQuant([torch.randn(2, 5, 32)], skip=("*out_proj",)), 1e-5),
        (lambda: MovementPruning(0.0), 1e-6),
        (lambda: LoRA(4, skip=("*out_proj",)), 1e-6),
    ],
)
def test_encoder_layers_of_pytorch_call_what_was_put_into_them(make: Callable[[], ModelTransform], most: float) -> None:
    model, x = pytorch_encoder(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        found = make()(model)(x, src_key_padding_mask=padding)
    assert float((found - expected).norm() / expected.norm()) <= most


def test_a_fast_path_that_would_read_over_a_mask_is_left() -> None:
    pruned = MovementPruning(0.9)(pytorch_encoder())
    for part in pruned.modules():
        if hasattr(part, "select"):
            part.scores.data.normal_()
            part.select(0.9)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        fast = pruned(x)
    torch.testing.assert_close(fast, pruned(x).detach())


@pytest.mark.parametrize("backend", ["auto", "cpp", "int_mm", "float"])
def test_inputs_of_another_width_are_refused(backend: str) -> None:
    layer = Int8Linear.from_linear(nn.Linear(64, 64), backend=backend)
    for x in (torch.randn(8, 32), torch.randn(4, 128), torch.randn(2, 3, 32)):
        with pytest.raises(ArgumentError, match=r"x must be \[..., 64\]; got"):
            layer(x)


def test_scales_of_int8_stay_wide_in_half_precision() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64, bias=False), torch.randn(8, 64)
    linear.weight.data *= 1e-4
    layer = Int8Linear.from_linear(linear)
    with torch.no_grad():
        expected = layer(x)
        assert layer.half().scales.dtype == torch.float32
        torch.testing.assert_close(layer(x), expected)


def test_strided_codes_count_as_what_they_are() -> None:
    layer, x = Int8Linear.from_linear(nn.Linear(16, 16, bias=False)), torch.randn(3, 16)
    expected = layer(x)
    layer.load_state_dict(layer.state_dict() | {"codes": layer.codes.T.contiguous().T}, assign=True)
    assert torch.equal(layer(x), expected)


def test_embeddings_keep_what_they_do_besides() -> None:
    table = nn.Embedding(50, 16, padding_idx=3)
    model = nn.ModuleDict({"tok": table, "shared": table})
    factorised = FactoriseEmbedding(4)(model)
    assert factorised["tok"] is factorised["shared"]
    factorised["tok"](torch.tensor([3, 5])).sum().backward()
    assert (factorised["tok"].table.weight.grad[3] == 0).all()
    with pytest.raises(ArgumentError, match=r"0 has max_norm=1.0, which factors cannot keep"):
        FactoriseEmbedding(4)(nn.Sequential(nn.Embedding(50, 16, max_norm=1.0)))


def test_scales_are_taken_out_once() -> None:
    smooth = SmoothQuant([X])
    smoothed = smooth(plain())
    assert isinstance(smoothed[0], ScaledLinear)
    assert error(smooth.undo(smoothed), plain()) < 1e-5
    with pytest.raises(ArgumentError, match="has none"):
        smooth.undo(plain())
