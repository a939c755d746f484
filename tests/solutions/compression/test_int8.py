"""int8 layers are within their rounding of the floats, a quarter of the size, and come back from disk as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import load_bundled
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import Chain, stored_bytes
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.kernels.int8_product import Int8Backend, int8_backends
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int8 import Int8Linear, QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_err_by_no_more_than_the_steps(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 33, bias=bias, dtype=dtype)
    rounded = Int8Linear.from_linear(layer)
    x = torch.randn(2, 5, 100, dtype=dtype)
    with torch.no_grad():
        y, exact = rounded(x), layer.double()(x.double())
    assert y.dtype == dtype and y.shape == (2, 5, 33)
    weight = layer.weight.double()
    assert (rounded.dequantized_weight() - weight).abs().max() <= rounded.scales.max() * 0.501
    # half a step of the weight times every input, half a step of the input times every weight, and their product
    half_w, half_x = rounded.scales.double() / 2, x.double().abs().amax(-1, keepdim=True) / 254
    limit = x.double().abs().sum(-1, keepdim=True) * half_w + half_x * weight.abs().sum(1) + 100 * half_x * half_w
    assert ((y.double() - exact).abs() <= limit + 2 * torch.finfo(dtype).eps * exact.abs()).all()


def test_static_scales_reach_what_calibration_met() -> None:
    layer = nn.Linear(8, 4)
    static = QuantizeInt8(calibration=[torch.full((1, 8), 2.0), torch.full((3, 8), -5.0)])(nn.Sequential(layer))[0]
    assert static.x_scale == pytest.approx(5 / 127)
    with torch.no_grad():
        inside, beyond = static(torch.full((1, 8), 5.0)), static(torch.full((1, 8), 50.0))
    assert torch.equal(inside, beyond)  # what is larger is cut off


def test_a_model_is_a_quarter_of_its_size_and_answers_nearly_the_same() -> None:
    model = load_bundled("base").float().eval()
    rounded = QuantizeInt8()(model)
    linears = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    outputs = sum(part.out_features for part in model.modules() if isinstance(part, nn.Linear))
    assert stored_bytes(model) - stored_bytes(rounded) == 3 * linears - 4 * outputs
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = rounded(tokens), model(tokens)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.1


@pytest.mark.parametrize("transform", [QuantizeInt8(), QuantizeInt8(calibration=[TOKENS])])
def test_saved_and_read_back_outputs_are_equal_and_the_original_untouched(
    transform: QuantizeInt8, tmp_path: Path
) -> None:
    model = encoder()
    with torch.no_grad():
        before, rounded = model(TOKENS), transform(model)
        after = rounded(TOKENS)
        assert torch.equal(model(TOKENS), before)
        save_treated(rounded, tmp_path / "model.safetensors")
        assert torch.equal(load_treated(tmp_path / "model.safetensors", encoder(1), transform)(TOKENS), after)
        read = transform(encoder(1))
        read(TOKENS)  # what it remembers of its codes must go when others are loaded
        read.load_state_dict(rounded.state_dict())
        assert torch.equal(read(TOKENS), after)


@pytest.mark.parametrize("backend", ["auto", *int8_backends("cpu")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_rounded_model_may_change_its_dtype(dtype: torch.dtype, backend: Int8Backend) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(100, 33), torch.randn(3, 100)
    rounded = Int8Linear.from_linear(layer, backend=backend)
    with torch.no_grad():
        before, after = rounded(x.to(dtype)), rounded.to(dtype)(x.to(dtype))
    assert after.dtype == dtype
    # the scale and the bias of an output are rounded to the dtype, and so is the output
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert ((after - before).abs() <= 2 * eps * (before.abs() + layer.bias.abs() + 1)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("largest_input", [None, 2.0])
def test_what_is_not_a_number_in_a_row_spoils_it_and_no_other(value: float, largest_input: float | None) -> None:
    layer = Int8Linear.from_linear(nn.Linear(8, 4), largest_input=largest_input)
    x = torch.ones(2, 8)
    x[0, 3] = value
    y = layer(x)
    assert y[1].isfinite().all()
    if largest_input is None or value != value:  # a given scale cuts what is too large
        assert not y[0].isfinite().any()


def test_a_compiled_model_keeps_the_product_whole() -> None:
    model = QuantizeInt8()(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_model_of_transformers_is_rounded_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    rounded = QuantizeInt8(skip=["pooler.*"])(model)
    assert sum(isinstance(part, Int8Linear) for part in rounded.modules()) == 12
    assert isinstance(rounded.pooler.dense, nn.Linear)
    with torch.inference_mode():
        ours, theirs = rounded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state
    # steps of 1/254 of the largest, in a few layers one after the other
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02


def test_backends_can_be_named_and_asked() -> None:
    layer = QuantizeInt8(backend="float")(nn.Sequential(nn.Linear(8, 4)))[0]
    assert layer.backend_for(3) == "float"
    assert Int8Linear.from_linear(nn.Linear(8, 4)).backend_for(1) in ("cpp", "int_mm", "float")


def test_pruned_models_can_be_rounded_and_rounded_ones_no_more() -> None:
    chained = Chain(MagnitudePruning(0.5), QuantizeInt8())(encoder())
    assert sum(isinstance(part, Int8Linear) for part in chained.modules()) == 13
    for transform in (QuantizeInt8(), MagnitudePruning(0.5)):
        with pytest.raises(CombinationError, match="makes no sense on .* Int8Linear"):
            transform(chained)


class Idle(nn.Module):
    """A layer that is called, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("transform", "make", "message"),
    [
        (QuantizeInt8(calibration=[]), Idle, "calibration must be a sequence of one or more"),
        (QuantizeInt8(calibration=[torch.ones(1, 4)]), Idle, r"idle met no input. Pass skip=\('idle',\)"),
        (QuantizeInt8(calibration=[torch.full((1, 4), torch.nan)], skip=["idle"]), Idle, "what reaches used is not"),
        (QuantizeInt8(skip=["head"]), Idle, "unknown layer to skip 'head'. Nearest: used."),
        (QuantizeInt8(), lambda: nn.LayerNorm(4), "model must hold a torch.nn.Linear"),
    ],
)
def test_models_and_calibrations_that_make_no_sense_are_refused_and_left_alone(
    transform: QuantizeInt8, make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        transform(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_inputs_that_ask_for_a_gradient_are_refused_and_empty_ones_answered() -> None:
    with pytest.raises(ArgumentError, match="x must not ask for a gradient"):
        Int8Linear(4, 4)(torch.ones(1, 4, requires_grad=True))
    assert Int8Linear(4, 3)(torch.ones(0, 2, 4)).shape == (0, 2, 3)
