"""Scores held in memory are found out, and what a long pass takes is foretold from a shorter one."""

from pathlib import Path

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.lengths import longest_input
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.problems.p07_high_memory_footprint.checkup import CHECKUP
from transformer_problems.problems.p07_high_memory_footprint.fault import FAULT


def test_scores_in_memory_are_found_out(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject, material in ((causal, texts), (encoder, texts), (vision, images)):
        healthy, ill = (CHECKUP.examine(Visit(s, material)) for s in (subject, FAULT.plant(subject, 0)))
        assert healthy.readings["score_share"].value == 0
        assert ill.readings["score_share"].value > 0.85
        assert 0 < healthy.readings["peak_share"].value < ill.readings["peak_share"].value < 0.1


def test_the_longest_pass_takes_what_was_foretold(causal: Subject, texts: Material) -> None:
    ill = FAULT.plant(causal, 0)
    figures = CHECKUP.examine(visit := Visit(ill, texts)).figures
    assert figures["measured_up_to_tokens"] < longest_input(ill)
    inputs = visit.texts(1, longest_input(ill))
    with torch.no_grad():
        taken = peak_memory_bytes(lambda: ill.run(inputs), device="cpu")
    assert figures["pass_bytes"] == pytest.approx(taken, rel=0.05)  # layers overlap a little less in short texts


def test_weights_and_cache_are_what_they_are_on_paper(causal: Subject, texts: Material) -> None:
    figures = CHECKUP.examine(Visit(causal, texts)).figures
    assert figures["weight_bytes"] == 4 * sum(part.numel() for part in causal.model.parameters())
    width, depth = causal.config.hidden_size, causal.config.num_hidden_layers
    assert figures["cache_per_1000_tokens_bytes"] == 2 * depth * width * 4 * 1000


def test_windows_hold_no_square(ward_cache: Path, images: Material) -> None:
    swin = admit(patients("image", 3)[2], ward_cache)
    assert CHECKUP.examine(Visit(swin, images)).readings["score_share"].value == 0
    with pytest.raises(CombinationError, match="windows"):
        FAULT.plant(swin, 0)


def test_the_model_is_left_as_it_was(encoder: Subject, texts: Material) -> None:
    encoder.model.train()
    first = CHECKUP.examine(Visit(encoder, texts))
    FAULT.plant(encoder, 0)
    assert first == CHECKUP.examine(Visit(encoder, texts)) and encoder.model.training
    assert encoder.config._attn_implementation == "sdpa" and longest_input(encoder) == 128
    encoder.model.eval()
