"""RandomizedPositions: what is drawn, from which generator, and when it repeats."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_problems.core.errors import SequenceTooLongError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.learned import LearnedPositions
from transformer_problems.solutions.position.randomized import RandomizedPositions

CPU = torch.device("cpu")


@given(num_tokens=st.integers(0, 60), spare=st.integers(0, 300), training=st.booleans())
def test_positions_are_increasing_and_in_range(num_tokens: int, spare: int, training: bool) -> None:
    sample = RandomizedPositions(num_tokens + spare + 1)
    positions = sample(num_tokens, CPU, training=training)
    assert positions.shape == (num_tokens,) and positions.dtype == torch.int64
    assert (positions.diff() > 0).all()
    assert not num_tokens or (positions[0] >= 0 and positions[-1] < sample.max_position)


def test_training_draws_afresh_and_evaluation_repeats() -> None:
    sample = RandomizedPositions(1000, seed=3)
    first, second = (sample(20, CPU, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    fixed = sample(20, CPU, training=False)
    assert torch.equal(fixed, sample(20, CPU, training=False))
    assert torch.equal(fixed, RandomizedPositions(1000, seed=3)(20, CPU, training=False))
    assert not torch.equal(fixed, RandomizedPositions(1000, seed=4)(20, CPU, training=False))


def test_evaluation_does_not_disturb_training() -> None:
    quiet, busy = RandomizedPositions(1000), RandomizedPositions(1000)
    busy(20, CPU, training=False)
    assert torch.equal(quiet(20, CPU, training=True), busy(20, CPU, training=True))


def test_state_dict_resumes_the_draws() -> None:
    sample = RandomizedPositions(1000)
    sample(20, CPU, training=True)
    saved = copy.deepcopy(sample.state_dict())
    expected = sample(20, CPU, training=True)
    resumed = RandomizedPositions(1000, seed=99)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(20, CPU, training=True), expected)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    RandomizedPositions(100)(10, CPU, training=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_position_is_drawn_equally_often() -> None:
    sample, draws = RandomizedPositions(20), 4000
    counts = torch.zeros(20)
    for _ in range(draws):
        counts[sample(5, CPU, training=True)] += 1
    deviation = (draws * 0.25 * 0.75) ** 0.5  # of a count of draws with probability 5 / 20
    assert ((counts - draws / 4).abs() < 5 * deviation).all()


def test_a_decoder_meets_positions_beyond_its_length() -> None:
    def mixer() -> SelfAttention:
        return SelfAttention(8, num_heads=2)

    table = LearnedPositions(500, 8)
    model = Decoder(5, 8, 1, mixer, position=table, sample_positions=RandomizedPositions(500))
    model(torch.zeros(1, 10, dtype=torch.long)).sum().backward()
    assert table.weight.grad is not None
    touched = table.weight.grad.abs().sum(-1).nonzero()
    assert touched.numel() == 10 and touched.max() > 10


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(SequenceTooLongError, match="num_tokens must be at most max_position=9; got 10"):
        RandomizedPositions(9)(10, CPU, training=True)
