"""The contestants, built to have as many parameters as the plain model of their kind, within a tenth."""

from collections.abc import Callable

from torch import nn

from transformer_problems.lab.data.digits import SIZE
from transformer_problems.lab.data.speech import NUM_FEATURES, NUM_SPEAKERS
from transformer_problems.models.audio import ConformerEncoder
from transformer_problems.models.block import TransformerBlock
from transformer_problems.models.pyramid import PyramidStage, PyramidTransformer
from transformer_problems.models.swin import SwinTransformer
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.tokens.conformer import ConformerBlock
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

_DIGITS = 10
_HEADS = 4


def image_model(arm: str, scale: int) -> nn.Module:
    """A classifier of 8 x 8 images; widths are multiples of `scale`."""
    width = 4 * scale
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: _vision_transformer(PatchEmbedding(width, 2, in_channels=1), width, num_layers=4),
        "cnn": lambda: _vision_transformer(ConvolutionalStem(width, num_stages=1, in_channels=1), width, num_layers=4),
        "swin": lambda: SwinTransformer(
            PatchEmbedding(5 * scale // 2, 1, in_channels=1), (4, 4), (2, 2), num_heads=(2, 4), num_classes=_DIGITS
        ),
        "pyramid": lambda: PyramidTransformer(
            (
                PyramidStage(2 * scale, 2, num_heads=2, reduction=2, stride=1),
                PyramidStage(5 * scale, 2, num_heads=4, reduction=1, stride=2, expansion=3),
            ),
            _DIGITS,
            in_channels=1,
        ),
    }
    return makers[arm]()


def speech_model(arm: str, scale: int) -> ConformerEncoder:
    """A classifier of utterances; the Conformer's blocks have two feed-forward networks, so they are narrower."""
    width = 4 * scale if arm == "conformer" else 11 * scale // 2

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, position=TransformerXLRelative(width, _HEADS), is_causal=False)

    def block() -> nn.Module:
        if arm == "conformer":
            return ConformerBlock(width, mixer(), kernel_size=7)
        return TransformerBlock(width, mixer())

    return ConformerEncoder(NUM_FEATURES, width, 2, NUM_SPEAKERS, block)


def _vision_transformer(patches: PatchEmbedding | ConvolutionalStem, width: int, num_layers: int) -> VisionTransformer:
    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, is_causal=False)

    return VisionTransformer(patches, (SIZE, SIZE), num_layers, mixer, _DIGITS)
