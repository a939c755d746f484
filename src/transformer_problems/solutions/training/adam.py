"""Adam, alone or with the L2 penalty that AdamW replaces."""

import math

from torch import nn, optim

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.recipe import OptimizerFactory, ParameterGroups, all_alike


def adam(
    learning_rate: float,
    *,
    l2: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    groups: ParameterGroups = all_alike,
) -> OptimizerFactory:
    """Makes PyTorch's Adam for a model; `l2` times each weight is added to its gradient before Adam scales it.

    Args:
        learning_rate: Peak rate, of the group that learns fastest.
        l2: Weight of the penalty 1/2 |w|^2.
        betas: Decay of the running mean of gradients and of their squares.
        groups: Splits the parameters into groups with rates of their own.

    Raises:
        ArgumentError: If the rate is not positive and finite, the penalty is negative, or a beta is not from 0 to
            below 1.

    Source:
        Kingma and Ba 2014, arXiv:1412.6980, algorithm 1.
        Differs from the paper: the default betas are those of Vaswani et al. 2017, arXiv:1706.03762, section 5.3.

    Example:
        >>> import torch
        >>> from transformer_problems import TrainingRecipe, adam
        >>> model = torch.nn.Linear(4, 1)
        >>> course = TrainingRecipe(adam(1e-3, l2=0.01)).start(model, num_steps=100)
        >>> norm = course.step(model(torch.ones(2, 4)).square().mean())
    """
    check_adam(learning_rate, betas, l2=l2)

    def make(model: nn.Module) -> optim.Optimizer:
        return optim.Adam(groups(model, learning_rate), lr=learning_rate, betas=betas, weight_decay=l2)

    return make


def check_adam(learning_rate: float, betas: tuple[float, float], **penalty: float) -> None:
    """Refuse numbers that no form of Adam can train with; `penalty` is one, by its name.

    Raises:
        ArgumentError: With the name of the first.
    """
    require_positive(learning_rate=learning_rate)
    if not math.isfinite(learning_rate):
        raise ArgumentError(f"learning_rate must be finite; got {learning_rate}. Choose e.g. 1e-3.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ArgumentError(f"betas must be two numbers from 0 to below 1; got {betas}. Choose e.g. (0.9, 0.98).")
    for name, value in penalty.items():
        if not 0 <= value < math.inf:
            raise ArgumentError(f"{name} must be a finite number, not negative; got {value}. Use 0 for none.")
