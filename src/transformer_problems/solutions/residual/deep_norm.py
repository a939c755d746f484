"""DeepNorm: post-norm with a stronger skip and smaller initial weights, the more so the deeper the stack."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.slots import NormFactory


class DeepNorm(nn.Module):
    """norm(alpha * x + sublayer(x)) with alpha = (2 L)^(1/4), and initial weights times beta = (8 L)^(-1/4).

    One step of training on the matrices then changes the output of the whole stack by as much at any depth, so that
    post-norm stacks of hundreds of layers train. Nothing is learned beyond the norm. `adopt` does the scaling: of the
    value and output projections of a mixer, or of all linear layers of a feed-forward network. A mixer that
    normalises its values, as DifferentialAttention does, undoes their share.

    Args:
        embed_dim: C.
        num_layers: L, the layers of the stack that it is part of.
        norm: Makes the norm, e.g. nn.LayerNorm, nn.RMSNorm.

    Shape:
        x: [..., C]; output: [..., C].

    Raises:
        ArgumentError: If the number of layers is not positive.
        CombinationError: In `adopt`, if the sublayer has no such layers.

    Source:
        Wang et al. 2022, arXiv:2203.00555, figure 2: the factors of an encoder alone and of a decoder alone, which are
        the same. Differs from the paper: those of an encoder with a decoder are left out; whatever initial weights
        there are, biases too, are multiplied by beta, where the paper draws Xavier's with a gain of beta.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_layers: int,
        norm: NormFactory = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_layers=num_layers)
        self.num_layers = num_layers
        self.alpha, self.beta = (2.0 * num_layers) ** 0.25, (8.0 * num_layers) ** -0.25
        self.norm = norm(embed_dim, device=device, dtype=dtype)

    def adopt(self, sublayer: object) -> None:
        """Multiply the initial weights of a sublayer by beta, in place; to be called once."""
        with torch.no_grad():
            for linear in _linears_to_scale(sublayer):
                for parameter in linear.parameters():
                    parameter.mul_(self.beta)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        y: Tensor = self.norm(self.alpha * x + sublayer(x))
        return y

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}"


def _linears_to_scale(sublayer: object) -> list[nn.Linear]:
    """Value and output projections of a mixer, wrapped ones too; all linear layers of anything else.

    Raises:
        CombinationError: If there are none.
    """
    modules = sublayer.named_modules() if isinstance(sublayer, nn.Module) else ()
    linears = [(path.rpartition(".")[2], module) for path, module in modules if isinstance(module, nn.Linear)]
    if not hasattr(sublayer, "is_causal"):  # what every mixer has, and no feed-forward network
        if not linears:
            raise CombinationError(
                f"DeepNorm scales the linear layers of a feed-forward network; {type(sublayer).__name__} has none. "
                "Build it of nn.Linear, or use another residual, such as PreNorm."
            )
        return [linear for _, linear in linears]
    values = [linear for name, linear in linears if name == "v_proj" or name.endswith("_v_proj")]
    outputs = [linear for name, linear in linears if name == "out_proj"]
    if not values or not outputs:
        raise CombinationError(
            f"DeepNorm scales the linear v_proj and out_proj of a mixer; {type(sublayer).__name__} has "
            f"{len(values)} and {len(outputs)} of them. Use SelfAttention, or another residual, such as PreNorm."
        )
    return values + outputs
