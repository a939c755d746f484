"""A model without positions is found out, exactly; a healthy one is not."""

from pathlib import Path

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.findings import Examination
from transformer_problems.problems.p02_no_positional_awareness.checkup import CHECKUP
from transformer_problems.problems.p02_no_positional_awareness.fault import FAULT
from transformer_problems.problems.p02_no_positional_awareness.orders import in_each_window, with_patches


def _examined(subject: Subject, material: Material) -> Examination:
    return CHECKUP.examine(Visit(subject, material))


def test_without_positions_shuffling_changes_no_more_than_rounding(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject in (causal, encoder, vision):
        material = images if subject.kind == "image" else texts
        healthy = _examined(subject, material).readings["order_sensitivity"]
        ill = _examined(FAULT.plant(subject, 0), material).readings["order_sensitivity"]
        assert ill.high < 1e-5 < 0.02 < healthy.low


def test_windows_without_a_bias_by_place_are_found_out(ward_cache: Path, images: Material) -> None:
    swin = admit(patients("image", 3)[2], ward_cache)
    assert _examined(swin, images).readings["order_sensitivity"].low > 0.02
    assert _examined(FAULT.plant(swin, 0), images).readings["order_sensitivity"].high < 1e-5


def test_patches_move_inside_their_windows_and_nothing_is_lost(vision: Subject) -> None:
    order = in_each_window(torch.tensor([3, 2, 1, 0]), (2, 5), 2)
    assert order.tolist() == [6, 5, 8, 7, 4, 1, 0, 3, 2, 9]  # the fifth column fills no window
    pixels = torch.arange(3 * 8 * 8.0).view(1, 3, 8, 8)
    swapped = with_patches(vision, {"pixel_values": pixels}, torch.tensor([3, 1, 2, 0]))["pixel_values"]
    assert torch.equal(swapped[..., :4, :4], pixels[..., 4:, 4:])
    assert torch.equal(swapped[..., :4, 4:], pixels[..., :4, 4:])


@pytest.mark.parametrize("kind", ["causal", "encoder", "image"])
def test_all_solutions_are_named_with_what_they_weigh(
    kind: str, request: pytest.FixtureRequest, texts: Material, images: Material
) -> None:
    subject = request.getfixturevalue("vision" if kind == "image" else kind)
    promises = {
        remedy.solution: remedy.promise for remedy in _examined(subject, images if kind == "image" else texts).remedies
    }
    assert set(promises) == {"rope", "alibi", "sinusoidal-pe", "relative-pe", "learnable-pe"}
    places = 64 if kind == "image" else 128  # 8 x 8 patches; the declared length
    assert f"{places * 48:,} further weights, for {places}" in promises["learnable-pe"]
    assert f"{(15 * 15 if kind == 'image' else 32) * 4 * 2:,} further weights" in promises["relative-pe"]


def test_planting_and_examining_leave_the_healthy_model_as_it_was(
    causal: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject, material in ((causal, texts), (vision, images)):
        before = {name: values.clone() for name, values in subject.model.state_dict().items()}
        attention = subject.config._attn_implementation
        FAULT.plant(subject, 0)
        found, hooks = _examined(subject, material), _num_hooks(subject)  # transformers keeps hooks of its own
        assert _examined(subject, material) == found
        assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())
        assert subject.config._attn_implementation == attention
        assert _num_hooks(subject) == hooks


def _num_hooks(subject: Subject) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in subject.model.modules())
