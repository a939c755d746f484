"""DenseSkips against the weighted average, and the plain stack that an untrained one is."""

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.residual.dense_skips import DenseSkips


@pytest.mark.parametrize("num_layers", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_weighted_average_in_outputs_and_gradients(num_layers: int, length: int) -> None:
    torch.manual_seed(0)
    skips = DenseSkips(num_layers, dtype=torch.float64)
    for parameter in skips.parameters():
        nn.init.normal_(parameter)
    history = [torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(num_layers)]
    for layer in range(num_layers):
        ours = skips(history[: layer + 1])
        if layer == 0:
            assert ours is history[0]
            continue
        weights = skips.weights[layer - 1]
        theirs = torch.einsum("j,jbnc->bnc", weights, torch.stack(history[: layer + 1]))
        cotangent, inputs = torch.randn_like(ours), (weights, *history[: layer + 1])
        # float64 sums of up to 808 terms
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
        gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_an_untrained_stack_is_the_plain_one() -> None:
    def build(skips: DenseSkips | None) -> Decoder:
        torch.manual_seed(0)
        return Decoder(11, 8, 6, lambda: SelfAttention(8, 2), skips=skips)

    tokens = torch.arange(10)[None]
    assert torch.equal(build(DenseSkips(6))(tokens), build(None)(tokens))


@pytest.mark.parametrize(("num_layers", "num_parameters"), [(1, 0), (2, 2), (12, 77)])
def test_it_has_a_weight_for_each_pair_of_layers(num_layers: int, num_parameters: int) -> None:
    assert sum(p.numel() for p in DenseSkips(num_layers).parameters()) == num_parameters


def test_sums_of_narrow_numbers_are_wide() -> None:
    """In float16, 2048 + 1 is 2048: two small terms count only where they are added in float32."""
    skips = DenseSkips(3, dtype=torch.float16)
    nn.init.ones_(skips.weights[1])
    history = [torch.full((1, 1, 1), value, dtype=torch.float16) for value in (2048.0, 1.0, 1.0)]
    assert skips(history).item() == 2050.0


def test_no_layers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_layers must be positive; got 0"):
        DenseSkips(0)
