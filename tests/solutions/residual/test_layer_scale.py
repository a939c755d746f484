"""LayerScale against the formula, PreNorm, and the layer of transformers' DINOv2."""

from functools import partial

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.block import TransformerBlock
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.residual.layer_scale import LayerScale

LENGTHS = [1, 63, 64, 100, 101]
PARTS = {  # of a block, in the order of DINOv2's layer, and their parameters
    "mixer_residual.norm": ("weight", "bias"),
    "mixer.q_proj": ("weight", "bias"),
    "mixer.k_proj": ("weight", "bias"),
    "mixer.v_proj": ("weight", "bias"),
    "mixer.out_proj": ("weight", "bias"),
    "mixer_residual": ("gamma",),
    "feed_forward_residual.norm": ("weight", "bias"),
    "feed_forward.up": ("weight", "bias"),
    "feed_forward.down": ("weight", "bias"),
    "feed_forward_residual": ("gamma",),
}
ORDER = [f"{part}.{parameter}" for part, parameters in PARTS.items() for parameter in parameters]


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    residual, linear = LayerScale(8, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    for parameter in residual.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent, norm = torch.randn_like(x), residual.norm
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    ours, theirs = residual(x, linear), x + residual.gamma * (normed @ linear.weight.T + linear.bias)
    inputs = (x, linear.weight, *residual.parameters())
    # float64 sums of up to 202 terms
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


@pytest.mark.peer
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_with_the_same_weights(length: int) -> None:
    pytest.importorskip("transformers")
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_attention_heads=4, mlp_ratio=4, layerscale_value=0.1)
    config._attn_implementation = "eager"
    peer = Dinov2Layer(config).double().eval()
    block = TransformerBlock(
        16,
        SelfAttention(16, 4, is_causal=False, bias=True),
        residual=partial(LayerScale, norm=partial(nn.LayerNorm, eps=config.layer_norm_eps)),
    ).double()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.5)
    own, theirs = dict(block.named_parameters()), list(peer.parameters())
    block.load_state_dict(dict(zip(ORDER, theirs, strict=True)))
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    ours, y, cotangent = block(x), peer(x), torch.randn_like(x)
    gradients = [
        torch.autograd.grad((ours * cotangent).sum(), [x, *(own[name] for name in ORDER)]),
        torch.autograd.grad((y * cotangent).sum(), [x, *theirs]),
    ]
    # float64 sums of up to 202 terms, through a softmax of large scores
    torch.testing.assert_close(ours, y, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_it_starts_as_pre_norm_with_the_sublayer_made_smaller() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    scaled, plain = LayerScale(8, initial=1e-3, dtype=torch.float64), PreNorm(8, dtype=torch.float64)
    torch.testing.assert_close(scaled(x, linear) - x, 1e-3 * (plain(x, linear) - x), atol=1e-15, rtol=0)  # of order 1


@pytest.mark.parametrize("initial", [0.0, -0.1, float("nan")])
def test_factors_that_are_not_positive_are_refused(initial: float) -> None:
    with pytest.raises(ArgumentError, match="initial must be positive"):
        LayerScale(8, initial=initial)


def test_no_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be positive; got 0"):
        LayerScale(0)
