"""See 18 limitations of Transformers measured, and fix each with a tested solution.

Every public name is listed here once and loaded at first use, so importing this package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ALiBi": "solutions.position.alibi",
    "AttentionSinks": "solutions.attention.attention_sinks",
    "BM25Index": "solutions.memory.retrieval",
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
    "GradientClipping": "solutions.training.clipping",
    "HashedNgrams": "solutions.memory.hashed_ngrams",
    "KNNMemoryAttention": "solutions.memory.knn_memory",
    "KVCache": "solutions.attention.kv_cache",
    "LearnedPositions": "solutions.position.learned",
    "LearnedTokenPruning": "solutions.tokens.pruning",
    "Linformer": "solutions.attention.linformer",
    "LlamaConfig": "models.llama",
    "LlamaDecoder": "models.llama",
    "LongformerAttention": "solutions.attention.longformer",
    "Mamba": "solutions.recurrence.mamba",
    "MemoryBankAttention": "solutions.recurrence.memory_bank",
    "MemoryEfficientAttention": "solutions.attention.memory_efficient",
    "PackedAttention": "solutions.attention.packing",
    "PagePool": "solutions.attention.paged_cache",
    "PagedKVCache": "solutions.attention.paged_cache",
    "Performer": "solutions.attention.performer",
    "PositionEncoding": "core.slots",
    "PostNorm": "solutions.normalization.post_norm",
    "PreNorm": "solutions.normalization.pre_norm",
    "PromptLookup": "solutions.decoding.speculative",
    "QuantizedKVCache": "solutions.attention.quantized_cache",
    "RandomizedPositions": "solutions.position.randomized",
    "ReducingEncoder": "models.reducing_encoder",
    "RetrievalAugmented": "solutions.memory.retrieval",
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
    "TrainingRecipe": "solutions.training.recipe",
    "TransformerXL": "solutions.recurrence.transformer_xl",
    "TransformerXLRelative": "solutions.position.transformer_xl",
    "VectorIndex": "solutions.memory.retrieval",
    "Warmup": "solutions.training.warmup",
    "WatchedAttention": "solutions.attention.watched",
    "XPos": "solutions.position.xpos",
    "adam": "solutions.training.adam",
    "adamw": "solutions.training.adamw",
    "checkpoint_layers": "solutions.training.checkpointing",
    "chunk_text": "solutions.memory.retrieval",
    "distillation_loss": "solutions.training.distillation",
    "first_nonfinite_layer": "solutions.training.divergence",
    "generate": "solutions.decoding.generate",
    "load_bundled": "checkpoints.bundled",
    "load_llama": "models.llama",
    "mask_predict": "solutions.decoding.mask_predict",
    "predicted_speedup": "solutions.decoding.speculative",
    "save_llama": "models.llama",
    "sequence_level_batch": "solutions.training.distillation",
    "speculative_decode": "solutions.decoding.speculative",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
