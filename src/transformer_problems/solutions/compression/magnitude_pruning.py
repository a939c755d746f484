"""Magnitude pruning: the smallest weights go to zero."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.transforms import TransformKind, as_patterns, replace_linears, treated_copy
from transformer_problems.solutions.compression.sparse_linear import Pattern, SparseLinear, check_sparsity, strongest

Scope = Literal["row", "layer", "model"]


class MagnitudePruning:
    """Puts the smallest weights of linear layers to zero and keeps them there while training goes on.

    Zeros save neither time nor memory by themselves: the matrices stay dense.

    Args:
        sparsity: Share of the weights put to zero.
        pattern: In its place (zeros, of so many): (2, 4) is what some GPUs multiply faster.
        scope: Among which weights the smallest are sought: each "row", each "layer", or the whole "model".
        skip: Patterns, as in fnmatch, of the paths of layers to leave alone.

    Raises:
        ArgumentError: If a share, pattern or scope does not fit, or weights are shared or not finite.
        CombinationError: If the model was fused, rounded or adapted before.

    Source:
        Han et al. 2015, arXiv:1506.02626, section 3.
    """

    kind: TransformKind = "prune"

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        pattern: Pattern | None = None,
        scope: Scope = "layer",
        skip: Sequence[str] = (),
    ) -> None:
        check_sparsity(sparsity, pattern)
        if scope not in get_args(Scope):
            raise UnknownNameError("scope", scope, get_args(Scope))
        if pattern is not None and scope != "layer":
            raise ArgumentError(f"scope must be left out with a pattern, which says it itself; got {scope!r}.")
        self.sparsity, self.pattern, self.scope, self.skip = sparsity, pattern, scope, as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        pruned = treated_copy(model, self)
        layers: dict[str, nn.Linear] = {}
        replace_linears(pruned, lambda path, layer: layers.setdefault(path, layer), skip=self.skip)
        masks = self._masks({path: layer.weight.detach().abs() for path, layer in layers.items()})
        replace_linears(pruned, lambda path, layer: SparseLinear.from_linear(layer, masks[path]), skip=self.skip)
        return pruned

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def __repr__(self) -> str:
        share = f"sparsity={self.sparsity}" if self.pattern is None else f"pattern={self.pattern}"
        return f"MagnitudePruning({share}, scope={self.scope!r})"

    def _masks(self, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.pattern is not None or self.scope == "row":
            return {path: strongest(size, path, self.sparsity, self.pattern) for path, size in sizes.items()}
        if self.scope == "layer":
            flat = {path: strongest(size.view(1, -1), path, self.sparsity, None) for path, size in sizes.items()}
            return {path: keep.view_as(sizes[path]) for path, keep in flat.items()}
        whole = torch.cat([size.float().flatten() for size in sizes.values()])[None]
        parts = strongest(whole, "the model", self.sparsity, None)[0].split([size.numel() for size in sizes.values()])
        return {path: part.view_as(size) for part, (path, size) in zip(parts, sizes.items(), strict=True)}
