"""Texts that a model does not know are told of, and those that it knows are not."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.foreign import caution_about
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.diagnose import begin


@pytest.fixture
def subject() -> Subject:
    return load_subject(bundled("draft"))


class HalfUnknown:
    """A tokenizer of bytes that knows every second one."""

    unk_token_id = 3

    def __call__(self, text: str, truncation: bool, max_length: int) -> Mapping[str, list[int]]:
        codes = text.encode()[:max_length]
        return {"input_ids": [3 if place % 2 else code for place, code in enumerate(codes)]}


def test_texts_that_it_was_trained_on_go_without_caution(subject: Subject) -> None:
    assert caution_about(Visit(subject, machines_texts())) is None


def test_a_blind_guess_costs_what_is_told_as_chance(subject: Subject) -> None:
    head = subject.model.get_output_embeddings()  # type: ignore[operator]
    nn.init.zeros_(head.weight)
    told = begin(Visit(subject, machines_texts())).caution
    chance = f"{math.log(256):.1f}"
    assert told is not None
    assert f"{chance} nats a token, chance {chance}" in told


def test_tokens_that_the_tokenizer_does_not_know(subject: Subject) -> None:
    told = caution_about(Visit(Subject("half", "causal", subject.model, HalfUnknown()), machines_texts()))
    assert told is not None
    assert "does not know 50% of these texts" in told


def test_what_cannot_be_read_is_left_to_the_check_ups_to_tell(subject: Subject) -> None:
    assert begin(Visit(subject, Material("own", texts=("short",), own=True))).caution is None
    assert torch.is_grad_enabled()
