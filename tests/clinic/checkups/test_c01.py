"""The share of the square is what it is on paper, at any length, and a stretched context is found out."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.lengths import Growth, arithmetic_by_length, longest_input, through
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.problems.p01_quadratic_complexity.checkup import CHECKUP
from transformer_problems.problems.p01_quadratic_complexity.fault import FAULT


def share_of(subject: Subject, material: Material) -> float:
    return CHECKUP.examine(Visit(subject, material)).readings["attention_share"].value


def test_a_stretched_context_is_found_out(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject, material in ((causal, texts), (encoder, texts), (vision, images)):
        assert share_of(subject, material) < 0.4
        assert share_of(FAULT.plant(subject, 0), material) > 0.75


def test_the_share_is_that_of_a_llama_on_paper(causal: Subject, texts: Material) -> None:
    config, length = causal.config, longest_input(causal)
    width, depth = config.hidden_size, config.num_hidden_layers
    square = depth * 2 * 2 * width * length**2  # scores and weighted values
    weights = depth * (4 * width**2 + 3 * width * config.intermediate_size) + width * config.vocab_size
    assert share_of(causal, texts) == pytest.approx(square / (square + 2 * weights * length), rel=1e-12)


def test_what_short_inputs_tell_holds_at_sixteen_times_the_length(
    encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject, material in ((encoder, texts), (vision, images)):
        visit = Visit(FAULT.plant(subject, 0), material)
        expected = arithmetic_by_length(visit).at(longest_input(visit.subject))
        inputs = visit.inputs(1, longest_input(visit.subject))
        assert count_flops(lambda ill=visit.subject, inputs=inputs: ill.run(inputs)) == pytest.approx(
            expected, rel=1e-9
        )


def test_stretched_positions_lie_between_the_old_ones(encoder: Subject) -> None:
    before = encoder.model.get_submodule("bert.embeddings.position_embeddings").weight.detach().double().numpy()
    after = FAULT.plant(encoder, 0).model.get_submodule("bert.embeddings.position_embeddings").weight.detach()
    places = (np.arange(16 * len(before)) + 0.5) / 16 - 0.5
    naive = np.stack([np.interp(places, np.arange(len(before)), column) for column in before.T], axis=1)
    torch.testing.assert_close(after.double(), torch.from_numpy(naive), rtol=1e-4, atol=1e-6)  # places in float32


def test_windows_have_no_square(ward_cache: Path, images: Material) -> None:
    swin = admit(patients("image", 3)[2], ward_cache)
    assert share_of(swin, images) == 0
    with pytest.raises(CombinationError, match="windows"):
        FAULT.plant(swin, 0)


def test_a_law_of_three_points() -> None:
    growth = through((1, 2, 4), (5 + 3 + 2, 5 + 6 + 8, 5 + 12 + 32))
    assert (growth.constant, growth.linear, growth.square) == (5, 3, 2)
    assert growth.square_share(growth.half_length()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("window", "half"),
    [
        (100, 3.0),  # not reached: 2 N^2 = 3 N + 9
        (2, (1 + 37**0.5) / 2),  # N^2 + 2 N = 3 N + 9
    ],
)
def test_a_law_with_windows(window: int, half: float) -> None:
    growth = Growth(9, 3, 1, local=1, window=window)
    assert growth.at(1) == 9 + 3 + 1 + 1
    assert growth.at(200) == 9 + 3 * 200 + 200**2 + 200 * window
    assert growth.half_length() == pytest.approx(half)
    assert growth.square_share(growth.half_length()) == pytest.approx(0.5)
    assert Growth(9, 3, 0, local=1, window=2).half_length() == math.inf  # attention never reaches the rest


def test_the_model_is_left_as_it_was(encoder: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in encoder.model.state_dict().items()}
    encoder.model.train()
    first = CHECKUP.examine(Visit(encoder, texts))
    FAULT.plant(encoder, 0)
    assert encoder.model.training and first == CHECKUP.examine(Visit(encoder, texts))
    encoder.model.eval()
    assert all(torch.equal(values, before[name]) for name, values in encoder.model.state_dict().items())
    assert longest_input(encoder) == 128
