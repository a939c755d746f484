"""Gradient checkpointing: keep a few activations in the forward pass, compute the others again in the backward."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer_problems.core.errors import ArgumentError, CombinationError


@contextmanager
def checkpoint_layers(model: nn.Module, *, every: int | Literal["sqrt"] = "sqrt") -> Iterator[None]:
    """Inside, the model's layers keep only the input of every segment of layers for the backward pass.

    The backward pass runs each segment forward once more, so L layers hold the inputs of L / s segments and, for a
    moment, the activations of s layers. Were a layer's activations as large as its input, s = sqrt(L) would hold
    least, and memory grow as the square root of depth; they are many times larger, so s = 1 often holds less. The cost
    is one extra forward pass of the layers. Gradients and random draws are those of the plain model. On exit, also
    after an error, the model is as it was; passes begun inside may still be differentiated. Passes without gradients
    are not changed.

    Layers are the entries of every ModuleList named `blocks`, as in Encoder and Decoder. A segment's first layer stands
    for all of it, and the others pass its output on, so forward hooks on layers see segments. Of nested contexts the
    innermost holds.

    Args:
        model: A model whose `blocks` are called one after the other with the same keywords.
        every: Layers in a segment; "sqrt" is the rounded square root of their number.

    Raises:
        ArgumentError: If `every` is not a positive number or "sqrt", or the model has no blocks.
        CombinationError: In a forward pass, if the model does something between its blocks; in a stream with gradients.

    Source:
        Chen et al. 2016, arXiv:1604.06174, section 4. Differs from the paper: segments are whole layers, and the
        recomputing is torch.utils.checkpoint's.

    Example:
        >>> with checkpoint_layers(model):  # doctest: +SKIP
        ...     loss = model(tokens).square().mean()
        ...     loss.backward()
    """
    if every != "sqrt" and not (isinstance(every, int) and every > 0):
        raise ArgumentError(f"every must be a positive number of layers or 'sqrt'; got {every!r}. Choose 'sqrt'.")
    named = [getattr(module, "blocks", None) for module in model.modules()]
    stacks = [list(blocks) for blocks in named if isinstance(blocks, nn.ModuleList)]
    if not any(stacks):
        raise ArgumentError(
            f"model must have a ModuleList `blocks` of layers; {type(model).__name__} has none. "
            "Pass a Decoder or an Encoder."
        )
    before: list[tuple[nn.Module, str, Any]] = []  # a block's own `forward` or `stream`, None where it has its class's

    def replace(block: nn.Module, name: str, method: Callable[..., Any]) -> None:
        before.append((block, name, vars(block).get(name)))
        setattr(block, name, method)

    try:
        for blocks in stacks:
            size = max(1, round(math.sqrt(len(blocks)))) if every == "sqrt" else every
            for start in range(0, len(blocks), size):
                segment = blocks[start : start + size]
                layers = _Segment([_own_forward(block) for block in segment])
                for i, block in enumerate(segment):
                    replace(block, "forward", _Place(layers, i))
                    if (own_stream := getattr(block, "stream", None)) is not None:
                        replace(block, "stream", partial(_stream, own_stream))
        yield
    finally:
        for block, name, method in reversed(before):
            if method is None:
                delattr(block, name)
            else:
                setattr(block, name, method)


class _Segment:
    """Layers that run as one: the first runs them all, behind a checkpoint, and the others pass the output on."""

    def __init__(self, layers: list[Callable[..., Tensor]]) -> None:
        self.layers = layers
        self.passed: tuple[Tensor, dict[str, Any]] | None = None  # between the first layer's call and the last's

    def run(self, x: Tensor, **keywords: Any) -> Tensor:
        # Recomputing comes later, on any thread, and must see this run's context variables, such as packed lengths.
        # A compiler, which knows no contexts, traces it now.
        called = (self._plain,) if torch.compiler.is_compiling() else (copy_context().run, self._plain)
        y: Tensor = checkpoint(*called, x, use_reentrant=False, **keywords)
        return y

    def _plain(self, x: Tensor, **keywords: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **keywords)
        return x

    def check(self, x: Tensor, keywords: dict[str, Any]) -> None:
        """That a later layer is called with what the first one gave, and nothing else."""
        y, expected = (None, {}) if self.passed is None else self.passed
        if x is not y or keywords.keys() != expected.keys() or any(keywords[k] is not expected[k] for k in keywords):
            self.passed = None
            raise CombinationError(
                "checkpoint_layers needs layers that are called one after the other, each with the output of the one "
                "before and the same keywords; this model does something between them. Use every=1."
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A layer's place in its segment: what it does instead of its own forward."""

    segment: _Segment
    index: int

    @property
    def own_forward(self) -> Callable[..., Tensor]:
        return self.segment.layers[self.index]

    def __call__(self, x: Tensor, **keywords: Any) -> Tensor:
        if self.index == 0:
            x = self.segment.run(x, **keywords)
            self.segment.passed = x, keywords
        else:
            self.segment.check(x, keywords)
        if self.index == len(self.segment.layers) - 1:
            self.segment.passed = None
        return x


def _own_forward(block: nn.Module) -> Callable[..., Tensor]:
    """The layer's own forward, also inside another context, whose segments would cut across these.

    A segment recomputes its layers alone, and an outer segment's later layers wait for their first one.
    """
    forward: Callable[..., Tensor] = block.forward
    return forward.own_forward if isinstance(forward, _Place) else forward


def _stream(own_stream: Callable[..., Any], *arguments: Any) -> Any:
    if torch.is_grad_enabled():
        raise CombinationError(
            "checkpoint_layers recomputes whole passes; got a stream with gradients, which it would leave as it is. "
            "Call the model itself, or stream inside torch.no_grad()."
        )
    return own_stream(*arguments)
