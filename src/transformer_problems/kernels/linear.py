"""Linear layers that read their weights faster where they multiply a single row, as every step of decoding does."""

import torch
from torch import Tensor, nn

from transformer_problems.core.inputs import check_floating, check_same_dtype
from transformer_problems.kernels.single_row import is_row, row_product, takes_row


class Linear(nn.Linear):
    """torch.nn.Linear, answered by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as torch.nn.functional.linear gives it up to rounding.

    A single row in bfloat16 on a CPU becomes a matrix-vector product, which is limited by how fast the weights are
    read: by this package's kernel where `takes_row` says so, else by torch.mv.

    Shape:
        x: [..., I]; weight: [O, I]; bias: [O]; output: [..., O].

    Raises:
        ArgumentError: If x is no tensor of floats, or of another dtype than the weight, outside of autocast.
    """
    check_floating("x", x)
    check_same_dtype("x", x, weight, "Linear")
    if takes_row(x, weight):
        y = row_product(weight, x)
    elif is_row(x, weight):
        y = torch.mv(weight, x.reshape(-1)).reshape(*x.shape[:-1], -1)
    else:
        return nn.functional.linear(x, weight, bias)
    return y if bias is None else y + bias
