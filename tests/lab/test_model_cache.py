"""The model cache: trains once, and again when anything that made the model changes."""

from pathlib import Path

import torch
from torch import nn

from transformer_problems.lab.model_cache import ModelCache


def test_a_recipe_is_trained_once(tmp_path: Path) -> None:
    trained: list[int] = []

    def train(model: nn.Module, checkpoint: Path) -> None:
        trained.append(1)
        nn.init.constant_(model.weight, len(trained))

    def build() -> nn.Module:
        return nn.Linear(2, 2)

    cache = ModelCache(tmp_path, "code")
    first = cache.get({"seed": 0}, build, train)
    again = cache.get({"seed": 0}, build, train)
    assert len(trained) == 1
    assert torch.equal(first.weight, again.weight)
    cache.get({"seed": 1}, build, train)
    ModelCache(tmp_path, "other code").get({"seed": 0}, build, train)
    assert len(trained) == 3


def test_tied_weights_survive(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.one, model.two = nn.Linear(2, 2), nn.Linear(2, 2)
        model.two.weight = model.one.weight
        return model

    cache = ModelCache(tmp_path, "code")
    first = cache.get({}, build, lambda model, path: None)
    again = cache.get({}, build, lambda model, path: None)
    assert torch.equal(first.one.weight, again.two.weight)
    assert again.two.weight is again.one.weight
