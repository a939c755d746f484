"""A linear layer some of whose weights are and stay zero, and how they are chosen."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_share_below_one, require_whole_numbers
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import TransformKind

Pattern = tuple[int, int]
"""(n, m): of every m weights in a row that follow each other, n are zero."""


class SparseLinear(nn.Linear):
    """A linear layer whose chosen weights are zero, in training too; its matrix stays dense and takes its full time.

    Shape:
        x: [..., I]; output: [..., O]; keep: [O, I] bool, True for weights that are used.
    """

    made_by: TransformKind = "prune"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.keep: Tensor
        self.register_buffer("keep", torch.ones(out_features, in_features, dtype=torch.bool, device=device))

    @classmethod
    def from_linear(cls, layer: nn.Linear, keep: Tensor) -> "SparseLinear":
        """The layer with the weights that are not kept at zero; shares nothing with it."""
        made = cls.from_weights(layer.weight, layer.bias, keep)
        for name, parameter in layer.named_parameters(recurse=False):
            getattr(made, name).requires_grad_(parameter.requires_grad)
        return made

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor | None, keep: Tensor) -> "SparseLinear":
        """The layer of such weights, with those that are not kept at zero; shares nothing with them."""
        outputs, inputs = weight.shape
        made = cls(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            made.keep.copy_(keep)
            made.weight.copy_(weight * keep)
            if bias is not None:
                made.bias.copy_(bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.keep, self.bias)


def check_sparsity(sparsity: float | None, pattern: Pattern | None) -> None:
    """Refuse what is no share of weights, or no pattern, or both or neither.

    Raises:
        ArgumentError: If so.
    """
    if (sparsity is None) == (pattern is None):
        raise ArgumentError(f"one of sparsity and pattern must be given; got {sparsity!r} and {pattern!r}.")
    if sparsity is not None:
        require_share_below_one(sparsity=sparsity)
    if pattern is None:
        return
    require_whole_numbers(pattern=pattern)
    if len(pattern) != 2 or not 0 <= pattern[0] < pattern[1]:
        raise ArgumentError(f"pattern must be (zeros, of so many), with fewer zeros, as (2, 4); got {pattern}.")


def strongest(scores: Tensor, path: str, sparsity: float | None, pattern: Pattern | None) -> Tensor:
    """Which entries of each row are kept, by score: [O, I] bool.

    Raises:
        ArgumentError: If the pattern does not divide a row.
    """
    rows, width = scores.shape
    group = width if pattern is None else pattern[1]
    if width % group:
        raise ArgumentError(
            f"pattern must divide the inputs of every layer; got {pattern} for {path} with {width}. Skip the layer."
        )
    num_zeros = int((sparsity or 0) * width) if pattern is None else pattern[0]
    grouped = scores.view(rows, -1, group)
    keep = torch.ones_like(grouped, dtype=torch.bool)
    keep.scatter_(-1, grouped.topk(num_zeros, dim=-1, largest=False).indices, False)
    return keep.view(rows, width)
