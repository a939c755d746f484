"""Collapsed tokens are found out; those of a healthy model are told apart."""

from typing import Any

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p11_attention_over_smoothing.checkup import CHECKUP
from transformer_problems.problems.p11_attention_over_smoothing.depth import rank_one_distance
from transformer_problems.problems.p11_attention_over_smoothing.fault import FAULT


@pytest.mark.parametrize("kind", ["causal", "encoder", "vision"])
def test_collapse_is_found(kind: str, texts: Material, images: Material, request: Any) -> None:
    subject = request.getfixturevalue(kind)
    material = images if kind == "vision" else texts
    healthy = CHECKUP.examine(Visit(subject, material)).readings["rank_distance"]
    ill = CHECKUP.examine(Visit(FAULT.plant(subject, 0), material)).readings["rank_distance"]
    assert ill.high < 0.1 < healthy.low


def test_two_unit_tokens_at_an_angle_have_the_distance_known_on_paper() -> None:
    angle = torch.tensor(0.7)
    tokens = torch.stack([torch.tensor([1.0, 0.0]), torch.stack([angle.cos(), angle.sin()])])[None]
    # the mean of two unit vectors has length cos(angle / 2), which leaves sin(angle / 2)
    torch.testing.assert_close(rank_one_distance(tokens), (angle / 2).sin()[None])


def test_a_token_of_huge_norm_does_not_hide_collapse(encoder: Subject, texts: Material) -> None:
    ill = FAULT.plant(encoder, 0)
    last = ill.layers[-1]

    def enlarge(layer: Any, inputs: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, 0] *= 1e4
        return (x, *output[1:]) if isinstance(output, tuple) else x

    hook = last.register_forward_hook(enlarge)
    try:
        assert CHECKUP.examine(Visit(ill, texts)).readings["rank_distance"].value < 0.05
    finally:
        hook.remove()


def test_the_numbers_come_again_and_the_model_is_left_as_it_was(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    first, second = (CHECKUP.examine(Visit(causal, texts)) for _ in range(2))
    assert first == second
    FAULT.plant(causal, 0)
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())
