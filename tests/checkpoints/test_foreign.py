"""Texts that a model does not know are told or refused, tokens that it does not know are refused."""

import math
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.foreign import caution_about, require_known
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.diagnose import begin, material_for
from transformer_problems.core.errors import ArgumentError, CheckpointError

WORDS = {"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "C": 3, "O": 4, "N": 5}


@pytest.fixture
def writer() -> Subject:
    return load_subject(bundled("draft"))


@pytest.fixture
def chemist() -> Subject:
    """An encoder that knows three atoms."""
    model = tokenizers.models.WordLevel(WORDS, unk_token="[UNK]")
    read = tokenizers.Tokenizer(model)
    read.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=read, **marks)
    settings: Any = {"vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**settings, intermediate_size=8))
    return Subject("chemist", "encoder", bert, tokenizer)


def material(known: int, unknown: int) -> Material:
    return Material("formulas", texts=(" ".join("C" * known + "X" * unknown),) * 20)


def test_texts_that_it_was_trained_on_go_without_caution(writer: Subject) -> None:
    assert caution_about(Visit(writer, machines_texts())) is None


def test_a_blind_guess_costs_what_is_told_as_chance(writer: Subject) -> None:
    head = writer.model.get_output_embeddings()  # type: ignore[operator]
    nn.init.zeros_(head.weight)
    told = begin(Visit(writer, machines_texts())).caution
    chance = f"{math.log(256):.1f}"
    assert told is not None
    assert f"{chance} nats a token, chance {chance}" in told
    assert torch.is_grad_enabled()


def test_what_is_too_short_is_left_to_the_check_ups_to_tell(writer: Subject) -> None:
    assert begin(Visit(writer, Material("own", texts=("short",), own=True))).caution is None


def test_known_texts_go_without_caution(chemist: Subject) -> None:
    for given in (material(20, 0), material(91, 9)):
        require_known(chemist, given)
        assert caution_about(Visit(chemist, given)) is None


def test_a_share_of_unknown_tokens_is_told(chemist: Subject) -> None:
    for given, share in ((material(9, 1), "10%"), (material(1, 1), "50%")):
        require_known(chemist, given)
        told = caution_about(Visit(chemist, given))
        assert told is not None
        assert f"does not know {share} of these texts" in told


def test_mostly_unknown_texts_are_refused_with_a_remedy(chemist: Subject) -> None:
    with pytest.raises(ArgumentError, match="75% of the tokens of formulas") as caught:
        require_known(chemist, material(1, 3))
    assert "\n" not in str(caught.value)
    assert "--data FILE" in str(caught.value)


def test_it_is_refused_before_any_check_up(chemist: Subject) -> None:
    with pytest.raises(ArgumentError, match="unknown"):  # of the machine's sources, to one that knows atoms
        material_for(chemist, None)


def test_a_tokenizer_of_bytes_knows_everything(writer: Subject) -> None:
    given = Material("odd", texts=("\u2603\U0001f40d" * 50,))
    assert writer.tokenizer.unk_token_id is None
    require_known(writer, given)


def test_tokens_beyond_the_model_are_refused(chemist: Subject) -> None:
    chemist.tokenizer.add_tokens(["S"])  # and the model was not told
    require_known(chemist, material(3, 0))
    with pytest.raises(CheckpointError, match="gives the token 6, and the model knows 6"):
        require_known(chemist, Material("salts", texts=("C S O",)))
    chemist.tokenizer.add_special_tokens({"mask_token": "[HIDE]"})
    with pytest.raises(CheckpointError, match="gives the token 7"):
        require_known(chemist, material(3, 0))
