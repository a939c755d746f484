"""PreNorm against the formula and PyTorch's own layer with the same weights."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.models.block import TransformerBlock
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm

LENGTHS = [1, 63, 64, 100, 101]
QKV = [f"mixer.{name}_proj.{part}" for part in ("weight", "bias") for name in "qkv"]
PARTS = ("mixer.out_proj", "feed_forward.up", "feed_forward.down", "mixer_residual.norm", "feed_forward_residual.norm")
ORDER = [f"{part}.{name}" for part in PARTS for name in ("weight", "bias")]  # as in PyTorch's layer, behind q, k and v


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    residual, linear = PreNorm(8, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    for parameter in residual.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent, norm = torch.randn_like(x), residual.norm
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    ours, theirs = residual(x, linear), x + normed @ linear.weight.T + linear.bias
    inputs = (x, linear.weight, *residual.parameters())
    # float64 sums of up to 202 terms
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


def test_another_norm_may_be_chosen() -> None:
    torch.manual_seed(0)
    residual, x = PreNorm(8, norm=nn.RMSNorm, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    size = (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    torch.testing.assert_close(residual(x, torch.tanh), x + (x / size).tanh(), atol=1e-14, rtol=0)  # a few roundings


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_pytorch_with_the_same_weights(length: int) -> None:
    torch.manual_seed(0)
    peer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixer = SelfAttention(16, 4, is_causal=False, bias=True, dtype=torch.float64)
    block = TransformerBlock(16, mixer, residual=PreNorm, dtype=torch.float64)
    in_weight, in_bias, *others = peer.parameters()
    state = dict(zip(ORDER, others, strict=True))
    for name, weight, bias in zip("qkv", in_weight.chunk(3), in_bias.chunk(3), strict=True):
        state |= {f"mixer.{name}_proj.weight": weight, f"mixer.{name}_proj.bias": bias}
    block.load_state_dict(state)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs, cotangent = block(x), peer(x), torch.randn_like(x)
    own = dict(block.named_parameters())
    ours_grads = torch.autograd.grad((ours * cotangent).sum(), [x, *(own[name] for name in (*QKV, *ORDER))])
    theirs_grads = torch.autograd.grad((theirs * cotangent).sum(), [x, *peer.parameters()])
    packed: list[Tensor] = [ours_grads[0], torch.cat(ours_grads[1:4]), torch.cat(ours_grads[4:7]), *ours_grads[7:]]
    # float64 sums of up to 202 terms, through a softmax of large scores
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(packed, list(theirs_grads), atol=1e-9, rtol=1e-9)
