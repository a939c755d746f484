"""Attention that looks everywhere alike is found out, exactly; heads that look nearby are seen."""

from pathlib import Path

import pytest
import torch

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.attention_bias import with_attention_bias
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.problems.p05_no_local_inductive_bias.checkup import CHECKUP
from transformer_problems.problems.p05_no_local_inductive_bias.fault import FAULT

_KINDS = ["causal", "encoder", "vision"]


def _examined(subject: Subject, material: Material) -> Examination:
    found = CHECKUP.examine(Visit(subject, material))
    assert isinstance(found, Examination)
    return found


@pytest.fixture(params=_KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def material(subject: Subject, texts: Material, images: Material) -> Material:
    return images if subject.kind == "image" else texts


def test_blind_attention_is_found_out_and_local_heads_are_seen(subject: Subject, material: Material) -> None:
    judge = load_checkups()[5].thresholds["local_distance_share"].severity
    ill = _examined(FAULT.plant(subject, 0), material).readings["local_distance_share"]
    assert ill.value == pytest.approx(1, abs=1e-5)
    assert judge(ill.value) == "severe"
    healthy = FAULT.prepare(subject, 0)
    assert judge(_examined(healthy, material).readings["local_distance_share"].high) == "ok"
    assert _examined(FAULT.plant(healthy, 0), material).readings["local_distance_share"].value == pytest.approx(
        1, abs=1e-5
    )


def test_distances_are_those_of_the_paper(causal: Subject, encoder: Subject, texts: Material) -> None:
    # Attention to the token itself and the one on each side, 1/3 each, looks 2/3 of a token away; ends look 1/2 away.
    near = [lambda before: torch.zeros(before.shape).masked_fill(before.abs() > 1, -torch.inf)]
    narrow = _examined(with_attention_bias(FAULT.plant(encoder, 0), near), texts)
    assert narrow.figures["local_distance_tokens"] == pytest.approx((2 / 3 * 125 + 2 * 1 / 2) / 127, rel=1e-5)
    # Of n tokens in a row, two are (n * n - 1) / 3n apart on average; those before the i-th and itself, i / 2.
    assert narrow.figures["blind_distance_tokens"] == pytest.approx((127**2 - 1) / (3 * 127))
    assert _examined(causal, texts).figures["blind_distance_tokens"] == pytest.approx(126 / 4)


def test_windows_are_local_by_build(ward_cache: Path, images: Material) -> None:
    swin = admit(patients("image", 3)[2], ward_cache)
    found = CHECKUP.examine(Visit(swin, images))
    assert isinstance(found, NotApplicable)
    assert "4 x 4 patches" in found.reason
    with pytest.raises(CombinationError, match="inside windows"):
        FAULT.plant(swin, 0)


def test_remedies_suit_the_kind(subject: Subject, material: Material) -> None:
    named = {remedy.solution for remedy in _examined(subject, material).remedies}
    assert named == ({"cnn-transformer", "swin", "hierarchical-vit"} if subject.kind == "image" else {"conformer"})


def test_the_model_is_left_as_it_was(subject: Subject, material: Material) -> None:
    before = {name: values.clone() for name, values in subject.model.state_dict().items()}
    attention = subject.config._attn_implementation
    found, hooks = _examined(subject, material), _num_hooks(subject)  # transformers keeps hooks of its own
    FAULT.plant(subject, 0)
    assert _examined(subject, material) == found
    assert (_num_hooks(subject), subject.config._attn_implementation) == (hooks, attention)
    assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())


def _num_hooks(subject: Subject) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in subject.model.modules())
