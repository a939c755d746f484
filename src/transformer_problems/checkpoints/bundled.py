"""Two language models that come with the package: a base, and a smaller draft of the same tokenizer."""

from pathlib import Path
from typing import Literal, get_args

import torch

from transformer_problems.core.errors import UnknownNameError
from transformer_problems.models.llama import LlamaDecoder, load_llama

BundledName = Literal["base", "draft"]


def bundled(name: BundledName) -> Path:
    """The folder of a bundled checkpoint, in Hugging Face's layout.

    Its tokens are bytes, but for 256, which begins a text: decoding leaves out tokens above 255.
    The README.md in the folder tells what it was trained on, how, and its held-out score.

    Raises:
        UnknownNameError: If there is no such checkpoint.

    Example:
        >>> tokens = [256, *"naïve".encode()]
        >>> bytes(token for token in tokens if token < 256).decode(errors="replace")  # a text may end within a letter
        'naïve'
    """
    if name not in get_args(BundledName):
        raise UnknownNameError("bundled checkpoint", name, get_args(BundledName))
    return Path(__file__).parent / name


def load_bundled(
    name: BundledName, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LlamaDecoder:
    """A bundled checkpoint, ready to predict.

    Args:
        name: "base", or "draft", about a tenth of its size.
        dtype: Default bfloat16, as stored.

    Raises:
        UnknownNameError: If there is no such checkpoint.
    """
    return load_llama(bundled(name), dtype=dtype, device=device)
