"""A training recipe: everything of a training loop but the model, the data and how long it runs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError, DivergedError

OptimizerFactory = Callable[[nn.Module], optim.Optimizer]
"""Makes the optimizer of a model, at its peak learning rate."""

ParameterGroups = Callable[[nn.Module, float], list[dict[str, Any]]]
"""(model, peak learning rate) -> the parameter groups of a PyTorch optimizer."""

Schedule = Callable[[int, int], float]
"""(step, number of steps) -> factor on the learning rate of every group; steps count from 0."""

Clipping = Callable[[list[nn.Parameter]], Tensor]
"""Limits gradients in place, unless one is not finite; gives the norm of the whole gradient as it was."""

Regulator = Callable[[nn.Module, int, int], None]
"""(model, step, number of steps): sets the model up for a step, e.g. a scheduled rate of dropped heads."""


def all_alike(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """All of the model's parameters in one group."""
    return [{"params": list(model.parameters())}]


def constant(step: int, num_steps: int) -> float:
    """The peak learning rate at every step."""
    return 1.0


def no_clipping(parameters: list[nn.Parameter]) -> Tensor:
    """The gradient stays as it is; its norm is given all the same."""
    gradients = dense_gradients(parameters)
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def dense_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients of the parameters that have one.

    Raises:
        CombinationError: If one is sparse: neither clipping nor Adam takes such.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        if gradient.layout != torch.strided:
            raise CombinationError(
                f"gradients must be dense; that of a parameter {list(gradient.shape)} is sparse. Build the embedding "
                "with sparse=False."
            )
    return gradients


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """How to train: the optimizer, its schedule, what limits the gradient, what changes from step to step.

    A recipe holds no state and serves any number of models; `start` begins the training of one.

    Args:
        optimizer: Makes the optimizer, e.g. `adamw(1e-3)`.
        schedule: Factor on the learning rate at each step, e.g. `Warmup(100)`.
        clipping: Limits the gradient, e.g. `GradientClipping(1.0)`.
        regulators: What else changes in the model from step to step, e.g. `(GradualUnfreezing(50),)`.

    Raises:
        ArgumentError: If a part is not callable, such as an optimizer in place of what makes one, or `regulators` is
            no tuple.

    Example:
        >>> import torch
        >>> from transformer_problems import GradientClipping, TrainingRecipe, Warmup, adamw
        >>> model = torch.nn.Linear(4, 1)
        >>> recipe = TrainingRecipe(adamw(1e-2), schedule=Warmup(10), clipping=GradientClipping(1.0))
        >>> course = recipe.start(model, num_steps=100)
        >>> for step in range(100):
        ...     norm = course.step(model(torch.randn(8, 4)).square().mean())
    """

    optimizer: OptimizerFactory
    schedule: Schedule = constant
    clipping: Clipping = no_clipping
    regulators: tuple[Regulator, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, example in _PARTS.items():
            part = getattr(self, name)
            if not callable(part):
                raise ArgumentError(f"{name} must be a function; got a {type(part).__name__}. Pass e.g. {example}.")
        if not isinstance(self.regulators, tuple) or not all(map(callable, self.regulators)):
            raise ArgumentError(
                f"regulators must be a tuple of functions; got {self.regulators!r}. Pass e.g. (GradualUnfreezing(50),)."
            )

    def start(self, model: nn.Module, num_steps: int) -> "TrainingCourse":
        """Begin to train a model for that many steps; the schedule's value at the last holds for any further ones."""
        return TrainingCourse(self, model, num_steps)


_PARTS = {"optimizer": "adamw(1e-3)", "schedule": "Warmup(100)", "clipping": "GradientClipping(1.0)"}


class TrainingCourse:
    """One model in training: takes losses, makes steps, and can be saved between any two of them.

    Gradients are cleared at the start and after each step. Those of `backward()` calls in between add to the step's, so
    a batch may come in parts: all but the last by `(loss / parts).backward()`, the last by `step(loss / parts)`.
    GradScaler, which must see the gradients before clipping, is not supported: train in bfloat16 or float32.

    Args:
        recipe: How to train.
        model: What is trained, in place.
        num_steps: How many steps the schedule spans.

    Raises:
        ArgumentError: If the number of steps is not positive.
        CombinationError: If the optimizer is LBFGS, which computes the loss several times a step.
    """

    def __init__(self, recipe: TrainingRecipe, model: nn.Module, num_steps: int) -> None:
        require_positive_int(num_steps=num_steps)
        self.recipe, self.model, self.num_steps = recipe, model, num_steps
        self.num_done = 0
        self.optimizer = recipe.optimizer(model)
        if isinstance(self.optimizer, optim.LBFGS):
            raise CombinationError(
                "optimizer must step from one gradient; LBFGS computes the loss several times a step. Use adamw(1e-3), "
                "or a loop of your own."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self._scheduler = optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.schedule(min(step, num_steps - 1), num_steps)
        )
        self._regulate()

    def step(self, loss: Tensor) -> Tensor:
        """Backward pass, clipping, optimizer, schedule; gives the norm of the gradient before clipping.

        After an error the weights are as they were before the step, and the gradients are cleared.

        Raises:
            ArgumentError: If no parameter of the optimizer gets a gradient, as from another model's loss.
            DivergedError: If the loss or a gradient is not finite.
        """
        try:
            norm = self._gradient(loss)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        self.num_done += 1
        self._regulate()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights that the next step depends on, PyTorch's random state included.

        Its tensors are the optimizer's own, as in PyTorch's state dicts: save or copy them before the next step.
        """
        return {
            "num_steps": self.num_steps,
            "num_done": self.num_done,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit by bit the same once the model's weights are loaded as well.

        Raises:
            ArgumentError: If it was taken in a course of another number of steps.
        """
        if state.get("num_steps") != self.num_steps:
            raise ArgumentError(
                f"state must be of a course with num_steps={self.num_steps}; got one with "
                f"num_steps={state.get('num_steps')}. Start this one with that many."
            )
        self.num_done = state["num_done"]
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._regulate()  # before the random state, which was taken after it
        torch.set_rng_state(state["random"].cpu())  # random states live on the CPU, also those of devices
        for i, random in enumerate(state["random_cuda"]):
            torch.cuda.set_rng_state(random.cpu(), i)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Computes and clips the gradient; gives its norm before that."""
        if not bool(torch.isfinite(loss)):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.num_done}. Lower the learning rate, and look at the batch."
            )
        loss.backward()
        trained = self._trained()
        if all(parameter.grad is None for parameter in trained):
            raise ArgumentError(
                "loss must depend on what the optimizer trains; none of its parameters got a gradient. Pass the loss "
                f"of the {type(self.model).__name__} that this course was started with."
            )
        norm = self.recipe.clipping(trained)
        if not bool(torch.isfinite(norm)):
            raise DivergedError(
                f"the gradient's norm is {norm.item()} at step {self.num_done}, first in the backward pass at "
                f"{self._last_broken_gradient()}. Lower the learning rate or clip sooner, and look at the batch."
            )
        return norm

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _regulate(self) -> None:
        for regulate in self.recipe.regulators:
            regulate(self.model, self.num_done, self.num_steps)

    def _last_broken_gradient(self) -> str:
        """The parameter nearest to the output whose gradient is not finite: the backward pass meets it first.

        One of the optimizer's that is none of the model's is taken for part of the loss, nearer than all others.
        """
        broken = [p for p in self._trained() if p.grad is not None and not p.grad.isfinite().all()]
        if not broken:
            return "the sum of finite gradients"
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        order = {key: i for i, key in enumerate(names)}
        last = max(broken, key=lambda parameter: order.get(id(parameter), len(order)))
        return names.get(id(last), f"a parameter {list(last.shape)} outside the model")
