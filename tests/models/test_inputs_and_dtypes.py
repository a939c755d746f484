"""Models of images, clips and sound alike: what they refuse as an input, and that they are of one dtype."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.audio import ConformerEncoder
from transformer_problems.models.pyramid import PyramidStage, PyramidTransformer
from transformer_problems.models.swin import SwinTransformer
from transformer_problems.models.video import FactorisedVideoEncoder, JointVideoEncoder
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.conformer import ConformerBlock
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding

WIDTH, CLASSES = 8, 5
IMAGES, CLIPS, FEATURES = (2, 3, 8, 8), (2, 3, 4, 8, 8), (2, 9, 3)
DTYPES = [torch.float64, torch.bfloat16, torch.float16]
Build = Callable[..., nn.Module]


def mixer() -> SelfAttention:
    return SelfAttention(WIDTH, 2, is_causal=False)


def vit(**options: torch.dtype) -> nn.Module:
    return VisionTransformer(PatchEmbedding(WIDTH, 4), (8, 8), 1, mixer, CLASSES, **options)


def vit_on_a_stem(**options: torch.dtype) -> nn.Module:
    return VisionTransformer(ConvolutionalStem(WIDTH, 2), (8, 8), 1, mixer, CLASSES, pool="attention", **options)


def swin(**options: torch.dtype) -> nn.Module:
    return SwinTransformer(PatchEmbedding(WIDTH, 2), (2, 2), (2, 2), (2, 2), CLASSES, **options)


def pyramid(**options: torch.dtype) -> nn.Module:
    stages = (PyramidStage(WIDTH, 1, 2, reduction=2), PyramidStage(WIDTH, 1, 2, pooled_size=2))
    return PyramidTransformer(stages, CLASSES, **options)


def joint(**options: torch.dtype) -> nn.Module:
    return JointVideoEncoder(TubeletEmbedding(WIDTH, 4, 2), (4, 8, 8), 1, mixer, CLASSES, **options)


def factorised(**options: torch.dtype) -> nn.Module:
    return FactorisedVideoEncoder(TubeletEmbedding(WIDTH, 4, 2), (4, 8, 8), 1, 1, mixer, CLASSES, **options)


def video_swin(**options: torch.dtype) -> nn.Module:
    return SwinTransformer(TubeletEmbedding(WIDTH, 2, 2), (2, 2, 2), (2,), (2,), CLASSES, **options)


def conformer(**options: torch.dtype) -> nn.Module:
    return ConformerEncoder(3, WIDTH, 1, CLASSES, lambda: ConformerBlock(WIDTH, mixer(), kernel_size=3), **options)


OF_IMAGES: list[Build] = [vit, vit_on_a_stem, swin, pyramid]
OF_CLIPS: list[Build] = [joint, factorised, video_swin]
MODELS = [(build, shape) for builds, shape in ((OF_IMAGES, IMAGES), (OF_CLIPS, CLIPS)) for build in builds]
EVERY = [*MODELS, (conformer, FEATURES)]


@pytest.mark.parametrize(("build", "shape"), MODELS)
@pytest.mark.parametrize("given", ["cat.jpg", Path("cat.jpg"), ["cat.jpg"], None, [[0.5] * 50]])
def test_files_and_lists_are_refused(build: Build, shape: tuple[int, ...], given: object) -> None:
    with pytest.raises(ArgumentError, match=r"(images|clips) must be a tensor \[B, 3, .*; got .*Read files and stack"):
        build()(given)


@pytest.mark.parametrize(("build", "shape"), MODELS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_whole_numbers_are_refused_with_the_remedy(build: Build, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, pixels = build(), torch.zeros(shape, dtype=dtype)
    with pytest.raises(ArgumentError, match=r"must be floating point .*Pass (images|clips)\.float\(\) / 255\.$"):
        model(pixels)
    assert model(pixels.float() / 255).shape == (2, CLASSES)


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_other_ranks_and_channels_are_refused(build: Build, shape: tuple[int, ...]) -> None:
    for wrong in ((5,), (), shape[1:], (*shape, 1), (2, 4, *shape[2:])):
        with pytest.raises(ArgumentError, match=r"must be floating point \[B, 3, .*; got torch\.float32 \["):
            build()(torch.zeros(wrong))


@pytest.mark.parametrize("given", ["a.wav", None, torch.zeros(FEATURES, dtype=torch.int16)])
def test_what_are_no_features_of_sound_is_refused(given: object) -> None:
    with pytest.raises(ArgumentError, match=r"features must be (a )?floating.point"):
        conformer()(given)


@pytest.mark.parametrize(("build", "shape"), EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_that_of_the_whole_model(build: Build, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = torch.rand(shape, dtype=dtype)
    for model in (build(dtype=dtype), build().to(dtype)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = model(inputs)
        assert logits.dtype == dtype and bool(logits.isfinite().all())
        logits.sum().backward()


@pytest.mark.parametrize(("build", "shape"), EVERY)
def test_inputs_of_another_dtype_are_refused(build: Build, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ArgumentError, match=r"must have the dtype of .*, torch\.float32; got torch\.float64. Pass .*to\("
    ):
        build()(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(
        ArgumentError, match=r"must have the dtype of .*, torch\.float64; got torch\.float32. Pass .*to\("
    ):
        build(dtype=torch.float64)(torch.zeros(shape))


@pytest.mark.parametrize(("build", "shape"), EVERY)
def test_autocast_takes_inputs_of_its_own_dtype(build: Build, shape: tuple[int, ...]) -> None:
    model, inputs = build().eval(), torch.rand(shape)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(inputs.bfloat16()), model(inputs)
    # bfloat16 keeps 8 bits; a few layers on numbers of order one
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VisionTransformer(PatchEmbedding(WIDTH, 4, dtype=torch.float64), (8, 8), 1, mixer, CLASSES),
        lambda: VisionTransformer(PatchEmbedding(WIDTH, 4), (8, 8), 1, lambda: mixer().double(), CLASSES),
        lambda: SwinTransformer(PatchEmbedding(WIDTH, 2).double(), (2, 2), (2,), (2,), CLASSES),
        lambda: JointVideoEncoder(TubeletEmbedding(WIDTH, 4, 2).double(), (4, 8, 8), 1, mixer, CLASSES),
        lambda: FactorisedVideoEncoder(TubeletEmbedding(WIDTH, 4, 2).double(), (4, 8, 8), 1, 1, mixer, CLASSES),
        lambda: ConformerEncoder(3, WIDTH, 1, CLASSES, lambda: ConformerBlock(WIDTH, mixer()).double()),
    ],
)
def test_parts_of_another_dtype_are_refused_at_construction(build: Build) -> None:
    with pytest.raises(
        CombinationError, match=r"has weights of torch\.float64, but the model is built in torch\.float32"
    ):
        build()
