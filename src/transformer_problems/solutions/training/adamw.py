"""AdamW: weight decay that Adam's scaling does not touch."""

from torch import nn, optim

from transformer_problems.solutions.training.adam import check_adam
from transformer_problems.solutions.training.recipe import OptimizerFactory, ParameterGroups, all_alike


def adamw(
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    groups: ParameterGroups = all_alike,
) -> OptimizerFactory:
    """Makes PyTorch's AdamW for a model: each step also multiplies the weights by 1 - learning_rate * weight_decay.

    Adam with an L2 penalty adds the decay to the gradient, where the division by the gradient's own size weakens it
    just for the weights whose gradients are large. Here all weights decay alike.

    Args:
        learning_rate: Peak rate, of the group that learns fastest.
        weight_decay: Share of a weight that a step at rate 1 would take away.
        betas: Decay of the running mean of gradients and of their squares.
        groups: Splits the parameters into groups with rates of their own, e.g. `layerwise_learning_rates(0.75)`.

    Raises:
        ArgumentError: If the rate is not positive and finite, the decay is negative, or a beta is not from 0 to below
            1.

    Source:
        Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2.
        Differs from the paper: the decay is multiplied by the whole learning rate, as in PyTorch, not by its schedule
        alone; the default betas are those of Vaswani et al. 2017, arXiv:1706.03762, section 5.3.

    Example:
        >>> import torch
        >>> from transformer_problems import TrainingRecipe, adamw
        >>> model = torch.nn.Linear(4, 1)
        >>> course = TrainingRecipe(adamw(1e-3, weight_decay=0.1)).start(model, num_steps=100)
        >>> norm = course.step(model(torch.ones(2, 4)).square().mean())
    """
    check_adam(learning_rate, betas, weight_decay=weight_decay)

    def make(model: nn.Module) -> optim.Optimizer:
        return optim.AdamW(groups(model, learning_rate), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    return make
