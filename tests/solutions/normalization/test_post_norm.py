"""PostNorm against the formula, and PyTorch's own layer and BERT's with the same weights."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.models.block import TransformerBlock
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.post_norm import PostNorm

LENGTHS = [1, 63, 64, 100, 101]
QKV = [f"mixer.{name}_proj.{part}" for part in ("weight", "bias") for name in "qkv"]
PARTS = ("mixer.out_proj", "feed_forward.up", "feed_forward.down", "mixer_residual.norm", "feed_forward_residual.norm")
ORDER = [f"{part}.{name}" for part in PARTS for name in ("weight", "bias")]  # as in PyTorch's layer, behind q, k and v
BERT_PARTS = (
    "mixer.q_proj",
    "mixer.k_proj",
    "mixer.v_proj",
    "mixer.out_proj",
    "mixer_residual.norm",
    "feed_forward.up",
    "feed_forward.down",
    "feed_forward_residual.norm",
)
BERT_ORDER = [f"{part}.{name}" for part in BERT_PARTS for name in ("weight", "bias")]


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    residual, linear = PostNorm(8, dtype=torch.float64), nn.Linear(8, 8, dtype=torch.float64)
    for parameter in residual.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    cotangent, norm = torch.randn_like(x), residual.norm
    joined = x + x @ linear.weight.T + linear.bias
    centred = joined - joined.mean(dim=-1, keepdim=True)
    theirs = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    ours, inputs = residual(x, linear), (x, linear.weight, *residual.parameters())
    # float64 sums of up to 202 terms
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


def test_another_norm_may_be_chosen() -> None:
    torch.manual_seed(0)
    residual, x = PostNorm(8, norm=nn.RMSNorm, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    joined = x + x.tanh()
    size = (joined.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    torch.testing.assert_close(residual(x, torch.tanh), joined / size, atol=1e-14, rtol=0)  # a few roundings


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_pytorch_with_the_same_weights(length: int) -> None:
    torch.manual_seed(0)
    peer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=False, dtype=torch.float64
    )
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixer = SelfAttention(16, 4, is_causal=False, bias=True, dtype=torch.float64)
    block = TransformerBlock(16, mixer, residual=PostNorm, dtype=torch.float64)
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


@pytest.mark.peer
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_layer_of_bert_with_the_same_weights(length: int) -> None:
    pytest.importorskip("transformers")
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=64)
    config._attn_implementation = "eager"
    peer = BertLayer(config).double().eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixer = SelfAttention(16, 4, is_causal=False, bias=True)
    residual = partial(PostNorm, norm=partial(nn.LayerNorm, eps=config.layer_norm_eps))
    block = TransformerBlock(16, mixer, residual=residual).double()
    theirs = list(peer.parameters())
    block.load_state_dict(dict(zip(BERT_ORDER, theirs, strict=True)))
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    ours, y, cotangent, own = block(x), peer(x), torch.randn_like(x), dict(block.named_parameters())
    gradients = [
        torch.autograd.grad((ours * cotangent).sum(), [x, *(own[name] for name in BERT_ORDER)]),
        torch.autograd.grad((y * cotangent).sum(), [x, *theirs]),
    ]
    # float64 sums of up to 202 terms, through a softmax of large scores
    torch.testing.assert_close(ours, y, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)
