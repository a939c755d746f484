"""Thin matrices and repeated ones are found out, and the bill is the one that is computed on paper."""

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import nn

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p13_large_model_size.checkup import CHECKUP
from transformer_problems.problems.p13_large_model_size.fault import FAULT
from transformer_problems.problems.p13_large_model_size.matrices import rank_share, repeats
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.compression.int4 import QuantizeInt4


@pytest.mark.parametrize("kind", ["causal", "encoder", "vision"])
def test_thin_matrices_are_found(kind: str, texts: Material, images: Material, request: Any) -> None:
    subject = request.getfixturevalue(kind)
    material = images if kind == "vision" else texts
    healthy = CHECKUP.examine(Visit(subject, material)).readings
    ill = CHECKUP.examine(Visit(FAULT.plant(subject, 0), material)).readings
    assert ill["rank_share"].value < 0.2
    assert healthy["rank_share"].low > 0.6
    assert healthy["duplicate_share"].value == 0


def test_a_layer_that_is_a_copy_of_another_counts_with_its_bytes(causal: Subject, texts: Material) -> None:
    ill = causal.with_model(deepcopy(causal.model))
    ill.layers[1].load_state_dict(ill.layers[0].state_dict())
    held = sum(weight.numel() * weight.element_size() for weight in ill.layers[0].parameters() if weight.dim() == 2)
    found = CHECKUP.examine(Visit(ill, texts)).readings["duplicate_share"].value
    assert found == held / ill.weight_bytes


def test_rank_and_repeats_of_matrices_known_on_paper() -> None:
    assert rank_share(torch.eye(100)) == 0.99  # 99 of 100 equal values hold 99%
    assert rank_share(torch.ones(30, 50)) == 1 / 30
    one, other = torch.randn(20, 20), torch.randn(20, 20)
    assert repeats({"a": one, "b": other, "c": one * (1 + 1e-4), "d": one.T.reshape(10, 40)}) == ["c"]


def test_the_bill_is_what_lora_and_int4_of_this_package_take(causal: Subject, texts: Material) -> None:
    figures = CHECKUP.examine(Visit(causal, texts)).figures
    body = cast("Any", causal.model).model.layers
    adapted = LoRA(rank=8)(body)
    learning = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert figures["lora_trainable_parameters"] == learning
    assert figures["full_fine_tuning_bytes"] == 4 * causal.weight_bytes
    assert figures["lora_fine_tuning_bytes"] == causal.weight_bytes + 4 * 4 * learning
    rounded = QuantizeInt4(group_size=48)(body)  # a row of 48 is one group, of 96 two, as with groups of up to 64
    packed = sum(held.numel() * held.element_size() for held in rounded.buffers())
    linear = sum(layer.weight.numel() for layer in body.modules() if isinstance(layer, nn.Linear))
    assert figures["int4_bytes"] == causal.weight_bytes - 4 * linear + packed


def test_the_numbers_come_again_and_no_hook_stays(encoder: Subject, texts: Material) -> None:
    first, second = (CHECKUP.examine(Visit(encoder, texts)) for _ in range(2))
    assert first == second
    assert not any(part._forward_pre_hooks for part in encoder.model.modules())
