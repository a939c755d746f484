"""DropHead: whole attention heads are left out in training, at a rate that falls and rises again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_not_negative, require_share
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.slots import AttentionOp, PositionBias
from transformer_problems.core.wrapped_op import WrappedOp
from transformer_problems.solutions.attention.dense import DenseAttention


class DropHead(WrappedOp):
    """In training each head of each example is left out with probability `rate`, and the rest times H / kept.

    No few heads can carry the layer alone. The kept ones of an example are scaled by their own number, so that their
    sum stays of one size whatever the draw. In evaluation it is the op inside. Draws come from PyTorch's global
    generator, as those of nn.Dropout. All heads are computed, so a step costs what it cost before.

    Around PackedAttention a row of packed sequences would be one example: put it inside, PackedAttention(DropHead()).

    Args:
        op: The op inside. Default DenseAttention.
        rate: Probability, from 0 to 1; `DropHeadSchedule` sets it anew at each step.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: what the op inside takes; output: [..., H, N, D].

    Raises:
        ArgumentError: If the rate is not from 0 to 1.

    Source:
        Zhou et al. 2020, arXiv:2004.13342, algorithm 1.
        Differs from the paper: an example that would lose all heads keeps one, any with the same chance, since
        H / kept has no value there. Every head's mean output is then exactly what it is in evaluation.

    Example:
        >>> from transformer_problems import DropHead, SelfAttention
        >>> layer = SelfAttention(64, num_heads=4, op=DropHead(rate=0.2))
        >>> layer.op
        DropHead(
          rate=0.2
          (op): DenseAttention()
        )
    """

    def __init__(self, op: AttentionOp | None = None, *, rate: float = 0.0) -> None:
        super().__init__(DenseAttention() if op is None else op)
        require_share(rate=rate)
        self.rate = rate

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self._dropped(self.op(q, k, v, bias=bias, mask=mask, is_causal=is_causal))

    def stream(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next n tokens, where the op inside streams itself; in training each chunk has draws of its own."""
        y, state = self._streaming_op.stream(q, k, v, state)
        return self._dropped(y), state

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    def _dropped(self, y: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return y
        draws = torch.rand(y.shape[:-2], device=y.device)  # [..., H]
        kept = (draws >= self.rate) | (draws == draws.amax(dim=-1, keepdim=True))
        scale = kept * (kept.shape[-1] / kept.sum(dim=-1, keepdim=True))
        return y * scale.to(y.dtype)[..., None, None]


@dataclass(frozen=True, slots=True)
class DropHeadSchedule:
    """A regulator: the rate of every DropHead falls from `peak` to 0 over the warmup, then rises to `peak` at the end.

    Early on, when the loss falls fast, a high rate keeps any head from getting ahead; at the end it keeps the model
    from overfitting; in between the heads learn undisturbed.

    Args:
        peak: The rate of the first step and of the last.
        num_warmup_steps: Steps of the fall, those of the learning rate's warmup; at least one is made, and none that
            would reach beyond the last step. Default a tenth of all.

    Raises:
        ArgumentError: If the peak is not from 0 to 1, or the steps are negative.
        CombinationError: When called, if the model has no DropHead.

    Source:
        Zhou et al. 2020, arXiv:2004.13342, the V-shaped schedule of the rate.

    Example:
        >>> from transformer_problems import DropHead, DropHeadSchedule, SelfAttention, TrainingRecipe, Warmup, adamw
        >>> model = SelfAttention(64, num_heads=4, op=DropHead())
        >>> recipe = TrainingRecipe(adamw(1e-3), schedule=Warmup(10), regulators=(DropHeadSchedule(0.2, 10),))
        >>> course = recipe.start(model, num_steps=100)
        >>> model.op.rate
        0.2
    """

    peak: float
    num_warmup_steps: int | None = None

    def __post_init__(self) -> None:
        require_share(peak=self.peak)
        if self.num_warmup_steps is not None:
            require_not_negative(num_warmup_steps=self.num_warmup_steps)

    def __call__(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Set the rates for a step, counted from 0, of a training of `num_steps`."""
        dropped = [module for module in model.modules() if isinstance(module, DropHead)]
        if not dropped:
            raise CombinationError(
                f"{type(model).__name__} has no DropHead whose rate could be set. "
                "Build its attention with op=DropHead()."
            )
        for module in dropped:
            module.rate = self.rate(step, num_steps)

    def rate(self, step: int, num_steps: int) -> float:
        """The rate at a step; that of the last step holds for any further ones."""
        last = num_steps - 1
        if step >= last:
            return self.peak
        asked = num_steps // 10 if self.num_warmup_steps is None else self.num_warmup_steps
        valley = min(max(1, asked), last)
        if step < valley:
            return self.peak * (1 - step / valley)
        return self.peak * (step - valley) / (last - valley)
