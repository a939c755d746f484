"""Four bits: nearest steps, bits a weight, GPTQ's smaller error on real activations; SmoothQuant's equality."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import load_bundled
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import Chain, ModelTransform
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.lab.data.text import load_text
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.gptq import GPTQ, gptq_linear
from transformer_problems.solutions.compression.int4 import Int4Linear, QuantizeInt4
from transformer_problems.solutions.compression.int8 import Int8Linear, QuantizeInt8
from transformer_problems.solutions.compression.smooth_quant import ScaledLinear, SmoothQuant

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False)).eval()


def test_every_weight_takes_the_nearest_step_and_zero_stays_zero() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 600)
    with torch.no_grad():
        layer.weight[:, ::5] = 0
        layer.weight[3, :16] = layer.weight[3, :16].abs() + 1  # a group without negative weights
    rounded = Int4Linear.from_linear(layer, group_size=16)
    weight, back = layer.weight.detach(), rounded.dequantized_weight()
    assert torch.equal(back[weight == 0], torch.zeros((weight == 0).sum()))
    scale = rounded.scales.float().repeat_interleave(16, dim=1)
    # half a step; the zero is a whole step, which may cost the ends of a range half a step more; scales are bfloat16
    assert ((back - weight).abs() <= scale * (1 + 15 * 2**-8)).all()
    assert ((back - weight).abs() <= 0.51 * scale).float().mean() > 0.95
    x = torch.randn(3, 2, 64)
    torch.testing.assert_close(rounded(x), nn.functional.linear(x, back, layer.bias), rtol=1e-5, atol=1e-5)


def test_a_weight_takes_four_bits_and_its_share_of_a_group() -> None:
    layer = Int4Linear.from_linear(nn.Linear(128, 64, bias=False), group_size=64)
    assert sum(b.nbytes for b in layer.buffers()) * 8 / (128 * 64) == 4 + 32 / 64


def test_gradients_flow_to_inputs() -> None:
    layer = Int4Linear.from_linear(nn.Linear(8, 4, dtype=torch.float64), group_size=4)
    assert torch.autograd.gradcheck(layer, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
    assert layer(torch.ones(0, 8, dtype=torch.float64)).shape == (0, 4)


def naive_gptq(layer: nn.Linear, moments: Tensor, group_size: int, damping: float) -> Tensor:
    """Optimal brain quantization in a fixed order: after each weight the inverse of what is left is formed anew."""
    made = Int4Linear.like(layer, group_size=group_size)
    weight = layer.weight.detach().double().clone()
    damped = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(len(moments))
    codes = torch.zeros_like(weight)
    for i in range(layer.in_features):
        group = slice(i // group_size, i // group_size + 1)
        if i % group_size == 0:
            made.set_ranges(weight[:, i : i + group_size].float(), group)
        inverse = torch.linalg.inv(damped[i:, i:])
        scale, zero = made.scales[:, group].double(), made.zeros[:, group].double()
        codes[:, i] = (weight[:, i] / scale[:, 0] + zero[:, 0]).round().clamp(0, 15)
        error = weight[:, i] - (codes[:, i] - zero[:, 0]) * scale[:, 0]
        weight[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("bias", [True, False])
def test_a_rounded_layer_may_change_its_dtype(bias: bool) -> None:
    layer = Int4Linear.from_linear(nn.Linear(64, 8, bias=bias)).to(torch.bfloat16)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == layer.dtype == torch.bfloat16


def test_gptq_is_optimal_brain_quantization_in_order() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10), torch.randn(200, 24) @ torch.randn(24, 24)
    made = gptq_linear(layer, x.T @ x, group_size=8, damping=0.01)
    expected = Int4Linear.like(layer, group_size=8)
    expected.set_codes(naive_gptq(layer, x.T @ x, 8, 0.01))
    same = (made.packed == expected.packed).float().mean()
    assert same > 0.98  # a weight halfway between steps may round either way in float32, and what follows moves with it


def test_gptq_errs_less_than_rounding_on_real_activations() -> None:
    """The bundled model's own weights, and activations of held-out text that calibration never saw."""
    model, text = load_bundled("base").float().eval(), load_text()
    calibration = [text.train[i * 5000 : i * 5000 + 512].long().view(4, 128) for i in range(8)]
    held_out = text.test[:1024].long().view(8, 128)
    with torch.no_grad():
        exact = model(held_out)
        errors = [
            ((transform(model)(held_out) - exact).norm() / exact.norm()).item()
            for transform in (QuantizeInt4(group_size=64), GPTQ(calibration, group_size=64))
        ]
    assert errors[1] < 0.9 * errors[0]


def test_smoothed_models_answer_the_same_and_int8_errs_less_on_outliers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    inputs = torch.randn(256, 64)
    inputs[:, 7] *= 100  # as large models' activations have
    smooth = SmoothQuant([inputs])
    smoothed = smooth(model)
    with torch.no_grad():
        exact = model(inputs)
        torch.testing.assert_close(smoothed(inputs), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(smooth.undo(smoothed)(inputs), exact, rtol=1e-4, atol=1e-4)
        chained = Chain(smooth, QuantizeInt8())(model)
        errors = [(rounded(inputs) - exact).norm().item() for rounded in (QuantizeInt8()(model), chained)]
    assert isinstance(smoothed[0], ScaledLinear) and isinstance(chained[0], Int8Linear)
    assert type(smooth.undo(smoothed)[0]) is nn.Linear
    assert errors[1] < 0.5 * errors[0]
    scale = inputs.abs().amax(0) ** 0.5 / model[0].weight.abs().amax(0) ** 0.5
    torch.testing.assert_close(smoothed[0].input_scale, scale.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizeInt4(group_size=8),
        lambda: GPTQ([TOKENS], group_size=8),
        lambda: SmoothQuant([TOKENS]),
        lambda: Chain(SmoothQuant([TOKENS]), QuantizeInt8(calibration=[TOKENS])),
    ],
)
def test_saved_and_read_back_outputs_are_equal_and_the_original_untouched(
    make: Callable[[], ModelTransform], tmp_path: Path
) -> None:
    model, transform = encoder(), make()
    with torch.no_grad():
        before, rounded = model(TOKENS), transform(model)
        assert torch.equal(model(TOKENS), before)
        save_treated(rounded, tmp_path / "model.safetensors")
        read = load_treated(tmp_path / "model.safetensors", encoder(1), transform)
        assert torch.equal(read(TOKENS), rounded(TOKENS))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantizeInt4(group_size=5)(encoder()), r"got 5 for .* of 16. Choose from 2, 4, 8, 16"),
        (lambda: GPTQ([TOKENS], group_size=6)(encoder()), r"group_size must divide"),
        (lambda: QuantizeInt4(group_size=3)(nn.Sequential(nn.Linear(3, 3))), "inputs must be even"),
        (lambda: GPTQ([], group_size=8)(encoder()), "calibration must be a sequence"),
        (lambda: GPTQ([TOKENS], damping=0), "damping"),
        (lambda: SmoothQuant([TOKENS], alpha=1.5), "alpha"),
        (lambda: SmoothQuant([torch.full((1, 4), float("inf"))])(nn.Sequential(nn.Linear(4, 4))), "must be finite"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


def test_rounded_models_are_not_rounded_again() -> None:
    rounded = QuantizeInt4(group_size=8)(encoder())
    for transform in (QuantizeInt8(), SmoothQuant([TOKENS]), GPTQ([TOKENS], group_size=8)):
        with pytest.raises(CombinationError, match="makes no sense on .* Int4Linear"):
            transform(rounded)
