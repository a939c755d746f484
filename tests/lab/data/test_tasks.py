"""The synthetic tasks hold what they promise."""

import torch

from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.passkey import (
    FIRST_KEY_TOKEN,
    QUERY_TOKEN,
    VOCAB_SIZE,
    passkey_accuracy,
    plant_passkeys,
)
from transformer_problems.lab.data.sentences import NUM_ANSWERS, which_comes_first, who_did_what
from transformer_problems.lab.data.sentences import VOCAB_SIZE as SENTENCE_VOCAB
from transformer_problems.lab.masking import MASK_TOKEN, mask_bytes, masked_bits_per_byte


def test_a_passkey_stands_once_in_the_text_and_once_as_the_answer() -> None:
    text = torch.randint(256, (50, 20), generator=generator(0))
    tokens = plant_passkeys(text, generator(1))
    keys = tokens >= FIRST_KEY_TOKEN
    assert (keys.sum(1) == 2).all()
    assert keys[:, -1].all()
    assert (tokens[:, -2] == QUERY_TOKEN).all()
    for row in tokens:
        assert len(set(row[row >= FIRST_KEY_TOKEN].tolist())) == 1
    untouched = ~keys[:, :-2]
    assert torch.equal(tokens[:, :-2][untouched], text[:, :-2][untouched])


def test_passkey_accuracy_reads_the_prediction_after_the_question() -> None:
    tokens = plant_passkeys(torch.zeros(4, 10, dtype=torch.long), generator(0))
    logits = torch.zeros(4, 9, VOCAB_SIZE)
    logits[torch.arange(4), -1, tokens[:, -1]] = 1.0
    logits[:, -1, 5] = 9.0  # a byte is no key
    assert passkey_accuracy(logits, tokens).tolist() == [1.0] * 4
    logits[0, -1, FIRST_KEY_TOKEN : FIRST_KEY_TOKEN + 16] = 2.0
    logits[0, -1, tokens[0, -1]] = 0.0
    assert passkey_accuracy(logits, tokens)[0] == 0.0


def test_order_questions_cannot_be_answered_from_the_words_alone() -> None:
    """Every question has a twin of the same words with the other answer."""
    for task in (who_did_what, which_comes_first):
        questions = task(2000, generator(0))
        assert questions.tokens.max() < SENTENCE_VOCAB
        assert questions.answers.max() < NUM_ANSWERS
        first = (questions.answers == questions.candidates.amin(1)).double().mean()
        assert 0.45 < first < 0.55  # standard error 0.011
        assert (questions.answers[:, None] == questions.candidates).any(1).all()
        rows = torch.arange(len(questions.tokens))
        asked = questions.tokens[rows, questions.last]
        assert (asked == asked[0]).all()
        assert torch.equal(questions.key_mask.sum(1) - 1, questions.last)


def test_which_comes_first_is_labelled_by_place() -> None:
    questions = which_comes_first(200, generator(0))
    a, b = 6, 7
    for row, answer, no in zip(questions.tokens.tolist(), questions.answers, questions.candidates[:, 0], strict=True):
        assert row.count(a) == row.count(b) == 1
        assert int(answer - no) == int(row.index(a) < row.index(b))


def test_masking_hides_what_is_scored_and_nothing_else() -> None:
    text = torch.randint(256, (64, 200), generator=generator(0))
    corrupted, chosen = mask_bytes(text, generator(1))
    assert (corrupted[chosen] == MASK_TOKEN).all()
    assert torch.equal(corrupted[~chosen], text[~chosen])
    assert 0.13 < chosen.double().mean() < 0.17  # 12,800 draws of 0.15: standard error 0.003
    uniform = masked_bits_per_byte(torch.zeros(64, 200, 256), text, chosen)
    assert torch.allclose(uniform, torch.full((64,), 8.0))
