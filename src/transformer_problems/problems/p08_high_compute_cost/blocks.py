"""The products of a pass in their order, and which belong to attention and to feed-forward networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Inputs, Subject
from transformer_problems.core.errors import CombinationError


@dataclass(frozen=True, slots=True)
class Product:
    """One call of a linear layer.

    Args:
        largest: The largest magnitude of each input, [in].
        rows: Tokens, or patches, that it was called on.
    """

    path: str
    layer: nn.Module
    largest: Tensor
    rows: int

    @property
    def matrix(self) -> Tensor:
        """[out, in]; the linear layers of GPT-2 hold it the other way."""
        weight = cast("Tensor", self.layer.weight)
        return weight if isinstance(self.layer, nn.Linear) else weight.mT

    @property
    def work(self) -> int:
        """Multiplications of a weight."""
        return self.matrix.numel() * self.rows

    def given(self) -> Tensor:
        """The most that each input gives to the output, [in]: its largest magnitude times its weights' norm."""
        given: Tensor = self.largest * self.matrix.detach().float().norm(dim=0)
        return given


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's products: of attention, the last of which mixes the heads; of its feed-forward network, likewise."""

    attention: tuple[Product, ...]
    feed_forward: tuple[Product, ...]
    num_heads: int


def products_of(subject: Subject, inputs: Inputs) -> list[Product]:
    """Every linear layer called in a pass, in order; one that layers share as often as it is called."""
    found: list[Product] = []
    with _watching(subject.model, found), torch.no_grad():
        subject.run(inputs)
    return found


def blocks_of(subject: Subject, products: list[Product]) -> list[Block]:
    """Attention is told by its name; the network after it ends with the first product back to its width.

    Raises:
        CombinationError: If no layer is found so.
    """
    runs = [
        (is_attention, list(run)) for is_attention, run in groupby(products, lambda each: "att" in each.path.lower())
    ]
    blocks = []
    for (is_attention, attention), (_, others) in zip(runs, [*runs[1:], (False, [])], strict=True):
        if is_attention:
            width, mixed = attention[-1].matrix.shape
            ends = [i for i, each in enumerate(others) if each.matrix.shape[0] == width != each.matrix.shape[1]]
            network = others[: ends[0] + 1] if ends else []
            blocks.append(Block(tuple(attention), tuple(network), max(1, mixed // _head_dim(subject.config))))
    if not blocks:
        raise CombinationError(f"the layers of {type(subject.model).__name__} are not told by its linear layers.")
    return blocks


def _head_dim(config: Any) -> int:
    if isinstance(told := getattr(config, "head_dim", None), int):
        return told
    heads = _configured(config, "num_attention_heads", "n_head", "num_heads")
    if isinstance(heads, int):
        return int(_configured(config, "hidden_size", "n_embd", "dim") // heads)
    return int(config.embed_dim // heads[0])  # Swin's stages have wider states, and more heads of one width


def _configured(config: Any, *names: str) -> Any:
    return next(getattr(config, name) for name in names if hasattr(config, name))


@contextmanager
def _watching(model: nn.Module, found: list[Product]) -> Iterator[None]:
    def note(path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().flatten(0, -2)
        found.append(Product(path, layer, rows.abs().amax(dim=0).float(), len(rows)))

    hooks = [
        layer.register_forward_pre_hook(partial(note, path))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
