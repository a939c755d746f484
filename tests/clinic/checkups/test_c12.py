"""A model that starts over with each token is found out, and a token's cost is foretold at any history."""

from pathlib import Path

import pytest

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.decoding import next_token_flops, uses_cache
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError
from transformer_problems.problems.p12_no_recurrence.checkup import CHECKUP
from transformer_problems.problems.p12_no_recurrence.fault import FAULT


def test_starting_over_is_found_out_in_every_form(ward_cache: Path, texts: Material) -> None:
    for patient in patients("causal", 3):
        subject = admit(patient, ward_cache)
        healthy, ill = (CHECKUP.examine(Visit(s, texts)) for s in (subject, FAULT.plant(subject, 0)))
        assert healthy.readings["next_token_growth"].value < 1.6
        assert ill.readings["next_token_growth"].value > 8  # as many times the tokens as 128 are of 16


def test_the_growth_is_that_of_a_llama_on_paper(causal: Subject, texts: Material) -> None:
    config = causal.config
    width, depth = config.hidden_size, config.num_hidden_layers
    weights = depth * (4 * width**2 + 3 * width * config.intermediate_size) + width * config.vocab_size
    at = [2 * weights + depth * 2 * 2 * width * history for history in (16, 128)]
    found = CHECKUP.examine(Visit(causal, texts))
    assert found.readings["next_token_growth"].value == pytest.approx(at[1] / at[0], rel=1e-12)
    assert found.figures["cache_at_longest_bytes"] == 2 * depth * width * 4 * 128


def test_short_histories_foretell_the_longest(causal: Subject, texts: Material) -> None:
    for subject in (causal, FAULT.plant(causal, 0)):
        visit = Visit(subject, texts)
        counted = [next_token_flops(subject, visit.texts(1, history)["input_ids"]) for history in (16, 128)]
        foretold = CHECKUP.examine(visit).readings["next_token_growth"].value
        assert foretold == pytest.approx(counted[1] / counted[0], rel=1e-12)


def test_a_state_of_fixed_size_takes_what_the_weights_take(causal: Subject, texts: Material) -> None:
    """Whether the cache is on or off, what it would leave of the growth is the same."""
    promised = []
    for subject in (causal, FAULT.plant(causal, 0)):
        found = CHECKUP.examine(Visit(subject, texts))
        delta = next(remedy for remedy in found.remedies if remedy.solution == "delta-attention")
        promised.append(found.figures["next_token_at_longest_gflop"] / delta.factor)
    assert promised[1] == pytest.approx(promised[0], rel=1e-9)


def test_the_model_is_left_as_it_was(causal: Subject, encoder: Subject, texts: Material) -> None:
    causal.model.train()
    first, second = (CHECKUP.examine(Visit(causal, texts)) for _ in range(2))
    FAULT.plant(causal, 0)
    assert first.readings == second.readings and uses_cache(causal) and causal.model.training
    causal.model.eval()
    with pytest.raises(CombinationError, match="no stream"):
        FAULT.plant(encoder, 0)
