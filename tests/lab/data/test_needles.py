"""Evidence planted in noise decides the class, and nothing else does."""

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.needles import (
    NUM_CLASSES,
    NUM_NEEDLES,
    PAD_TOKEN,
    READ_TOKEN,
    VOCAB_SIZE,
    Needles,
    length_at,
    plant_needles,
)

TEXT = torch.randint(256, (64, 100), generator=generator(0))
FIRST_NEEDLE = READ_TOKEN + 1
WORDS = (VOCAB_SIZE - FIRST_NEEDLE) // NUM_CLASSES


def evidence_of(needles: Needles) -> torch.Tensor:
    return needles.tokens[:, 1:][~needles.noise[:, 1:]].view(len(needles.tokens), -1)


def test_each_example_holds_the_evidence_and_noise_alone() -> None:
    needles = plant_needles(TEXT, generator(1))
    assert needles.tokens.shape == needles.key_mask.shape == needles.noise.shape == (64, 101)
    assert (needles.tokens[:, 0] == READ_TOKEN).all()
    assert not needles.noise[:, 0].any()
    is_evidence = needles.tokens >= FIRST_NEEDLE
    assert (is_evidence.sum(1) == NUM_NEEDLES).all()
    assert torch.equal(needles.noise[:, 1:], ~is_evidence[:, 1:])
    assert torch.equal(needles.key_mask, needles.tokens != PAD_TOKEN)
    is_text = needles.noise & needles.key_mask
    assert torch.equal(needles.tokens[:, 1:][is_text[:, 1:]], TEXT[is_text[:, 1:]])


def test_padding_follows_the_real_tokens_and_varies() -> None:
    key_mask = plant_needles(TEXT, generator(1)).key_mask
    assert torch.equal(key_mask, key_mask.int().cummin(dim=1).values.bool())
    share = (~key_mask).sum(1) / (100 - NUM_NEEDLES)
    assert share.min() >= 0.24  # a quarter, rounded to whole tokens
    assert share.max() <= 0.76
    assert share.unique().numel() > 10


def test_the_answer_is_the_class_with_most_votes() -> None:
    needles = plant_needles(TEXT, generator(1))
    votes = (evidence_of(needles) - FIRST_NEEDLE) // WORDS
    counts = torch.nn.functional.one_hot(votes, NUM_CLASSES).sum(1)
    assert torch.equal(counts.argmax(1), needles.answers)
    assert counts.sort(dim=1, descending=True).values[:, :4].tolist() == [[4, 2, 1, 1]] * 64


def test_texts_of_any_length_get_the_same_evidence() -> None:
    short, long = (plant_needles(TEXT[:, :n], generator(1)) for n in (NUM_NEEDLES, 100))
    assert torch.equal(short.answers, long.answers)
    assert torch.equal(evidence_of(short).sort().values, evidence_of(long).sort().values)
    assert not short.noise.any()


@pytest.mark.parametrize(("share", "length"), [(0.0, 8), (0.5, 16), (0.75, 32), (0.95, 160)])
def test_the_length_makes_room_for_the_noise(share: float, length: int) -> None:
    assert length_at(share) == length


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match="noise_share must be in"):
        length_at(share)


def test_text_without_room_for_the_evidence_is_refused() -> None:
    with pytest.raises(ArgumentError, match="text must have at least 8 tokens"):
        plant_needles(TEXT[:, :7], generator(0))
