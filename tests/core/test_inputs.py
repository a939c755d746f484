"""What a layer is given: what passes, and messages that tell apart files, whole numbers, shapes and dtypes."""

import re
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import (
    check_clips,
    check_floating,
    check_images,
    check_on_grid,
    check_same_dtype,
    shown,
)

WEIGHT = torch.zeros(8, 3, 4, 4)  # [C_out, C_in, P, P]
DOUBLE = WEIGHT.double()
CLIP_WEIGHT = torch.zeros(8, 3, 2, 4, 4)


def test_good_inputs_pass() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_floating("x", torch.zeros(1, dtype=dtype))
        check_images(torch.zeros(0, 3, 1, 9, dtype=dtype), WEIGHT.to(dtype), "PatchEmbedding")
        check_clips(torch.zeros(2, 3, 5, 1, 9, dtype=dtype), CLIP_WEIGHT.to(dtype), "TubeletEmbedding")
    check_on_grid(torch.zeros(0, 2, 3, 8), "[B, rows, columns, 8]", embed_dim=8, num_axes=2)


def test_autocast_makes_dtypes_alike_itself() -> None:
    check_same_dtype("x", torch.zeros(1, device="meta"), WEIGHT.to("meta"), "Layer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_same_dtype("images", torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), WEIGHT, "PatchEmbedding")
        y = torch.nn.functional.conv2d(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), WEIGHT)
    assert y.shape == (1, 8, 1, 1)
    with pytest.raises(ArgumentError, match=r"x must have the dtype of Layer's weights, torch\.float32"):
        check_same_dtype("x", torch.zeros(1, dtype=torch.float64, device="meta"), WEIGHT, "Layer")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (
                lambda given=given: check_images(given, WEIGHT, "PatchEmbedding"),
                f"images must be a tensor [B, 3, H, W]; got {said}. Read files and stack them first, channels before "
                "rows, as floating point from 0 to 1.",
            )
            for given, said in (
                ("cat.jpg", "'cat.jpg'"),
                (Path("cat.jpg"), repr(Path("cat.jpg"))),
                (["a.jpg", "b.jpg"], "['a.jpg', 'b.jpg']"),
                (None, "None"),
                ([[0.5] * 40], "an object of type list"),
            )
        ),
        (
            lambda: check_clips("clip.mp4", CLIP_WEIGHT, "TubeletEmbedding"),
            "clips must be a tensor [B, 3, T, H, W]; got 'clip.mp4'. Read files and stack them first, channels before "
            "rows, as floating point from 0 to 1.",
        ),
        (
            lambda: check_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), WEIGHT, "PatchEmbedding"),
            "images must be floating point [B, 3, H, W]; got torch.uint8 [1, 3, 4, 4]. Pass images.float() / 255.",
        ),
        (
            lambda: check_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), DOUBLE, "PatchEmbedding"),
            "images must be floating point [B, 3, H, W]; got torch.uint8 [1, 3, 4, 4]. "
            "Pass images.to(torch.float64) / 255.",
        ),
        (
            lambda: check_images(torch.zeros(1, 3, 4, 4, dtype=torch.bool), WEIGHT, "PatchEmbedding"),
            "images must be floating point [B, 3, H, W]; got torch.bool [1, 3, 4, 4]. Pass images.float().",
        ),
        (
            lambda: check_images(torch.zeros(4, 4, 3), WEIGHT, "PatchEmbedding"),
            "images must be floating point [B, 3, H, W]; got torch.float32 [4, 4, 3]. Give one image as images[None], "
            "channels last as images.movedim(-1, 1), or build PatchEmbedding with in_channels of your images.",
        ),
        (
            lambda: check_clips(torch.zeros(1, 5, 3, 4, 4), CLIP_WEIGHT, "TubeletEmbedding"),
            "clips must be floating point [B, 3, T, H, W]; got torch.float32 [1, 5, 3, 4, 4]. Give one clip as "
            "clips[None], frames first as clips.transpose(1, 2), or build TubeletEmbedding with in_channels of your "
            "clips.",
        ),
        (
            lambda: check_same_dtype("images", torch.zeros(1, 3, 4, 4).double(), WEIGHT, "PatchEmbedding"),
            "images must have the dtype of PatchEmbedding's weights, torch.float32; got torch.float64. "
            "Pass images.to(torch.float32), or convert the model with model.to(torch.float64).",
        ),
        (
            lambda: check_floating("features", "a.wav"),
            "features must be a floating-point tensor; got 'a.wav'. "
            "Pass torch.as_tensor(values), or of a file what it holds.",
        ),
        (
            lambda: check_floating("x", torch.zeros(2, 3, dtype=torch.int64)),
            "x must be floating point; got torch.int64 [2, 3]. Pass x.float(), or embed it first.",
        ),
        *(
            (
                lambda shape=shape: check_on_grid(torch.zeros(shape), "[B, rows, columns, 8]", embed_dim=8, num_axes=2),
                f"x must be [B, rows, columns, 8]; got {shape}. Give tokens [B, N, C] as x.unflatten(1, grid).",
            )
            for shape in ([1, 4, 8], [1, 2, 2, 7], [1, 0, 2, 8], [1, 2, 2, 2, 8])
        ),
    ],
)
def test_bad_inputs_are_named_with_the_remedy(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        call()


def test_values_are_shown_on_one_line_without_addresses() -> None:
    assert shown(torch.nn.Linear(2, 3)) == "Linear(in_features=2, out_features=3, bias=True)"
    assert shown(torch.nn.Sequential(torch.nn.ReLU())) == "an object of type Sequential"
    assert shown(lambda: 1) == "an object of type function"
    assert shown(torch.nn.Linear) == "the class Linear"
    assert shown(torch.zeros(2, dtype=torch.int8)) == "torch.int8 [2]"
