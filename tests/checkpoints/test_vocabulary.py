"""Texts that the tokenizer does not know are told, or refused, and so are tokens that the model does not know."""

from typing import Any

import pytest
import tokenizers
import transformers

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.checkpoints.vocabulary import checked_texts
from transformer_problems.clinic.diagnose import material_for
from transformer_problems.core.errors import ArgumentError, CheckpointError

WORDS = {"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "C": 3, "O": 4, "N": 5}


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


def test_known_texts_are_left_as_they_are(chemist: Subject) -> None:
    for given in (material(20, 0), material(91, 9)):
        assert checked_texts(chemist, given) is given


def test_a_share_of_unknown_tokens_is_told(chemist: Subject) -> None:
    for given, told in ((material(9, 1), "10%"), (material(1, 1), "50%")):
        found = checked_texts(chemist, given)
        assert found.source == f"formulas, {told} of whose tokens the tokenizer does not know"
        assert found.texts == given.texts


def test_mostly_unknown_texts_are_refused_with_a_remedy(chemist: Subject) -> None:
    with pytest.raises(ArgumentError, match="75% of the tokens of formulas") as caught:
        checked_texts(chemist, material(1, 3))
    assert "\n" not in str(caught.value)
    assert "--data FILE" in str(caught.value)


def test_it_is_refused_before_any_check_up(chemist: Subject) -> None:
    with pytest.raises(ArgumentError, match="unknown"):  # of the machine's sources, to one that knows atoms
        material_for(chemist, None)


def test_a_tokenizer_of_bytes_knows_everything() -> None:
    subject = load_subject(bundled("draft"))
    given = Material("odd", texts=("\u2603\U0001f40d" * 50,))
    assert subject.tokenizer.unk_token_id is None
    assert checked_texts(subject, given) is given


def test_tokens_beyond_the_model_are_refused(chemist: Subject) -> None:
    chemist.tokenizer.add_tokens(["S"])  # and the model was not told
    assert checked_texts(chemist, material(3, 0)).source == "formulas"
    with pytest.raises(CheckpointError, match="gives the token 6, and the model knows 6"):
        checked_texts(chemist, Material("salts", texts=("C S O",)))
    chemist.tokenizer.add_special_tokens({"mask_token": "[HIDE]"})
    with pytest.raises(CheckpointError, match="gives the token 7"):
        checked_texts(chemist, material(3, 0))
