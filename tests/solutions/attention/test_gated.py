"""GatedAttention against the formula, around several mixers."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.attention.differential import DifferentialAttention
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.memory.knn_memory import KNNMemoryAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.recurrence.transformer_xl import TransformerXL
from transformer_problems.testing import check_mixer

Granularity = Literal["element", "head"]
GRANULARITIES: list[Granularity] = ["element", "head"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("length", [1, 64, 101])
def test_equals_the_formula(granularity: Granularity, length: int) -> None:
    torch.manual_seed(0)
    gated = GatedAttention(SelfAttention(16, 4), granularity=granularity, bias=True).double()
    attention = gated.attention
    x = torch.randn(2, length, 16, dtype=torch.float64)
    q, k, v = (
        p(x).view(2, length, 4, 4).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    gates = torch.sigmoid(x @ gated.gate_proj.weight.T + gated.gate_proj.bias)
    gates = gates.view(2, length, 4, -1).transpose(1, 2)  # [B, H, N, D] or [B, H, N, 1]
    expected = (heads * gates).transpose(1, 2).reshape(2, length, 16) @ gated.out_proj.weight.T
    torch.testing.assert_close(gated(x), expected)


def test_open_gates_leave_the_attention_as_it_was() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4, is_causal=False).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = attention(x)
    gated = GatedAttention(attention, bias=True)
    with torch.no_grad():
        gated.gate_proj.weight.zero_()
        gated.gate_proj.bias.fill_(40.0)  # 1 - sigmoid(40) is 4e-18, below a float64 step
    torch.testing.assert_close(gated(x), expected)
    with torch.no_grad():
        gated.gate_proj.bias.fill_(-40.0)
    assert gated(x).abs().max() < 1e-15


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_keeps_the_contract(granularity: Granularity) -> None:
    check_mixer(
        GatedAttention(SelfAttention(32, 4, position=RotaryEmbedding(8)), granularity=granularity), embed_dim=32
    )


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "by head": lambda: GatedAttention(DifferentialAttention(32, 2), granularity="head"),
    "without heads": lambda: GatedAttention(Mamba(32, state_dim=4)),
    "with memory": lambda: GatedAttention(TransformerXL(32, 4, segment_len=3, memory_len=4)),
    "with a search": lambda: GatedAttention(KNNMemoryAttention(32, 4, segment_len=3, memory_len=9, num_neighbors=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_gates_other_mixers(name: str) -> None:
    check_mixer(OTHERS[name], embed_dim=32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(GRANULARITIES))
def test_streamed_equals_whole(sizes: list[int], granularity: Granularity) -> None:
    torch.manual_seed(0)
    gated = GatedAttention(SelfAttention(16, 4, num_kv_heads=2), granularity=granularity).double()
    x = torch.randn(2, sum(sizes), 16, dtype=torch.float64)
    state, outputs = gated.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = gated.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), gated(x))


def test_parameters_added() -> None:
    def added(granularity: Granularity) -> int:
        plain, gated = SelfAttention(16, 4), GatedAttention(SelfAttention(16, 4), granularity=granularity)
        return sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())

    assert added("element") == 16 * 16
    assert added("head") == 16 * 4


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(ArgumentError, match="attention must end in a linear out_proj; SelfAttention has Identity"):
        attention = SelfAttention(16, 4)
        GatedAttention(attention)
        GatedAttention(attention)
    with pytest.raises(ArgumentError, match="granularity must be 'element' or 'head'; got 'row'"):
        GatedAttention(SelfAttention(16, 4), granularity="row")
    mamba = Mamba(16, state_dim=4)
    with pytest.raises(ArgumentError, match="granularity 'head' needs an attention with num_heads; Mamba has none"):
        GatedAttention(mamba, granularity="head")
    GatedAttention(mamba)  # which was left as it was
