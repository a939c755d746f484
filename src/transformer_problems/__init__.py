"""See 18 limitations of Transformers measured, and fix each with a tested solution.

Every public name is listed here once and loaded at first use, so importing this package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ALiBi": "solutions.position.alibi",
    "AttentionSinks": "solutions.attention.attention_sinks",
    "ChunkedAttention": "solutions.attention.chunked",
    "ContinualAttention": "solutions.attention.continual",
    "Decoder": "models.decoder",
    "DeltaRule": "solutions.recurrence.delta_rule",
    "DenseAttention": "solutions.attention.dense",
    "DifferentialAttention": "solutions.attention.differential",
    "Encoder": "models.encoder",
    "EntmaxAttention": "solutions.attention.entmax",
    "FlashAttention": "solutions.attention.flash",
    "GatedAttention": "solutions.attention.gated",
    "KVCache": "solutions.attention.kv_cache",
    "LearnedPositions": "solutions.position.learned",
    "LearnedTokenPruning": "solutions.tokens.pruning",
    "Linformer": "solutions.attention.linformer",
    "LongformerAttention": "solutions.attention.longformer",
    "Mamba": "solutions.recurrence.mamba",
    "MemoryBankAttention": "solutions.recurrence.memory_bank",
    "PackedAttention": "solutions.attention.packing",
    "Performer": "solutions.attention.performer",
    "PositionEncoding": "core.slots",
    "RandomizedPositions": "solutions.position.randomized",
    "ReducingEncoder": "models.reducing_encoder",
    "RetroactiveAttention": "solutions.attention.continual",
    "RotaryEmbedding": "solutions.position.rotary",
    "ScaledRotaryEmbedding": "solutions.position.rotary_scaling",
    "SelfAttention": "solutions.attention.self_attention",
    "ShawRelative": "solutions.position.shaw",
    "SinusoidalEncoding": "solutions.position.sinusoidal",
    "SlidingWindow": "solutions.attention.sliding_window",
    "SparseAttention": "solutions.attention.sparse",
    "T5RelativeBias": "solutions.position.t5",
    "TokenMerging": "solutions.tokens.merging",
    "TokenPruning": "solutions.tokens.pruning",
    "TopKAttention": "solutions.attention.topk",
    "TransformerXL": "solutions.recurrence.transformer_xl",
    "TransformerXLRelative": "solutions.position.transformer_xl",
    "WatchedAttention": "solutions.attention.watched",
    "XPos": "solutions.position.xpos",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
