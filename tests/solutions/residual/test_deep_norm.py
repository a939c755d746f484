"""DeepNorm against the formula, the weights it adopts and refuses, and how far one step moves a deep stack."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.block import FeedForward, ResidualFactory, TransformerBlock
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.longformer import LongformerAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.post_norm import PostNorm
from transformer_problems.solutions.recurrence.delta_rule import DeltaRule
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.residual.deep_norm import DeepNorm

WIDTH, HEADS, LAYERS = 16, 4, 8


@pytest.mark.parametrize(("num_layers", "alpha", "beta"), [(8, 2.0, 8**-0.5), (128, 4.0, 2**-2.5), (2, 2**0.5, 0.5)])
def test_the_factors_are_those_of_the_paper(num_layers: int, alpha: float, beta: float) -> None:
    residual = DeepNorm(WIDTH, num_layers=num_layers)
    assert (residual.alpha, residual.beta) == pytest.approx((alpha, beta), rel=1e-15)  # two float64 roundings


@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    residual, linear = DeepNorm(8, num_layers=3, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    for parameter in residual.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent, norm = torch.randn_like(x), residual.norm
    joined = 6**0.25 * x + x @ linear.weight.T + linear.bias
    centred = joined - joined.mean(dim=-1, keepdim=True)
    theirs = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    ours, inputs = residual(x, linear), (x, linear.weight, *residual.parameters())
    # float64 sums of up to 202 terms
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


def adopted(sublayer: nn.Module) -> set[str]:
    """Names of the parameters that a DeepNorm multiplied by its beta; all others must be as they were."""
    before = {name: parameter.clone() for name, parameter in sublayer.named_parameters()}
    residual = DeepNorm(WIDTH, num_layers=LAYERS)
    residual.adopt(sublayer)
    scaled = set()
    for name, parameter in sublayer.named_parameters():
        if torch.equal(parameter, before[name] * residual.beta):
            scaled.add(name)
        else:
            assert torch.equal(parameter, before[name]), name
    return scaled


def test_values_outputs_and_feed_forward_weights_are_scaled() -> None:
    assert adopted(SelfAttention(WIDTH, HEADS)) == {"v_proj.weight", "out_proj.weight"}
    assert adopted(SelfAttention(WIDTH, HEADS, num_kv_heads=2, bias=True)) == {
        f"{name}.{part}" for name in ("v_proj", "out_proj") for part in ("weight", "bias")
    }
    assert adopted(GatedAttention(SelfAttention(WIDTH, HEADS))) == {"attention.v_proj.weight", "out_proj.weight"}
    assert adopted(LongformerAttention(WIDTH, HEADS, window_size=3)) == {
        "v_proj.weight",
        "global_v_proj.weight",
        "out_proj.weight",
    }
    assert adopted(FeedForward(WIDTH)) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert adopted(nn.Linear(WIDTH, WIDTH)) == {"weight", "bias"}


def test_a_layer_has_its_sublayers_adopted_once() -> None:
    def build(residual: ResidualFactory) -> TransformerBlock:
        torch.manual_seed(0)
        return TransformerBlock(WIDTH, SelfAttention(WIDTH, HEADS), residual=residual)

    plain, scaled = build(PostNorm), build(partial(DeepNorm, num_layers=LAYERS))
    kept = ("q_proj", "k_proj", "norm")
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 1.0 if any(part in name for part in kept) else (8 * LAYERS) ** -0.25
        assert torch.equal(after, before * factor), name


@pytest.mark.parametrize("mixer", [Mamba(WIDTH, state_dim=4), DeltaRule(WIDTH, HEADS)])
def test_mixers_without_values_to_scale_are_refused_and_left_alone(mixer: nn.Module) -> None:
    before = [parameter.clone() for parameter in mixer.parameters()]
    name = type(mixer).__name__
    with pytest.raises(CombinationError, match=rf"{name} has 0 and 1 of them\. Use SelfAttention, or another residual"):
        DeepNorm(WIDTH, num_layers=LAYERS).adopt(mixer)
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True))


def test_feed_forward_networks_without_linear_layers_are_refused() -> None:
    for sublayer in (nn.Identity(), torch.tanh):
        with pytest.raises(CombinationError, match="linear layers of a feed-forward network; .* has none"):
            DeepNorm(WIDTH, num_layers=LAYERS).adopt(sublayer)


def test_no_layers_are_refused() -> None:
    for num_layers in (0, 1.5):
        with pytest.raises(ArgumentError, match="num_layers must be"):
            DeepNorm(WIDTH, num_layers=num_layers)  # type: ignore[arg-type]


def test_one_step_moves_a_stack_of_any_depth_alike() -> None:
    """The paper's bound: one step of gradient descent on the matrices changes the output as much in deep stacks."""

    def update(residual: ResidualFactory, num_layers: int) -> float:
        torch.manual_seed(0)
        model = Encoder(64, 32, num_layers, lambda: SelfAttention(32, HEADS, is_causal=False), residual=residual)
        tokens = torch.randint(64, (2, 32))
        optimizer = torch.optim.SGD([p for p in model.body.blocks.parameters() if p.dim() == 2], lr=0.1)
        before: Tensor = model.body(tokens)
        nn.functional.cross_entropy(model.head(before).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        with torch.no_grad():
            return float((model.body(tokens) - before).norm() / before.norm())

    shallow, deep = update(partial(DeepNorm, num_layers=6), 6), update(partial(DeepNorm, num_layers=96), 96)
    # with either factor's exponent off by 1/8, 16 times as many layers would change it by 16 ** (1 / 4) = 2
    assert 1 / 1.4 < deep / shallow < 1.4
    assert update(PostNorm, 24) > 4 * update(PostNorm, 6)
