"""A model without positions is found out, exactly; a healthy one is not."""

import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p02_no_positional_awareness.checkup import CHECKUP
from transformer_problems.problems.p02_no_positional_awareness.fault import FAULT


def test_without_positions_shuffling_changes_no_more_than_rounding(
    causal: Subject, encoder: Subject, texts: Material
) -> None:
    for subject in (causal, encoder):
        healthy = CHECKUP.examine(Visit(subject, texts)).readings["order_sensitivity"]
        ill = CHECKUP.examine(Visit(FAULT.plant(subject, 0), texts)).readings["order_sensitivity"]
        assert ill.high < 1e-5 < 0.02 < healthy.low


def test_planting_leaves_the_healthy_model_as_it_was(encoder: Subject) -> None:
    before = {name: values.clone() for name, values in encoder.model.state_dict().items()}
    FAULT.plant(encoder, 0)
    assert all(torch.equal(values, before[name]) for name, values in encoder.model.state_dict().items())
