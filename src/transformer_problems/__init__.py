"""See 18 limitations of Transformers measured, fix each with a tested solution, check your own model.

Every public name is listed here once and loaded at first use, so importing this package does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Decoder": "models.decoder",
    "DenseAttention": "solutions.attention.dense",
    "Encoder": "models.encoder",
    "KVCache": "solutions.attention.kv_cache",
    "RotaryEmbedding": "solutions.position.rotary",
    "SelfAttention": "solutions.attention.self_attention",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
