"""Masked prediction of bytes: the objective that both-sided models are trained and judged by."""

import torch
from torch import Tensor

from transformer_problems.lab.meters.quality import bits_per_byte

MASK_TOKEN = 256
_MASKED_SHARE = 0.15


def mask_bytes(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace 15% of the bytes by the mask token; the first byte of each window is always among them.

    Shape:
        text: [B, N] int64; output: corrupted [B, N] and chosen [B, N] bool.

    Source:
        Devlin et al. 2019, arXiv:1810.04805, section 3.1. Differs from the paper: every chosen byte is masked.
    """
    chosen = (torch.rand(text.shape, generator=generator) < _MASKED_SHARE).to(text.device)
    chosen[:, 0] = True
    return text.masked_fill(chosen, MASK_TOKEN), chosen


def masked_bits_per_byte(logits: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
    """Bits per masked byte, one value a window. logits: [B, N, V]; text, chosen: [B, N]; output: [B]."""
    return bits_per_byte(logits, text, mask=chosen)
