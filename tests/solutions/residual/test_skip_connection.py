"""SkipConnection against the formula, and what it does to a stack of attention."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.models.stack import stack_layers
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.residual.skip_connection import SkipConnection


@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 8, dtype=torch.float64)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    ours, theirs = SkipConnection(8)(x, linear), x + x @ linear.weight.T + linear.bias
    inputs = (x, linear.weight, linear.bias)
    # float64 sums of up to 202 terms
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_it_has_no_parameters() -> None:
    assert list(SkipConnection(8).parameters()) == []


def test_silent_sublayers_leave_the_stack_as_the_identity() -> None:
    torch.manual_seed(0)
    layers = stack_layers(
        8,
        3,
        lambda: SelfAttention(8, 2, is_causal=False),
        is_causal=False,
        residual=SkipConnection,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if "out_proj" in name or "down" in name:
                parameter.zero_()
    x = torch.randn(2, 5, 8)
    assert torch.equal(layers.float()(x, key_mask=None, positions=torch.arange(5)), x)


def test_tokens_stay_apart_that_attention_alone_makes_alike() -> None:
    """The distance to the mean token, relative to the tokens' size, through 12 layers of attention."""
    torch.manual_seed(0)
    width, skip = 32, SkipConnection(32)
    layers = [SelfAttention(width, 4, is_causal=False) for _ in range(12)]

    def distance(x: Tensor) -> float:
        return float((x - x.mean(dim=1, keepdim=True)).norm() / x.norm())

    start = torch.randn(2, 64, width)
    alone = skipped = start
    with torch.no_grad():
        for layer in layers:
            alone, skipped = layer(alone), skip(skipped, layer)
    assert distance(skipped) > 0.5 * distance(start)
    assert distance(alone) < 1e-3 * distance(start)  # nearly uniform weights keep the mean and little else
