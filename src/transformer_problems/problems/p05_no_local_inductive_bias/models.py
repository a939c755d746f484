"""The contestants, built to have as many parameters as the plain model of their kind, within a tenth."""

from collections.abc import Callable

from torch import nn

from transformer_problems.models.audio import ConformerEncoder
from transformer_problems.models.block import TransformerBlock
from transformer_problems.models.pyramid import PyramidStage, PyramidTransformer
from transformer_problems.models.swin import SwinTransformer
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p05_no_local_inductive_bias.task import Form
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.tokens.conformer import ConformerBlock
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

_HEADS = 4
_LAYERS = 4


def image_model(arm: str, scale: int, form: Form) -> nn.Module:
    """A classifier of square images of 8 or 32 pixels a side; widths are multiples of `scale`.

    Larger images are cut into larger patches: the plain model sees 16 tokens of the small ones, 64 of the large.
    """
    width, larger = 4 * scale, max(1, form.side // 16)
    channels, num_classes = form.channels, form.num_classes

    def plain(patches: PatchEmbedding | ConvolutionalStem) -> VisionTransformer:
        return _vision_transformer(patches, width, form)

    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: plain(PatchEmbedding(width, 2 * larger, in_channels=channels)),
        "cnn": lambda: plain(ConvolutionalStem(width, num_stages=larger, in_channels=channels)),
        "swin": lambda: SwinTransformer(
            PatchEmbedding(5 * scale // 2, larger, in_channels=channels),
            (4, 4),
            (2, 2),
            num_heads=(2, 4),
            num_classes=num_classes,
        ),
        "pyramid": lambda: PyramidTransformer(
            (
                PyramidStage(2 * scale, 2, num_heads=2, reduction=2, stride=larger),
                PyramidStage(5 * scale, 2, num_heads=4, reduction=1, stride=2, expansion=3),
            ),
            num_classes,
            in_channels=channels,
        ),
    }
    return makers[arm]()


def speech_model(arm: str, scale: int, form: Form) -> ConformerEncoder:
    """A classifier of utterances; the Conformer's blocks have two feed-forward networks, so they are narrower."""
    width = 4 * scale if arm == "conformer" else 11 * scale // 2

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, position=TransformerXLRelative(width, _HEADS), is_causal=False)

    def block() -> nn.Module:
        if arm == "conformer":
            return ConformerBlock(width, mixer(), kernel_size=7)
        return TransformerBlock(width, mixer())

    return ConformerEncoder(form.channels, width, 2, form.num_classes, block)


def _vision_transformer(patches: PatchEmbedding | ConvolutionalStem, width: int, form: Form) -> VisionTransformer:
    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, is_causal=False)

    return VisionTransformer(patches, (form.side, form.side), _LAYERS, mixer, form.num_classes)
