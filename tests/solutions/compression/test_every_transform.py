"""What every transform of linear layers refuses in the same words, before it touches a model."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import ModelTransform
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.adaptation.qlora import QLoRA
from transformer_problems.solutions.compression.gptq import GPTQ
from transformer_problems.solutions.compression.int4 import QuantizeInt4
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.movement_pruning import MovementPruning
from transformer_problems.solutions.compression.smooth_quant import SmoothQuant
from transformer_problems.solutions.compression.wanda import Wanda

X = torch.ones(3, 8)
MAKERS: dict[str, Callable[..., ModelTransform]] = {
    "QuantizeInt8": QuantizeInt8,
    "QuantizeInt4": partial(QuantizeInt4, group_size=8),
    "GPTQ": partial(GPTQ, [X], group_size=8),
    "SmoothQuant": partial(SmoothQuant, [X]),
    "MagnitudePruning": partial(MagnitudePruning, 0.5),
    "MovementPruning": partial(MovementPruning, 0.5),
    "Wanda": partial(Wanda, [X], 0.5),
    "LoRA": partial(LoRA, 2),
    "QLoRA": partial(QLoRA, 2),
}
PATTERNS = [(name, "skip") for name in MAKERS] + [(n, a) for n in ("LoRA", "QLoRA") for a in ("targets", "train")]
WRONG_PATTERNS = (None, 3, [1, 2], ("head", None), b"head", {"head": 1})


@pytest.mark.parametrize(("name", "argument"), PATTERNS)
def test_patterns_of_another_type_are_refused_at_construction(name: str, argument: str) -> None:
    for value in WRONG_PATTERNS:
        rest = r"\('\*',\) for all" if argument == "targets" else r"\(\) for none"
        words = rf"^{argument} must be a sequence of patterns; got {re.escape(repr(value))}\. Write texts, .*{rest}\.$"
        with pytest.raises(ArgumentError, match=words):
            MAKERS[name](**{argument: value})
    with pytest.raises(ArgumentError, match=rf"^{argument} must be .* the single text 'head'\. Write \('head',\)\.$"):
        MAKERS[name](**{argument: "head"})


@pytest.mark.parametrize("make", [LoRA, QLoRA])
def test_no_targets_at_all_are_refused_at_construction(make: type[LoRA]) -> None:
    for value in ((), []):
        with pytest.raises(ArgumentError, match=r"targets must hold one pattern at least; got .* Write \('\*',\)"):
            make(targets=value)


@pytest.mark.parametrize("pattern", [4, "24", (2,), (), (2, 4, 8), (2.0, 4), (True, 4), (4, 2), (-1, 4), {2: 4}])
@pytest.mark.parametrize("make", [MagnitudePruning, partial(Wanda, [X])])
def test_patterns_of_zeros_are_two_whole_numbers(make: Callable[..., ModelTransform], pattern: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^pattern must be .*; got {re.escape(repr(pattern))}\.$"):
        make(pattern=pattern)


@pytest.mark.parametrize("share", ["0.5", True, 1.0, -0.1, float("nan"), [0.5]])
@pytest.mark.parametrize("make", [MagnitudePruning, MovementPruning, partial(Wanda, [X])])
def test_shares_of_zeros_are_numbers_below_one(make: Callable[..., ModelTransform], share: object) -> None:
    words = rf"^sparsity must be a share from 0 to below 1; got {re.escape(repr(share))}\.$"
    with pytest.raises(ArgumentError, match=words):
        make(sparsity=share)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def holding_nan() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    nn.init.constant_(model[0].weight, torch.nan)
    return model


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("make", "words"), [(tied, "0 and 1 share theirs"), (holding_nan, "0.weight holds NaN")])
def test_weights_tied_or_not_finite_are_refused_and_left_alone(
    name: str, make: Callable[[], nn.Module], words: str
) -> None:
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=words):
        MAKERS[name]()(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
