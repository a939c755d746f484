"""Exploded scores, dead layers and gradients that vanish are found out; a healthy model is left in peace."""

from copy import deepcopy
from typing import Any, cast

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.findings import Examination
from transformer_problems.problems.p10_training_instability.checkup import CHECKUP
from transformer_problems.problems.p10_training_instability.fault import FAULT
from transformer_problems.problems.p10_training_instability.scores import ScoresSeen


def examined(subject: Subject, material: Material) -> dict[str, float]:
    return {metric: reading.value for metric, reading in CHECKUP.examine(Visit(subject, material)).readings.items()}


@pytest.mark.parametrize("kind", ["causal", "encoder", "vision"])
def test_exploded_scores_are_found(kind: str, texts: Material, images: Material, request: Any) -> None:
    subject = request.getfixturevalue(kind)
    material = images if kind == "vision" else texts
    healthy, ill = examined(subject, material), examined(FAULT.plant(subject, 0), material)
    assert healthy["largest_logit"] < 50
    assert ill["largest_logit"] > 1000
    assert healthy["gradient_ratio"] < 50
    assert healthy["dead_layers"] == 0


def test_a_layer_whose_branches_are_silent_is_dead(causal: Subject, texts: Material) -> None:
    ill = causal.with_model(deepcopy(causal.model))
    first = cast("Any", ill.layers[0])
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
    found = examined(ill, texts)
    assert found["dead_layers"] == 1 / len(ill.layers)
    assert found["gradient_ratio"] < 50  # the skip carries it past


def test_a_stack_that_blocks_its_input_has_no_gradient(encoder: Subject, texts: Material) -> None:
    ill = encoder.with_model(deepcopy(encoder.model))
    with torch.no_grad():
        cast("Any", ill.layers[-1]).output.LayerNorm.weight.zero_()  # the last states are a constant
    assert examined(ill, texts)["gradient_ratio"] == 1e12


def test_the_score_is_the_largest_product_of_query_and_key() -> None:
    q, k = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])
    with ScoresSeen(1) as seen:
        torch.nn.functional.softmax(q @ k.mT, dim=-1)
    assert [layer.tolist() for layer in seen.largest] == [[10.0]]


def test_the_model_is_left_as_it_was_and_the_numbers_come_again(encoder: Subject, texts: Material) -> None:
    model = deepcopy(encoder.model).train()
    subject = encoder.with_model(model)
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    first, second = (CHECKUP.examine(Visit(subject, texts)) for _ in range(2))
    assert isinstance(first, Examination)
    assert first.readings == second.readings
    assert not frozen.requires_grad
    assert all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert cast("Any", model).config._attn_implementation == cast("Any", encoder.model).config._attn_implementation
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
