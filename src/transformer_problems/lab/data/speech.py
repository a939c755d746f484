"""Real speech features: nine speakers say /ae/, 12 coefficients a frame, from a package that carries the data."""

import importlib.util
from pathlib import Path
from typing import Literal

from transformer_problems.core.errors import MissingDependencyError
from transformer_problems.lab.data.labelled import LabelledSequences
from transformer_problems.lab.data.ts_file import load_ts

NUM_FEATURES = 12
NUM_SPEAKERS = 9


def load_japanese_vowels(split: Literal["TRAIN", "TEST"]) -> LabelledSequences:
    """270 utterances for training and 370 for test, of 7 to 29 frames; the class is the speaker.

    The files are read where the package aeon carries them; none of its code runs.

    Raises:
        MissingDependencyError: If the package is not installed.

    Source:
        Kudo et al. 1999, Multidimensional curve classification using passing-through regions,
        doi:10.1016/S0167-8655(99)00077-X.
    """
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            "the speech features come with the package aeon, which is not installed. "
            "Install it with what it needs to run: pip install 'transformer-problems[speech]'; or without: "
            "pip install --no-deps aeon"
        )
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    return load_ts(folder / f"JapaneseVowels_{split}.ts")
