"""The examples in docstrings run as they stand and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

from transformer_problems.checkpoints import bundled
from transformer_problems.models import audio, pyramid, swin, video, vision
from transformer_problems.solutions import interpretability, tokens, training
from transformer_problems.solutions.attention import shifted_windows, spatial_reduction
from transformer_problems.solutions.position import learned_grid

MODULES = [
    bundled,
    *(audio, pyramid, swin, video, vision, shifted_windows, spatial_reduction, learned_grid),
    *(
        importlib.import_module(found.name)
        for role in (interpretability, tokens, training)
        for found in pkgutil.iter_modules(role.__path__, f"{role.__name__}.")
    ),
]
EXAMPLES = [
    test
    for module in MODULES
    for test in doctest.DocTestFinder().find(module)
    if any(doctest.SKIP not in example.options for example in test.examples)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.rpartition(".")[2])
def test_docstring_example(example: doctest.DocTest, capsys: pytest.CaptureFixture[str]) -> None:
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
    assert results.attempted
    assert not results.failed, capsys.readouterr().out


def test_the_names_that_a_recipe_is_built_from_have_examples() -> None:
    shown = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"TrainingRecipe", "adam", "adamw", "Warmup", "GradientClipping", "first_nonfinite_layer"} <= shown
    assert {"mask_tokens", "transfer_weights", "linear_probe"} <= shown
    assert {"layerwise_learning_rates", "GradualUnfreezing"} <= shown


def test_what_turns_images_clips_and_sound_into_tokens_has_examples() -> None:
    shown = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"PatchEmbedding", "PatchMerging", "TubeletEmbedding", "ConvolutionalStem", "LearnedGridPositions"} <= shown
    assert {"ConformerBlock", "ConvolutionModule", "TokenMerging", "TokenPruning", "LearnedTokenPruning"} <= shown
    assert {"VisionTransformer", "SwinTransformer", "PyramidTransformer", "ConformerEncoder"} <= shown
