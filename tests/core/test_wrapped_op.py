"""A wrapper says of itself what the op inside says, streams where that streams, and refuses what that refuses."""

import copy

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import PositionBias, streams_itself
from transformer_problems.core.wrapped_op import WrappedOp
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.position.alibi import ALiBi

DEFAULTS = {
    "accepts_bias": True,
    "accepts_causal": True,
    "num_heads": None,
    "head_dim": None,
    "lookback": None,
    "num_sinks": 0,
    "ignores_norms": False,
}


class Deaf(DenseAttention):
    ignores_norms = True


class Through(WrappedOp):
    """Changes nothing."""

    def forward(self, q, k, v, *, bias: PositionBias | None = None, mask=None, is_causal=False):
        return self.op(q, k, v, bias=bias, mask=mask, is_causal=is_causal)

    def stream(self, q, k, v, state):
        return self._streaming_op.stream(q, k, v, state)


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (DenseAttention(), {}),
        (lambda q, k, v, **options: v, {}),
        (SlidingWindow(3, dilation=(1, 2)), {"lookback": 6, "num_heads": 2}),
        (AttentionSinks(5, num_sinks=2), {"lookback": 5, "num_sinks": 2}),
        (Linformer(9, 3, num_heads=2), {"accepts_bias": False, "accepts_causal": False, "num_heads": 2}),
        (Performer(4), {"accepts_bias": False, "head_dim": 4}),
        (Deaf(), {"ignores_norms": True}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_says_what_the_op_inside_says(op, said: dict[str, object]) -> None:
    for wrapper in (Through(op), Through(Through(op))):
        assert {name: getattr(wrapper, name) for name in DEFAULTS} == {**DEFAULTS, **said}


def test_it_streams_itself_where_the_op_inside_does() -> None:
    assert not streams_itself(Through(DenseAttention()))
    assert streams_itself(Through(Performer(4)))
    assert streams_itself(copy.deepcopy(Through(Through(Performer(4)))))


def test_a_layer_refuses_what_the_op_inside_would_not_take() -> None:
    with pytest.raises(CombinationError, match="ALiBi adds a bias to the scores, which Through never forms"):
        SelfAttention(16, 4, op=Through(Performer(4)), position=ALiBi(4))
    with pytest.raises(CombinationError, match="Through is built for num_heads=2, but its place here has num_heads=4"):
        SelfAttention(16, 4, op=Through(DenseAttention(), num_heads=2))
    with pytest.raises(CombinationError, match="Through keeps a state of its own and would never use a cache"):
        SelfAttention(16, 4, op=Through(Performer(4)), cache=lambda batch_size: None)


def test_a_cache_forgets_what_the_op_inside_cannot_see() -> None:
    layer = SelfAttention(16, 4, op=Through(SlidingWindow(3)))
    _, state = layer.stream(torch.randn(1, 20, 16), layer.initial_state(1))
    assert len(state) == 3


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(CombinationError, match=r"DenseAttention is a class, not an instance. Pass DenseAttention\("):
        Through(DenseAttention)
    with pytest.raises(ArgumentError, match="num_heads must be positive; got 0"):
        Through(DenseAttention(), num_heads=0)
    with pytest.raises(CombinationError, match="SlidingWindow is built for num_heads=2, but its place here has .*=4"):
        Through(SlidingWindow(3, dilation=(1, 2)), num_heads=4)
