"""FusedSelfAttention is SelfAttention in one call: the same numbers."""

from typing import Any

import pytest
import torch

from transformer_problems import ALiBi, DenseAttention, FlashAttention, SelfAttention, SlidingWindow
from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.kernels.fused_attention import FusedBackend
from transformer_problems.solutions.attention.fused_attention import FusedSelfAttention
from transformer_problems.testing import check_mixer


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 101])
def test_it_is_the_layer_that_it_was_made_from(
    num_tokens: int, is_causal: bool, bias: bool, backend: FusedBackend
) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(48, 3, op=DenseAttention(), is_causal=is_causal, bias=bias, dtype=torch.float64)
    fused = FusedSelfAttention.from_layer(layer, backend=backend)
    x = torch.randn(2, num_tokens, 48, dtype=torch.float64)
    key_mask = torch.rand(2, num_tokens) < 0.7
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = fused(one, key_mask=key_mask), layer(other, key_mask=key_mask)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    parts = torch.cat([part.weight.grad for part in (layer.q_proj, layer.k_proj, layer.v_proj)])
    torch.testing.assert_close(fused.qkv_proj.weight.grad, parts)
    torch.testing.assert_close(fused.out_proj.weight.grad, layer.out_proj.weight.grad)


def test_a_causal_one_keeps_the_contract_of_mixers() -> None:
    check_mixer(lambda: FusedSelfAttention(16, 2, bias=True), embed_dim=16)


def test_what_answers_is_told() -> None:
    x = torch.zeros(1, 4, 8)
    layer = FusedSelfAttention(8, 2)
    assert layer.backend_for(x) == "cpp" and layer.backend_for(x.bfloat16()) == "torch"
    assert FusedSelfAttention(8, 2, backend="torch").backend_for(x) == "torch"
    assert layer.last_run is None
    for given, ran in ((x, "cpp"), (x.bfloat16(), "torch"), (x, "cpp")):
        layer.to(given.dtype)(given)
        assert layer.last_run == ran


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"op": SlidingWindow(8)}, "an op of exact softmax attention to be fused; got SlidingWindow"),
        ({"op": FlashAttention(), "position": ALiBi(4)}, "no position encoding to be fused; got ALiBi"),
        ({"num_kv_heads": 2}, "as many key heads as query heads to be fused; got 2"),
    ],
)
def test_what_cannot_be_fused_is_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(CombinationError, match=f"layer must have {found}"):
        FusedSelfAttention.from_layer(SelfAttention(16, 4, **options))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="layer must be a SelfAttention to be fused; got Linear"):
        FusedSelfAttention.from_layer(torch.nn.Linear(8, 8))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads"):
        FusedSelfAttention(10, 3)
    with pytest.raises(UnknownNameError, match="unknown back end of FusedSelfAttention 'cuda'"):
        FusedSelfAttention(8, 2, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="'cpp' takes float32 and float64 on a CPU"):
        FusedSelfAttention(8, 2, backend="cpp", dtype=torch.bfloat16)(torch.zeros(1, 4, 8, dtype=torch.bfloat16))
