"""The contestants: classifiers of images and of clips that differ in what becomes a token."""

from collections.abc import Callable

from torch import nn

from transformer_problems.lab.data.moving_images import SPEEDS
from transformer_problems.models.pyramid import PyramidStage, PyramidTransformer
from transformer_problems.models.swin import SwinTransformer
from transformer_problems.models.video import FactorisedVideoEncoder, JointVideoEncoder
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding

NUM_DIGITS = 10
_HEADS = 4
_LAYERS = 4

FIRST_TOKENS = {
    "pixels": (1, 1),
    "patches": (1, 4),
    "pyramid": (1, 2),
    "swin": (1, 2),
    "clip_pixels": (1, 1),
    "tubelets": (2, 4),
    "tubelets_factorised": (2, 4),
    "swin_clips": (2, 2),
}
"""Frames, and pixels along each side, from one token of an arm's first layer to the next."""

ImageSize = tuple[int, int]
ClipSize = tuple[int, int, int]


def image_model(arm: str, width: int, size: ImageSize) -> nn.Module:
    """A classifier of images of one channel; sizes are height and width."""
    _, side = FIRST_TOKENS[arm]

    def vision_transformer() -> VisionTransformer:
        patches = PatchEmbedding(width, side, in_channels=1)
        return VisionTransformer(patches, size, _LAYERS, _mixer_of(width), NUM_DIGITS)

    makers: dict[str, Callable[[], nn.Module]] = {
        "pixels": vision_transformer,
        "patches": vision_transformer,
        "pyramid": lambda: PyramidTransformer(
            (
                PyramidStage(width // 2, 2, num_heads=2, pooled_size=4, stride=side),
                PyramidStage(width, 2, num_heads=4, pooled_size=4, stride=2),
            ),
            NUM_DIGITS,
            in_channels=1,
        ),
        "swin": lambda: SwinTransformer(
            PatchEmbedding(width // 2, side, in_channels=1), (4, 4), (2, 2), num_heads=(2, 4), num_classes=NUM_DIGITS
        ),
    }
    return makers[arm]()


def clip_model(arm: str, width: int, size: ClipSize) -> nn.Module:
    """A classifier of clips of one channel; sizes are frames, height and width."""
    num_frames, side = FIRST_TOKENS[arm]
    embed_dim = width // 2 if arm == "swin_clips" else width
    tubelets = TubeletEmbedding(embed_dim, patch_size=side, tubelet_len=num_frames, in_channels=1)

    makers: dict[str, Callable[[], nn.Module]] = {
        "joint": lambda: JointVideoEncoder(tubelets, size, _LAYERS, _mixer_of(width), len(SPEEDS)),
        "tubelets_factorised": lambda: FactorisedVideoEncoder(
            tubelets, size, _LAYERS // 2, _LAYERS // 2, _mixer_of(width), len(SPEEDS)
        ),
        "swin_clips": lambda: SwinTransformer(tubelets, (2, 3, 3), (2, 2), num_heads=(2, 4), num_classes=len(SPEEDS)),
    }
    return makers.get(arm, makers["joint"])()


def _mixer_of(width: int) -> Callable[[], SelfAttention]:
    return lambda: SelfAttention(width, _HEADS, is_causal=False)
