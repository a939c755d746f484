"""DifferentialAttention against the formula; what it shares with plain attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.differential import DifferentialAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.testing import check_mixer


def naive(layer: DifferentialAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Head by head, map by map."""
    length, d = x.shape[1], layer.head_dim
    lam = (layer.lambda_q[0] @ layer.lambda_k[0]).exp() - (layer.lambda_q[1] @ layer.lambda_k[1]).exp()
    lam = lam + layer.lambda_init
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if layer.is_causal else allowed
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, :]
    heads = []
    for h in range(layer.num_heads):
        g = h // (layer.num_heads // layer.num_kv_heads)
        q, k, v = (
            p(x)[..., i * 2 * d : (i + 1) * 2 * d] for p, i in ((layer.q_proj, h), (layer.k_proj, g), (layer.v_proj, g))
        )
        maps = []
        for part in (slice(0, d), slice(d, 2 * d)):
            q_map, k_map = q[..., part], k[..., part]
            if layer.position is not None:
                positions = torch.arange(length)
                q_map, k_map = (
                    t.squeeze(1) for t in layer.position.rotate(q_map[:, None], k_map[:, None], positions, positions)
                )
            scores = q_map @ k_map.transpose(1, 2) / math.sqrt(d)
            maps.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1))
        y = (maps[0] - lam * maps[1]) @ v
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.head_norm.weight
        heads.append(y * (1 - layer.lambda_init))
    return torch.cat(heads, -1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 64, 101])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_equals_the_formula(length: int, is_causal: bool, rotary: bool) -> None:
    torch.manual_seed(0)
    position = RotaryEmbedding(4) if rotary else None
    layer = DifferentialAttention(32, 4, num_kv_heads=2, layer_index=3, position=position, is_causal=is_causal).double()
    torch.nn.init.normal_(layer.head_norm.weight)
    x = torch.randn(2, length, 32, dtype=torch.float64)
    key_mask = torch.ones(2, length, dtype=torch.bool)
    key_mask[1, length // 2 + 1 :] = False
    torch.testing.assert_close(layer(x), naive(layer, x))
    torch.testing.assert_close(layer(x, key_mask=key_mask), naive(layer, x, key_mask))


def test_gradcheck_of_inputs_and_lambdas() -> None:
    torch.manual_seed(0)
    layer = DifferentialAttention(8, 2, layer_index=2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, lambda_q: Tensor, lambda_k: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lambda_q": lambda_q, "lambda_k": lambda_k}, (x,))

    lambdas = (layer.lambda_q.detach().requires_grad_(), layer.lambda_k.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, (x, *lambdas))


@pytest.mark.parametrize("position", [None, RotaryEmbedding(8), ALiBi(2)], ids=["none", "rotary", "alibi"])
def test_keeps_the_contract(position: RotaryEmbedding | ALiBi | None) -> None:
    check_mixer(DifferentialAttention(32, 2, position=position), embed_dim=32)


def test_takes_ops_that_forget() -> None:
    check_mixer(DifferentialAttention(32, 2, op=AttentionSinks(5, num_sinks=2)), embed_dim=32)


def test_bidirectional_keeps_the_contract() -> None:
    check_mixer(DifferentialAttention(32, 2, num_kv_heads=1, is_causal=False), embed_dim=32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_streamed_equals_whole(sizes: list[int]) -> None:
    torch.manual_seed(0)
    layer = DifferentialAttention(16, 2, num_kv_heads=1, position=RotaryEmbedding(4)).double()
    x = torch.randn(2, sum(sizes), 16, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))


def test_equal_maps_cancel() -> None:
    """With lambda 1 and the same two maps nothing is left but what the norm makes of zero."""
    layer = DifferentialAttention(16, 2).double()
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            first, second = projection.weight.view(2, 2, 4, 16).unbind(1)
            second.copy_(first)
        layer.lambda_q.zero_()
    layer.lambda_init = 1.0 - 1e-9
    y = layer(torch.randn(1, 7, 16, dtype=torch.float64))
    assert y.abs().max() < 1e-9


def test_deeper_layers_start_with_a_larger_lambda() -> None:
    layers = [DifferentialAttention(16, 2, layer_index=i) for i in (1, 2, 24)]
    expected = [0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-6.9)]
    assert [layer.lambda_init for layer in layers] == pytest.approx(expected, rel=1e-12)


def test_costs_what_it_says() -> None:
    plain, layer = SelfAttention(32, 4, op=DenseAttention()), DifferentialAttention(32, 2)
    x = torch.randn(1, 50, 32)
    added = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 4 * layer.head_dim + 2 * layer.head_dim  # four lambda vectors and the norm's weight
    states = [m.stream(x, m.initial_state(1))[1] for m in (plain, layer)]
    assert states[0].num_bytes == states[1].num_bytes

    def flops(mixer: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            mixer(x)
        return counter.get_total_flops()

    products = 4 * 50 * 50 * 32  # plain attention's q k^T and weights v
    assert flops(layer) - flops(plain) == products // 2


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"embed_dim must be a multiple of 2 \* num_heads; got 24 and 16"):
        DifferentialAttention(24, 8)
    with pytest.raises(ArgumentError, match="layer_index must be positive; got 0"):
        DifferentialAttention(16, 2, layer_index=0)
