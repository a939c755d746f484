"""UNetSkips: which layer reads which, by what weights, and inside a stack."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.stack import stack_layers
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.residual.unet_skips import UNetSkips

WIDTH = 8


def build(num_layers: int) -> UNetSkips:
    torch.manual_seed(0)
    skips = UNetSkips(WIDTH, num_layers, dtype=torch.float64)
    for parameter in skips.parameters():
        nn.init.normal_(parameter)
    return skips


def run_u(skips: UNetSkips, layers: list[nn.Linear], x: Tensor) -> Tensor:
    """The paper's figure 1: the first half is kept on a pile, from which the second half takes."""
    half, pile = (len(layers) - 1) // 2, []
    for layer in layers[:half]:
        x = layer(x)
        pile.append(x)
    for layer in layers[half : len(layers) - half]:
        x = layer(x)
    for layer, join in zip(layers[len(layers) - half :], skips.joins, strict=True):
        assert isinstance(join, nn.Linear)
        x = layer(x @ join.weight[:, :WIDTH].T + pile.pop() @ join.weight[:, WIDTH:].T + join.bias)
    return x


@pytest.mark.parametrize("num_layers", [3, 4, 5, 8, 13])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_u_in_outputs_and_gradients(num_layers: int, length: int) -> None:
    skips = build(num_layers)
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(num_layers)]
    x = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    cotangent, history = torch.randn_like(x), [x]
    for layer in layers:
        history.append(layer(skips(history)))
    ours, theirs = history[-1], run_u(skips, layers, x)
    inputs = (x, *skips.parameters())
    # float64 sums of up to 202 terms, in numbers that grow from layer to layer
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("num_layers", [3, 4, 9])
def test_untrained_joins_give_the_mean_of_the_latest_and_the_mirrored_output(num_layers: int) -> None:
    skips = UNetSkips(WIDTH, num_layers)
    history = [torch.randn(2, 5, WIDTH) for _ in range(num_layers)]
    for layer in range(num_layers):
        y, latest = skips(history[: layer + 1]), history[layer]
        if layer > num_layers / 2:
            # float32 sums of 16 terms, all but two of them zero
            torch.testing.assert_close(y, (latest + history[num_layers - layer]) / 2, atol=1e-6, rtol=0)
        else:
            assert y is latest


def test_a_stack_brings_early_outputs_back() -> None:
    """Behind a middle layer that forgets everything, the tokens are there again."""
    torch.manual_seed(0)
    layers = stack_layers(WIDTH, 3, lambda: SelfAttention(WIDTH, 2, is_causal=False), is_causal=False)
    layers[1].forward = lambda x, **_: torch.zeros_like(x)  # type: ignore[method-assign]
    x, arguments = torch.randn(2, 5, WIDTH), {"key_mask": None, "positions": torch.arange(5)}
    forgotten = layers(x, **arguments)
    assert torch.equal(forgotten, forgotten[:1, :1].expand_as(forgotten))
    brought_back = layers(x, skips=UNetSkips(WIDTH, 3), **arguments)
    torch.testing.assert_close(brought_back, layers[2](layers[0](x, **arguments) / 2, **arguments))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_stacks_without_a_middle_are_refused(num_layers: int) -> None:
    with pytest.raises(ArgumentError, match=f"num_layers must be 3 or more; got {num_layers}"):
        UNetSkips(WIDTH, num_layers)


def test_sizes_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be positive; got 0"):
        UNetSkips(0, 4)
    with pytest.raises(ArgumentError, match="num_layers must be positive; got -1"):
        UNetSkips(WIDTH, -1)
