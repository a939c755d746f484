"""The logit lens: what a model would answer if its layers ended earlier."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import CombinationError
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.modes import evaluating
from transformer_problems.kernels.linear import linear
from transformer_problems.solutions.interpretability.answers import answer, call
from transformer_problems.solutions.interpretability.readable import check_model_input
from transformer_problems.solutions.interpretability.sites import Place, Site, record


@torch.no_grad()
def logit_lens(model: nn.Module, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Logits that the final norm and the output layer read from the hidden states after each layer.

    Layers add to one stream that the last of them hands to the output layer, so that earlier states can be read by it
    too: at which depth does the answer appear? Early states need not be in the output layer's form, so what the lens
    does not show may still be there. The last row is the model's own logits, which is checked. Takes one pass, and
    L * B * N * V numbers of memory.

    Args:
        model: Decoder, Encoder or LlamaDecoder, or a causal language model of transformers of the form of Llama or
            GPT-2; it answers in evaluation mode and is left as it was.
        key_mask: True for real tokens. Default all.

    Shape:
        tokens: [B, N] int; key_mask: [B, N] bool; output: [L, B, N, V], of an Encoder [L, B, N, num_outputs].

    Raises:
        ArgumentError: If tokens are no [B, N] of the model's vocabulary, there are none, or the key mask does not fit.
        CombinationError: If the model is of another form, a layer is used more than once, or the model's own logits
            are not what its final norm and output layer read from its last layer.

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens". Differs from it: the embedding is left out.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, SelfAttention, logit_lens
        >>> model = Decoder(100, 32, 3, lambda: SelfAttention(32, 4))
        >>> tokens = torch.randint(100, (2, 12))
        >>> depths = logit_lens(model, tokens)
        >>> depths.shape, torch.equal(depths[-1], model(tokens))
        (torch.Size([3, 2, 12, 100]), True)
    """
    parts = _parts(model)
    check_model_input("tokens", tokens, model)
    check_key_mask(key_mask, tokens)
    places = [Place(Site(f"layer {number}"), block) for number, block in enumerate(parts.blocks)]
    outputs: list[Tensor] = []
    with evaluating(model):
        states = record(places, lambda: outputs.append(answer(call(model, tokens, key_mask))))
        depths = torch.stack([parts.read(parts.norm(state)) for state in states])
    own = outputs[0]
    if own.shape != depths.shape[1:] or not float((own - depths[-1]).abs().max()) <= _noise(own):
        raise CombinationError(
            f"a model must read its logits from its final norm and output layer alone; {type(model).__name__} does "
            f"something else besides, or gave NaN. {_SUPPORTED}"
        )
    return depths


@dataclass(frozen=True, slots=True)
class _Parts:
    """Layers one after the other, the norm after them, and what turns its output into logits."""

    blocks: nn.ModuleList
    norm: nn.Module
    read: Callable[[Tensor], Tensor]


_SUPPORTED = (
    "Use a Decoder, Encoder or LlamaDecoder, or a causal language model of transformers of the form of Llama or GPT-2."
)


def _parts(model: nn.Module) -> _Parts:
    whole: Any = model
    body = getattr(whole, "body", whole)
    if _has_blocks(body, "blocks", "norm") and hasattr(body, "embedding"):
        head = getattr(whole, "head", None)
        return _Parts(body.blocks, body.norm, head or (lambda x: linear(x, body.embedding.weight)))
    read = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    body = getattr(whole, "base_model", None)
    for blocks, norm in (("layers", "norm"), ("h", "ln_f"), ("layers", "final_layer_norm")):
        if isinstance(read, nn.Module) and _has_blocks(body, blocks, norm):
            return _Parts(getattr(body, blocks), getattr(body, norm), cast("Callable[[Tensor], Tensor]", read))
    raise CombinationError(
        f"model must have layers, a final norm and an output layer that can be told apart; "
        f"{type(model).__name__} has not. {_SUPPORTED}"
    )


def _has_blocks(body: object, blocks: str, norm: str) -> bool:
    return isinstance(getattr(body, blocks, None), nn.ModuleList) and isinstance(getattr(body, norm, None), nn.Module)


def _noise(logits: Tensor) -> float:
    """Far more than rounding moves a logit, far less than a scale or a cap would."""
    return float(torch.finfo(logits.dtype).eps ** 0.75 * logits.abs().max())
