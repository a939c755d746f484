"""TransformerXLRelative against the formula, pair by pair, and against XLNet, which uses the same encoding."""

import math

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative


def scores(encoding: TransformerXLRelative, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    rotated_q, rotated_k = encoding.rotate(q, k, q_positions, k_positions)
    content = rotated_q @ rotated_k.mT * q.shape[-1] ** -0.5
    return content + encoding.bias(q, q_positions, k_positions)


def naive(encoding: TransformerXLRelative, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """The four terms of section 3.3 for one pair and head after another."""
    num_heads, head_dim, width = encoding.num_heads, q.shape[-1], encoding.embed_dim
    out = []
    for head in range(num_heads):
        u, v = encoding.content_bias[head], encoding.position_bias[head]
        projection = encoding.r_proj.weight[head * head_dim : (head + 1) * head_dim]
        for n, i in enumerate(q_positions.tolist()):
            for m, j in enumerate(k_positions.tolist()):
                angles = [(i - j) * 10_000 ** (-2 * f / width) for f in range(width // 2)]
                wave = q.new_tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
                query, key, place = q[:, head, n], k[:, head, m], projection @ wave
                out.append(query @ place + (query * key).sum(-1) + key @ u + v @ place)
    shape = (num_heads, q.shape[2], k.shape[2], q.shape[0])
    return torch.stack(out).view(shape).movedim(-1, 0) * head_dim**-0.5


def test_equals_the_formula_in_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    encoding = TransformerXLRelative(12, 3, dtype=torch.float64)
    q = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    q_positions, k_positions = torch.arange(3, 7), torch.arange(9)  # keys on both sides
    ours = scores(encoding, q, k, q_positions, k_positions)
    theirs = naive(encoding, q, k, q_positions, k_positions)
    weight = torch.randn_like(ours)
    inputs = (q, k, *encoding.parameters())
    # the frequencies are float32: angles below 9 rad are off by 9 * 2^-24, sums of a hundred terms by some more
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), inputs)
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-4, rtol=0)


@pytest.mark.peer
def test_equals_xlnet_in_outputs_and_gradients() -> None:
    from transformers import XLNetConfig, XLNetModel
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    torch.manual_seed(0)
    length, num_heads, head_dim = 13, 2, 4
    width = num_heads * head_dim
    config = XLNetConfig(d_model=width, n_head=num_heads, n_layer=1, d_inner=8, vocab_size=5, dropout=0.0)
    peer = XLNetRelativeAttention(config)
    encoding = TransformerXLRelative(width, num_heads)
    with torch.no_grad():
        peer.r_w_bias.copy_(encoding.content_bias)
        peer.r_r_bias.copy_(encoding.position_bias)
    both = torch.randn(2, 2, num_heads, length, head_dim, requires_grad=True)
    q, k = both
    distances = XLNetModel(config).relative_positional_encoding(length, length)  # [2 * length, 1, C], both directions
    places = (distances @ encoding.r_proj.weight.T).unflatten(-1, (num_heads, head_dim)).expand(-1, 2, -1, -1)
    q_peer, k_peer = (x.permute(2, 0, 1, 3) for x in (q, k))
    _, weights = peer.rel_attn_core(q_peer, k_peer, k_peer, places, output_attentions=True)
    theirs = weights.permute(2, 3, 0, 1)
    positions = torch.arange(length)
    ours = scores(encoding, q, k, positions, positions).softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # float32 sums of some dozen terms
    target = torch.randn_like(ours)
    shared = (both, encoding.r_proj.weight)
    ours_grads = torch.autograd.grad((ours * target).sum(), (*shared, encoding.content_bias, encoding.position_bias))
    theirs_grads = torch.autograd.grad((theirs * target).sum(), (*shared, peer.r_w_bias, peer.r_r_bias))
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-5, rtol=0)


def test_gradcheck() -> None:
    encoding = TransformerXLRelative(4, 2, dtype=torch.float64)
    q, k = torch.randn(2, 1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(3)

    def run(q: Tensor, k: Tensor, *parameters: Tensor) -> Tensor:
        return scores(encoding, q, k, positions, positions)

    assert torch.autograd.gradcheck(run, (q, k, *encoding.parameters()))


def test_width_must_fit_heads_and_pairs() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 10 and 4"):
        TransformerXLRelative(10, 4)
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of 2, .* got 9. Choose 8 or 10"):
        TransformerXLRelative(9, 3)
