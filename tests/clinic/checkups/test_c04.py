"""A model whose cache is off works for each token as for the whole text, and is found out."""

from functools import partial
from pathlib import Path

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.decoding import CachedText, next_token_flops, uses_cache
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.problems.p04_slow_decoding import checkup
from transformer_problems.problems.p04_slow_decoding.checkup import CHECKUP, tokens_per_pass
from transformer_problems.problems.p04_slow_decoding.fault import FAULT


@pytest.fixture(autouse=True)
def a_known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes a second, and half a GB."""
    monkeypatch.setattr(checkup, "measure_bandwidth", lambda device, array_bytes: 1e10)


def test_a_cache_that_is_off_is_found_out(causal: Subject, texts: Material) -> None:
    healthy, ill = (CHECKUP.examine(Visit(s, texts)) for s in (causal, FAULT.plant(causal, 0)))
    assert healthy.readings["decoding_arithmetic"].value == 1  # a step of generate is a cached step
    assert ill.readings["decoding_arithmetic"].value > 30  # a pass over 64 tokens, less 63 answers that nobody reads
    assert healthy.readings["seconds_per_word"].low > 0
    assert {remedy.solution: remedy.promise for remedy in healthy.remedies}["kv-cache"] == "in use already"


def test_every_form_is_counted_alike(ward_cache: Path, texts: Material) -> None:
    for patient in patients("causal", 3)[1:]:
        subject = admit(patient, ward_cache)
        tokens = Visit(subject, texts).texts(1, 32)["input_ids"]
        healthy, ill = (next_token_flops(s, tokens) for s in (subject, FAULT.plant(subject, 0)))
        text = CachedText(subject, tokens[:, :-1])
        assert count_flops(partial(text.read, tokens[:, -1:])) == healthy < ill / 10


def test_a_cached_step_is_what_it_is_on_paper(causal: Subject, texts: Material) -> None:
    config, tokens = causal.config, Visit(causal, texts).texts(1, 40)["input_ids"]
    width, depth = config.hidden_size, config.num_hidden_layers
    weights = depth * (4 * width**2 + 3 * width * config.intermediate_size) + width * config.vocab_size
    text = CachedText(causal, tokens[:, :-1])
    assert count_flops(lambda: text.read(tokens[:, -1:])) == 2 * weights + depth * 2 * 2 * width * 40
    assert text.state_bytes == 2 * depth * width * 40 * 4


def test_steps_beside_a_cache_read_what_a_pass_reads(causal: Subject, texts: Material) -> None:
    inputs = Visit(causal, texts).texts(1, 40)
    text = CachedText(causal, inputs["input_ids"][:, :-3])
    torch.testing.assert_close(text.read(inputs["input_ids"][:, -3:]), causal.run(inputs).output[:, -3:].detach())


def test_what_a_draft_yields() -> None:
    assert tokens_per_pass(0.0, 4) == 1
    assert tokens_per_pass(0.5, 1) == pytest.approx(1.5)  # the draft's token half of the time, and one more
    assert tokens_per_pass(1.0, 4) == 5


def test_planting_leaves_the_healthy_model_as_it_was(causal: Subject, encoder: Subject, texts: Material) -> None:
    causal.model.train()
    CHECKUP.examine(Visit(causal, texts))
    assert not uses_cache(FAULT.plant(causal, 0)) and uses_cache(causal) and causal.model.training
    causal.model.eval()
    with pytest.raises(CombinationError, match="writes no text"):
        FAULT.plant(encoder, 0)
