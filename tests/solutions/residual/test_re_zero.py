"""ReZero against the formula, and the identity that an untrained stack is."""

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.stack import TransformerLayers, stack_layers
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.residual.re_zero import ReZero


def build(num_layers: int) -> TransformerLayers:
    torch.manual_seed(0)
    return stack_layers(8, num_layers, lambda: SelfAttention(8, 2), is_causal=True, residual=ReZero)


@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    residual, linear = ReZero(8, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    nn.init.constant_(residual.alpha, 0.3)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    ours, theirs = residual(x, linear), x + residual.alpha * (x @ linear.weight.T + linear.bias)
    inputs = (x, linear.weight, residual.alpha)
    # float64 sums of up to 1,616 terms
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 24])
def test_an_untrained_stack_is_the_identity(num_layers: int) -> None:
    layers, x = build(num_layers), torch.randn(2, 9, 8)
    assert torch.equal(layers(x, key_mask=None, positions=torch.arange(9)), x)


def test_the_first_step_teaches_the_factors_alone_and_the_second_all() -> None:
    layers, x = build(3), torch.randn(2, 9, 8)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)

    def learning() -> set[str]:
        optimizer.zero_grad()
        layers(x, key_mask=None, positions=torch.arange(9)).square().mean().backward()
        return {name for name, p in layers.named_parameters() if p.grad is not None and bool(p.grad.any())}

    names = {name for name, _ in layers.named_parameters()}
    assert learning() == {name for name in names if name.endswith("alpha")}
    optimizer.step()
    assert learning() == names


def test_no_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be positive; got 0"):
        ReZero(0)
