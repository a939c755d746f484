"""Dense long skips: each layer reads a learned average of everything before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int


class DenseSkips(nn.Module):
    """Layer i reads sum_j a_ij h_j over the embeddings h_0 and the outputs h_1 ... h_i of all layers before it.

    The weights a are learned scalars of any sign, i + 1 for layer i. They start as 1 on the latest output and 0 on all
    others, so an untrained stack is what it is without them. L (L + 1) / 2 - 1 parameters and as many weighted sums
    of [..., C]; all outputs stay in memory.

    Args:
        num_layers: L.

    Shape:
        history: i + 1 tensors [..., C], the embeddings first; output: [..., C].

    Raises:
        ArgumentError: If the number of layers is not positive.

    Source:
        Pagliardini et al. 2024, arXiv:2402.02622, section 3.1 (DenseFormer without dilation).
        Differs from the paper: the average after the last layer is left out.
    """

    def __init__(
        self, num_layers: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require_positive_int(num_layers=num_layers)
        self.num_layers = num_layers
        self.weights = nn.ParameterList(
            torch.eye(num_sources, device=device, dtype=dtype)[-1].clone() for num_sources in range(2, num_layers + 1)
        )

    def forward(self, history: Sequence[Tensor]) -> Tensor:
        latest = history[-1]
        if len(history) == 1:
            return latest
        weights = self.weights[len(history) - 2].to(torch.promote_types(latest.dtype, torch.float32))
        y = torch.zeros((), dtype=weights.dtype, device=latest.device)
        # one term after the other, so that nothing but the outputs themselves is kept for the backward pass
        for weight, source in zip(weights.split(1), history, strict=True):
            y = y + weight * source
        return y.to(latest.dtype)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}"
