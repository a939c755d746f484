"""T5RelativeBias against Transformers' T5Attention, same weights."""

from typing import Any

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.t5 import T5RelativeBias


def bias(encoding: T5RelativeBias, num_queries: int, num_keys: int) -> torch.Tensor:
    """The queries are the last of the keys."""
    q = torch.empty(1, encoding.weight.shape[1], num_queries, 4)
    return encoding.bias(q, torch.arange(num_keys - num_queries, num_keys), torch.arange(num_keys))


@pytest.mark.peer
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (300, 300), (3, 101)])
def test_equals_transformers_in_outputs_and_gradients(
    is_causal: bool, num_buckets: int, max_distance: int, num_queries: int, num_keys: int
) -> None:
    peer = peer_attention(is_causal, num_buckets, max_distance).double()
    encoding = T5RelativeBias(3, num_buckets=num_buckets, max_distance=max_distance, is_causal=is_causal).double()
    with torch.no_grad():
        encoding.weight.copy_(peer.relative_attention_bias.weight)
    ours = bias(encoding, num_queries, num_keys)
    theirs = peer.compute_bias(num_queries, num_keys, past_seen_tokens=num_keys - num_queries)[0]
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    (mine,) = torch.autograd.grad((ours * weight).sum(), encoding.weight)
    (other,) = torch.autograd.grad((theirs * weight).sum(), peer.relative_attention_bias.weight)
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=0)  # float64 sums of up to 90,000 terms in any order


def peer_attention(is_causal: bool, num_buckets: int, max_distance: int) -> Any:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        num_heads=3,
        is_decoder=is_causal,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0)


def test_near_keys_have_buckets_of_their_own_and_far_ones_share() -> None:
    row = bias(T5RelativeBias(1), 1, 1000)[0, 0]  # from the farthest to the query itself
    assert row[-16:].unique().numel() == 16
    assert row[: 1000 - 128].unique().numel() == 1


def test_gradcheck() -> None:
    encoding = T5RelativeBias(2, num_buckets=4, max_distance=5, is_causal=False, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight: bias(encoding, 4, 6), (encoding.weight,))


def test_wrong_buckets_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_buckets must be a multiple of 4, .* got 6. Choose 4 or 8"):
        T5RelativeBias(2, num_buckets=6, is_causal=False)
    with pytest.raises(
        ArgumentError, match="max_distance must exceed the 16 distances with a bucket of their own; got 16"
    ):
        T5RelativeBias(2, max_distance=16)
    with pytest.raises(ArgumentError, match="max_distance must be a positive whole number; got '128'"):
        T5RelativeBias(2, max_distance="128")  # type: ignore[arg-type]
