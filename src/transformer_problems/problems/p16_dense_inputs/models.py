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

ImageSize = tuple[int, int]
ClipSize = tuple[int, int, int]


def image_model(arm: str, width: int, size: ImageSize) -> nn.Module:
    """A classifier of images of one channel; sizes are height and width."""

    def vision_transformer(patch_size: int) -> VisionTransformer:
        patches = PatchEmbedding(width, patch_size, in_channels=1)
        return VisionTransformer(patches, size, _LAYERS, _mixer_of(width), NUM_DIGITS)

    makers: dict[str, Callable[[], nn.Module]] = {
        "pixels": lambda: vision_transformer(1),
        "patches": lambda: vision_transformer(4),
        "pyramid": lambda: PyramidTransformer(
            (
                PyramidStage(width // 2, 2, num_heads=2, pooled_size=4, stride=2),
                PyramidStage(width, 2, num_heads=4, pooled_size=4, stride=2),
            ),
            NUM_DIGITS,
            in_channels=1,
        ),
        "swin": lambda: SwinTransformer(
            PatchEmbedding(width // 2, 2, in_channels=1), (4, 4), (2, 2), num_heads=(2, 4), num_classes=NUM_DIGITS
        ),
    }
    return makers[arm]()


def clip_model(arm: str, width: int, size: ClipSize) -> nn.Module:
    """A classifier of clips of one channel; sizes are frames, height and width."""

    def tubelets() -> TubeletEmbedding:
        return TubeletEmbedding(width, patch_size=4, tubelet_len=2, in_channels=1)

    makers: dict[str, Callable[[], nn.Module]] = {
        "clip_pixels": lambda: JointVideoEncoder(
            TubeletEmbedding(width, patch_size=1, tubelet_len=1, in_channels=1),
            size,
            _LAYERS,
            _mixer_of(width),
            len(SPEEDS),
        ),
        "tubelets": lambda: JointVideoEncoder(tubelets(), size, _LAYERS, _mixer_of(width), len(SPEEDS)),
        "tubelets_factorised": lambda: FactorisedVideoEncoder(
            tubelets(), size, _LAYERS // 2, _LAYERS // 2, _mixer_of(width), len(SPEEDS)
        ),
        "swin_clips": lambda: SwinTransformer(
            TubeletEmbedding(width // 2, patch_size=2, tubelet_len=2, in_channels=1),
            (2, 3, 3),
            (2, 2),
            num_heads=(2, 4),
            num_classes=len(SPEEDS),
        ),
    }
    return makers[arm]()


def _mixer_of(width: int) -> Callable[[], SelfAttention]:
    return lambda: SelfAttention(width, _HEADS, is_causal=False)
