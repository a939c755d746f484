"""The first layer whose output is not finite, by name, in models made ill at one place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.training.divergence import first_nonfinite_layer


class Wrapped(nn.Module):
    """Gives its inner layer's output in the form asked for, and more that is not floating-point."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Any:
        y, count = self.inner(x), torch.ones(2, dtype=torch.int64)
        return {"tuple": (count, y), "dict": {"count": count, "y": [y, None]}, "tensor": y}[self.form]


class Outer(nn.Module):
    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        self.first, self.second = Wrapped("tensor"), Wrapped(form)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def first(model: nn.Module, x: Tensor | None = None) -> str | None:
    return first_nonfinite_layer(model, lambda: model(torch.ones(2, 4) if x is None else x))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("ill", ["first.inner", "second.inner"])
def test_of_nested_modules_the_innermost_is_named(ill: str, value: str, form: str) -> None:
    model = Outer(form)
    assert first(model) is None
    nn.init.constant_(model.get_submodule(ill).bias, float(value))
    assert first(model) == ill


class Spoils(nn.Module):
    """Healthy inside, ill by what it makes of it itself."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x) / 0
        return {"tuple": (x, y), "dict": {"x": x, "y": [y]}, "tensor": y}[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_what_a_module_does_itself_is_its_own_fault(form: str) -> None:
    """Its inner layers are finite, so the name can only come from its own output, whatever form that has."""
    assert first(nn.Sequential(nn.Linear(4, 4), Spoils(form))) == "1"
    assert first(Spoils(form)) == "Spoils"


def test_an_ill_input_shows_in_the_first_module_that_reads_it() -> None:
    assert first(Outer(), torch.full((2, 4), float("nan"))) == "first.inner"


def test_in_a_decoder_the_layer_is_named() -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(7, 8, 3, lambda: SelfAttention(8, 2)), torch.arange(5)[None]
    assert first(model, tokens) is None
    with torch.no_grad():
        model.body.blocks[1].feed_forward.up.weight[0, 0] = float("nan")
    assert first(model, tokens) == "body.blocks.1.feed_forward.up"
    with torch.no_grad():
        model.body.embedding.weight[6] = float("inf")  # not among the tokens, but among the outputs
        model.body.blocks[1].feed_forward.up.weight[0, 0] = 0.0
    assert first(model, tokens) == "Decoder"


def test_it_leaves_no_trace() -> None:
    model = Outer()
    made: list[bool] = []
    model.first.register_forward_hook(lambda module, inputs, output: made.append(output.requires_grad))
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    first(model)
    assert made == [False]  # no graph was built

    def fail() -> None:
        raise RuntimeError("no forward pass")

    with pytest.raises(RuntimeError, match="no forward pass"):
        first_nonfinite_layer(model, fail)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before


def test_buffers_and_random_numbers_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    buffers, random = {name: buffer.clone() for name, buffer in model.named_buffers()}, torch.get_rng_state()
    assert first(model, torch.full((3, 4), float("nan"))) == "0"
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
