"""A model whose training is lost is found out; the same forms, trained, are worth more than random weights."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.problems.p06_data_hungry import checkup
from transformer_problems.problems.p06_data_hungry.checkup import CHECKUP
from transformer_problems.problems.p06_data_hungry.fault import FAULT
from transformer_problems.problems.p06_data_hungry.untrained import untrained


def gain(subject: Subject, material: Material) -> float:
    found = CHECKUP.examine(Visit(subject, material))
    assert isinstance(found, Examination)
    return found.readings["pretraining_gain"].value


@pytest.mark.parametrize("kind", ["causal", "encoder", "vision"])
def test_lost_training_is_found(kind: str, texts: Material, images: Material, request: Any) -> None:
    subject = request.getfixturevalue(kind)
    material = images if kind == "vision" else texts
    assert gain(FAULT.plant(subject, 0), material) < 0.06 < 0.09 < gain(subject, material)


def test_images_that_the_user_sorted_are_told_apart_by_their_classes(vision: Subject, images: Material) -> None:
    assert images.images is not None
    pixels = images.images[:2].repeat_interleave(70, dim=0)  # two pictures, each many times: any features do
    classes = torch.arange(2).repeat_interleave(70)
    shown = Visit(vision, replace(images, images=pixels, classes=classes, own=True))
    found = CHECKUP.examine(shown)
    assert isinstance(found, NotApplicable)
    assert "100% of 2 classes of images" in found.reason
    few = CHECKUP.examine(replace(shown, material=replace(images, images=pixels[60:80], classes=classes[60:80])))
    assert isinstance(few, Examination)
    assert "ten digits" in few.meaning


def test_random_weights_gain_nothing_over_themselves(encoder: Subject, texts: Material) -> None:
    body = encoder.with_model(cast("Any", encoder.model).base_model)
    assert gain(untrained(body, 0), texts) == 0


def test_a_task_that_random_weights_solve_says_nothing(encoder: Subject, texts: Material, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkup, "_REPLACED", 1.0)
    found = CHECKUP.examine(Visit(encoder, texts))
    assert isinstance(found, NotApplicable)
    assert "random weights" in found.reason


def test_the_probe_is_ridge_regression_by_its_formula() -> None:
    draws = torch.Generator().manual_seed(0)
    x, asked = torch.randn(30, 5, generator=draws), torch.randn(40, 5, generator=draws)
    classes = torch.randint(3, (30,), generator=draws)
    told = checkup._probe(x, classes, asked)
    mean, deviation = x.mean(dim=0).double(), x.std(dim=0).double()
    z, z_asked = (x - mean) / deviation, (asked - mean) / deviation
    wanted = torch.nn.functional.one_hot(classes).double()
    weights = torch.linalg.inv(z.T @ z + 5 * torch.eye(5)) @ z.T @ (wanted - wanted.mean(dim=0))  # by features
    assert torch.equal(told, (z_asked @ weights + wanted.mean(dim=0)).argmax(dim=1))


def test_the_numbers_come_again_and_nothing_is_changed(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    settings = cast("Any", causal.model).config.to_dict()
    state = torch.get_rng_state()
    first, second = (CHECKUP.examine(Visit(causal, texts)) for _ in range(2))
    assert first == second
    FAULT.plant(causal, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert cast("Any", causal.model).config.to_dict() == settings
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())
