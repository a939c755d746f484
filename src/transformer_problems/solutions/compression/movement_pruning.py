"""Movement pruning: weights that fine-tuning moves towards zero leave, however large they are."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_share, require_share_below_one
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    replace_linears,
    replace_modules,
    treated_copy,
)
from transformer_problems.solutions.compression.sparse_linear import SparseLinear, strongest


class MovementLinear(nn.Module):
    """A linear layer in training that learns which of its weights to keep: those of the largest `scores`.

    With W' = W * keep, the gradient of a score is dL/dW' * W, as if the choice were the score itself (straight-through
    estimator), so gradient descent makes the scores S = -lr * sum of dL/dW' * W: they rise where W moves away from zero
    and fall where it moves towards it. Weights that are left out do not move, but their scores do, so that they may
    come back. It is no nn.Linear, so that no other transform takes its unmasked weight for what it computes.

    Shape:
        x: [..., I]; output: [..., O]; weight, scores: [O, I]; keep: [O, I] bool, True for weights that are used.
    """

    made_by: TransformKind = "prune"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        # scores are running sums of small steps, for which half precision is too coarse
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.scores = nn.Parameter(torch.zeros_like(layer.weight, dtype=dtype))
        self.keep: Tensor
        self.register_buffer("keep", torch.ones_like(layer.weight, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        keep = self.keep + (self.scores - self.scores.detach())  # the value of keep, with a gradient of 1
        return nn.functional.linear(x, self.weight * keep.to(self.weight.dtype), self.bias)

    def select(self, sparsity: float) -> None:
        """Keep the weights of the largest scores, all but that share."""
        flat = strongest(self.scores.detach().reshape(1, -1), "scores", sparsity, None)
        self.keep.copy_(flat.view_as(self.keep))


class MovementPruning:
    """While a trained model is fine-tuned, puts more and more weights to zero, those that move towards zero.

    A weight may be large only because the task before needed it: magnitude keeps it, its movement shows that the new
    task does not. The transform gives a copy to train; `regulate`, as one of a recipe's regulators, chooses the weights
    anew before each step; `finish` gives a model with real zeros, as the other prunings leave. The share of zeros rises
    from 0 as sparsity * (1 - (1 - t)^3), fast where much is left to choose from, with t from 0 to 1 between the warmup
    and the cooldown. A step computes as many products as before and holds a score for each weight.

    The optimizer must be made for the copy, for it trains the scores as well. Their learning rate does not matter,
    since only their order counts, but weight decay makes them forget early movement.

    Args:
        sparsity: Share of each layer's weights that is zero in the end.
        warmup: Share of the steps before the first zeros.
        cooldown: Share of the steps after the last.
        skip: Patterns, as in fnmatch, of the paths of layers to leave alone, such as a head that starts at random.

    Raises:
        ArgumentError: If a share does not fit, there is nothing to prune, weights are shared or not finite, or a model
            to be finished was not trained.
        CombinationError: If the model was fused, rounded or adapted before, or one to be regulated or finished is not
            what the transform gave.

    Source:
        Sanh et al. 2020, arXiv:2005.07683, section 4, its hard variant; the schedule: Zhu and Gupta 2017,
        arXiv:1710.01878, equation 1. Differs from the paper: one learning rate for weights and scores, and the weights
        are chosen once a step, before it, where the paper's code chooses them in each forward pass.

    Example:
        >>> import torch
        >>> from transformer_problems import MovementPruning, TrainingRecipe, adamw
        >>> trained = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> pruning = MovementPruning(0.75)
        >>> model = pruning(trained)
        >>> recipe = TrainingRecipe(adamw(1e-3, weight_decay=0.0), regulators=(pruning.regulate,))
        >>> course = recipe.start(model, num_steps=100)
        >>> for step in range(100):
        ...     norm = course.step(model(torch.randn(16, 8)).square().mean())
        >>> int((pruning.finish(model)[0].weight == 0).sum())  # of 64
        48
    """

    kind: TransformKind = "prune"

    def __init__(
        self, sparsity: float, *, warmup: float = 0.1, cooldown: float = 0.2, skip: Sequence[str] = ()
    ) -> None:
        require_share_below_one(sparsity=sparsity)
        require_share(warmup=warmup, cooldown=cooldown)
        if warmup + cooldown >= 1:
            raise ArgumentError(
                f"warmup and cooldown must leave steps between them; got {warmup} and {cooldown}. Choose e.g. 0.1 and "
                "0.2."
            )
        self.sparsity, self.warmup, self.cooldown = sparsity, warmup, cooldown
        self.skip = as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        learning = treated_copy(model, self)
        replace_linears(learning, lambda path, layer: MovementLinear(layer), skip=self.skip)
        return learning

    def regulate(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Choose the weights of a step, counted from 0, of a training of `num_steps`."""
        for layer in _learning_layers(model):
            layer.select(self.sparsity_at(step, num_steps))

    def sparsity_at(self, step: int, num_steps: int) -> float:
        """The share of zeros at a step."""
        between = (step / num_steps - self.warmup) / (1 - self.warmup - self.cooldown)
        return self.sparsity * (1 - (1 - min(max(between, 0.0), 1.0)) ** 3)

    def finish(self, model: nn.Module) -> nn.Module:
        """A copy whose layers have the full share of zeros, by the scores as they are, and no scores."""
        finished = copy.deepcopy(model)
        layers = _learning_layers(finished)
        if not any(layer.scores.any() for layer in layers):
            raise ArgumentError(
                "model must have been trained, for its scores to choose; all of them are zero. Make the optimizer for "
                "what the transform gives."
            )
        for layer in layers:
            layer.select(self.sparsity)
        return _with_zeros(finished)

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        learning = self(model)
        return learning if any(name.endswith(".scores") for name in tensors) else _with_zeros(learning)

    def __repr__(self) -> str:
        return f"MovementPruning(sparsity={self.sparsity})"


def _learning_layers(model: nn.Module) -> list[MovementLinear]:
    found = [part for part in model.modules() if isinstance(part, MovementLinear)]
    if not found:
        raise CombinationError(
            f"{type(model).__name__} learns no scores for its weights. Train and finish what the transform gives: "
            "model = MovementPruning(0.5)(model)."
        )
    return found


def _with_zeros(model: nn.Module) -> nn.Module:
    """The model itself, with a SparseLinear in the place of each layer that learned its zeros."""

    def made(path: str, part: nn.Module) -> nn.Module:
        assert isinstance(part, MovementLinear)
        return SparseLinear.from_weights(part.weight, part.bias, part.keep)

    replace_modules(model, lambda path, part: isinstance(part, MovementLinear), made)
    return model
