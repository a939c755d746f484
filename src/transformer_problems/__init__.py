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
    "ConformerBlock": "solutions.tokens.conformer",
    "ConformerEncoder": "models.audio",
    "ContinualAttention": "solutions.attention.continual",
    "ConvolutionModule": "solutions.tokens.convolution_module",
    "Decoder": "models.decoder",
    "DeepNorm": "solutions.residual.deep_norm",
    "DeltaRule": "solutions.recurrence.delta_rule",
    "DenseAttention": "solutions.attention.dense",
    "DenseSkips": "solutions.residual.dense_skips",
    "DifferentialAttention": "solutions.attention.differential",
    "DropHead": "solutions.training.drop_head",
    "DropHeadSchedule": "solutions.training.drop_head",
    "Encoder": "models.encoder",
    "EntmaxAttention": "solutions.attention.entmax",
    "FlashAttention": "solutions.attention.flash",
    "GatedAttention": "solutions.attention.gated",
    "GradientClipping": "solutions.training.clipping",
    "GradualUnfreezing": "solutions.training.fine_tuning",
    "HashedNgrams": "solutions.memory.hashed_ngrams",
    "KNNMemoryAttention": "solutions.memory.knn_memory",
    "KVCache": "solutions.attention.kv_cache",
    "LayerScale": "solutions.residual.layer_scale",
    "LearnedGridPositions": "solutions.position.learned_grid",
    "LearnedPositions": "solutions.position.learned",
    "LearnedTemperature": "solutions.attention.learned_temperature",
    "LearnedTokenPruning": "solutions.tokens.pruning",
    "Linformer": "solutions.attention.linformer",
    "LlamaConfig": "models.llama",
    "LlamaDecoder": "models.llama",
    "LogLengthScale": "solutions.attention.log_length_scale",
    "LongformerAttention": "solutions.attention.longformer",
    "Mamba": "solutions.recurrence.mamba",
    "MaskedAutoencoder": "solutions.training.masked_autoencoder",
    "MemoryBankAttention": "solutions.recurrence.memory_bank",
    "MemoryEfficientAttention": "solutions.attention.memory_efficient",
    "PackedAttention": "solutions.attention.packing",
    "PagePool": "solutions.attention.paged_cache",
    "PagedKVCache": "solutions.attention.paged_cache",
    "PatchEmbedding": "solutions.tokens.patch_embedding",
    "Performer": "solutions.attention.performer",
    "PositionEncoding": "core.slots",
    "PostNorm": "solutions.normalization.post_norm",
    "PreNorm": "solutions.normalization.pre_norm",
    "PromptLookup": "solutions.decoding.speculative",
    "QuantizedKVCache": "solutions.attention.quantized_cache",
    "QueryKeyNorm": "solutions.attention.query_key_norm",
    "RandomizedPositions": "solutions.position.randomized",
    "ReZero": "solutions.residual.re_zero",
    "ReducingEncoder": "models.reducing_encoder",
    "RetrievalAugmented": "solutions.memory.retrieval",
    "RetroactiveAttention": "solutions.attention.continual",
    "RotaryEmbedding": "solutions.position.rotary",
    "ScaledRotaryEmbedding": "solutions.position.rotary_scaling",
    "SelfAttention": "solutions.attention.self_attention",
    "ShawRelative": "solutions.position.shaw",
    "SinusoidalEncoding": "solutions.position.sinusoidal",
    "SkipConnection": "solutions.residual.skip_connection",
    "SlidingWindow": "solutions.attention.sliding_window",
    "SparseAttention": "solutions.attention.sparse",
    "T5RelativeBias": "solutions.position.t5",
    "TokenMerging": "solutions.tokens.merging",
    "TokenPruning": "solutions.tokens.pruning",
    "TopKAttention": "solutions.attention.topk",
    "TrainingMonitor": "solutions.training.monitor",
    "TrainingRecipe": "solutions.training.recipe",
    "TransformerXL": "solutions.recurrence.transformer_xl",
    "TransformerXLRelative": "solutions.position.transformer_xl",
    "UNetSkips": "solutions.residual.unet_skips",
    "VectorIndex": "solutions.memory.retrieval",
    "VisionTransformer": "models.vision",
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
    "layerwise_learning_rates": "solutions.training.fine_tuning",
    "linear_probe": "solutions.training.transfer",
    "load_bundled": "checkpoints.bundled",
    "load_llama": "models.llama",
    "mask_predict": "solutions.decoding.mask_predict",
    "mask_tokens": "solutions.training.masked_tokens",
    "predicted_speedup": "solutions.decoding.speculative",
    "save_llama": "models.llama",
    "sequence_level_batch": "solutions.training.distillation",
    "speculative_decode": "solutions.decoding.speculative",
    "stack_layers": "models.stack",
    "token_distillation_loss": "solutions.training.distillation_token",
    "transfer_weights": "solutions.training.transfer",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
