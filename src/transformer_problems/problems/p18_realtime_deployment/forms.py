"""The contestants: one classifier of images in the forms that it can be served in, and smaller ones.

Imports no more than serving needs, for what is imported is part of a cold start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from transformer_problems.core.transforms import ModelTransform
from transformer_problems.models.mobilevit import MobileViT, MobileViTStage
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.deployment.fold_batch_norms import FoldBatchNorms
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

SIDE = 32  # pixels
_DIGITS = 10
_PATCH = 4
_HEAD_DIM = 32

FORMS_OF_ONE = ("eager", "int8", "int8_static", "onnx", "onnx_int8")
"""The arms that serve the same weights."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How large the models are and how long they train; pruned and distilled ones take the finishing steps."""

    width: int
    num_layers: int
    steps: int
    finishing_steps: int
    batch_size: int


def build_model(arm: str, plan: ImagePlan) -> nn.Module:
    """The arm's untrained and untreated model; a student has half the layers."""
    if arm == "edge":
        return _mobile(plan.width)
    num_layers = max(1, plan.num_layers // 2) if arm == "distilled" else plan.num_layers
    return VisionTransformer(
        PatchEmbedding(plan.width, _PATCH, in_channels=1),
        (SIDE, SIDE),
        num_layers,
        lambda: SelfAttention(plan.width, plan.width // _HEAD_DIM, op=FlashAttention(), is_causal=False),
        _DIGITS,
    )


def treatment(arm: str, calibration: Sequence[Tensor] = ()) -> ModelTransform | None:
    """What is done to the trained model, None for arms that are served as they are trained.

    Args:
        calibration: Images for the arm that needs them; none where its model is read back from a file.
    """
    makers: dict[str, Callable[[], ModelTransform]] = {
        "int8": QuantizeInt8,
        "int8_static": lambda: QuantizeInt8(calibration=calibration),
        "pruned": lambda: StructuredPruning(heads=0.5, neurons=0.5),
        "edge": FoldBatchNorms,
    }
    return makers[arm]() if arm in makers else None


def _mobile(width: int) -> MobileViT:
    """Convolutions on 16 x 16 and 8 x 8 places, then two stages of attention on 8 x 8 and 4 x 4."""
    half, quarter = width // 2, width // 4
    stages = (
        MobileViTStage(quarter, stride=1),
        MobileViTStage(half, embed_dim=width, num_layers=2),
        MobileViTStage(half, embed_dim=width, num_layers=2),
    )
    return MobileViT(stages, _DIGITS, in_channels=1, stem_stride=2, expansion=2)
