"""Transfer: a new model starts from what another has learned, and at first only its head learns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.solutions.training.local_hook import LocalHook


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What became of the target's parameters and buffers, by name.

    Args:
        copied: Equal to the source's now.
        new: Unknown to the source, such as another head; as they were.
        other_shape: Of another shape in the source; as they were.
        skipped: As they were, on request.
    """

    copied: tuple[str, ...]
    new: tuple[str, ...]
    other_shape: tuple[str, ...]
    skipped: tuple[str, ...]


def transfer_weights(source: nn.Module, target: nn.Module, *, skip: Sequence[str] = ()) -> TransferReport:
    """Copies every saved parameter and buffer of `source` to the one of the same name and shape in `target`.

    Layers trained on a large task compute features that serve related ones too; the lower the layer, the more general.
    Values take the target's dtype and device; a buffer that is not saved with its model is not copied.

    Args:
        source: A trained model.
        target: Another, changed in place.
        skip: Names in the target of parameters, buffers or modules to leave as they are, e.g. `["head"]`.

    Raises:
        ArgumentError: If there is nothing to copy, or `skip` names what the target has not.

    Source:
        Yosinski et al. 2014, arXiv:1411.1792, section 2.
        Differs from the paper: every layer that fits is copied, not the first n.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import transfer_weights
        >>> trained, model = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, n)) for n in (100, 2))
        >>> report = transfer_weights(trained, model)
        >>> report.copied, report.other_shape
        (('0.weight', '0.bias'), ('1.weight', '1.bias'))
    """
    given, taken = _tensors(source), _tensors(target)
    parts = [*(name for name, _ in target.named_modules()), *taken]
    for name in skip:
        if name not in parts:
            raise UnknownNameError("part of the target", name, parts)
    skipped = [key for key in taken if any(_belongs(key, name) for name in skip)]
    rest = [key for key in taken if key not in skipped]
    copied = [key for key in rest if key in given and given[key].shape == taken[key].shape]
    if not copied:
        raise ArgumentError(
            f"source and target must share a name and shape; {type(source).__name__} and {type(target).__name__} share "
            "none that is not skipped. Build both alike, but for the head."
        )
    for key in copied:
        taken[key].copy_(given[key])
    new = [key for key in rest if key not in given]
    other_shape = [key for key in rest if key in given and key not in copied]
    return TransferReport(tuple(copied), tuple(new), tuple(other_shape), tuple(skipped))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and saved buffers, by name; they share memory with the model."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _belongs(key: str, name: str) -> bool:
    """Whether a parameter is the named one or lies in the module of that name."""
    return key == name or key.startswith(f"{name}.")


@contextmanager
def linear_probe(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Inside, only the head learns: all other parameters are frozen, and all other modules compute as in evaluation.

    So dropout outside the head rests, and running means there stay, whatever `model.train()` says. With few labels a
    linear head on features as they are learns more than it overfits; and no gradient passes below it, which is cheap.
    On exit, also after an error, parameters learn as before; the head keeps what it learned. Frozen parameters have no
    gradient, so an optimizer may hold all of the model's. A copy made inside, also by pickle, has the frozen parameters
    frozen for good, until `requires_grad_(True)`; its modules compute in their own modes.

    Args:
        model: A trained model, used through its modules' calls.
        head: The module of it that learns.

    Raises:
        ArgumentError: If the head is the model itself or none of its modules, or has no parameters.

    Source:
        Yosinski et al. 2014, arXiv:1411.1792, section 2 (frozen transfer); Alain and Bengio 2016, arXiv:1610.01644
        (linear probes).

    Example:
        >>> import torch
        >>> from transformer_problems import TrainingRecipe, adamw, linear_probe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
        >>> with linear_probe(model, head=model[2]):
        ...     course = TrainingRecipe(adamw(1e-2)).start(model, num_steps=10)
        ...     norm = course.step(model(torch.ones(2, 4)).square().mean())
    """
    if head is model or all(module is not head for module in model.modules()):
        raise ArgumentError(
            f"head must be a module inside the model; {type(head).__name__} is none of {type(model).__name__}'s. "
            "Pass e.g. model.head."
        )
    learned, kept = set(head.parameters()), set(head.modules())
    if not learned:
        raise ArgumentError(f"head must have parameters; {type(head).__name__} has none. Pass the layer that learns.")
    frozen = [(p, p.requires_grad) for p in model.parameters() if p not in learned]
    rests = [_Rest(module) for module in model.modules() if module not in kept]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for rest in rests:
            rest.end()
        for parameter, learns in frozen:
            parameter.requires_grad_(learns)


class _Rest:
    """Puts a module in evaluation mode for the time of each of its forward passes."""

    def __init__(self, module: nn.Module) -> None:
        self.modes: list[bool] = []  # those before the passes under way, of which a module may have several
        self.hooks = (
            module.register_forward_pre_hook(LocalHook(self.begin_pass)),
            module.register_forward_hook(LocalHook(self.end_pass), always_call=True),
        )

    def begin_pass(self, module: nn.Module, inputs: Any) -> None:
        self.modes.append(module.training)
        module.training = False

    def end_pass(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module.training = self.modes.pop()

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
