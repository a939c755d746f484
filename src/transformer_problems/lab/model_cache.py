"""Trained models that several cells need, kept by the hash of everything that made them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn


class ModelCache:
    """Trains a model once and hands it out again.

    Args:
        folder: Where the weights are kept, as safetensors.
        code: Fingerprint of the code that makes them; part of every key.
    """

    def __init__(self, folder: Path, code: str) -> None:
        self.folder, self.code = folder, code

    def get(
        self, recipe: dict[str, object], build: Callable[[], nn.Module], train: Callable[[nn.Module, Path], None]
    ) -> nn.Module:
        """The trained model of a recipe.

        Args:
            recipe: Everything that decides the weights: arm, sizes, plan, data, seed. JSON types only.
            build: Makes the untrained model.
            train: Trains it in place; is also given a path for its own checkpoint, to resume from.
        """
        key = hashlib.sha256(json.dumps([self.code, recipe], sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{key}.safetensors"
        model = build()
        if path.exists():
            load_model(model, path)
            return model.eval()
        train(model, self.folder / f"{key}.checkpoint")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_model(model, str(partial))
        partial.replace(path)
        return model.eval()
