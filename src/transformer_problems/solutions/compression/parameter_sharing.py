"""Parameter sharing: every layer of a stack is the same one."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import TransformKind, treated_copy


class ShareLayers:
    """Makes the layers of each stack (nn.ModuleList) one layer, or one for each group, that runs in all their places.

    Stored weights shrink by the number of layers in a group; compute stays, for each place still runs. A model that was
    trained with layers of its own forgets what all but the first of a group had learned: share before training.

    Args:
        groups: Layers that remain in each stack; neighbours share one.

    Raises:
        ArgumentError: If the model has no stack of alike layers, or one of fewer layers than groups.
        CombinationError: If the model was pruned, fused, rounded or adapted before.

    Source:
        Lan et al. 2019, arXiv:1909.11942, section 3.1.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import ShareLayers
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(6))})
        >>> len(list(ShareLayers(groups=2)(model).parameters()))
        4
    """

    kind: TransformKind = "share"

    def __init__(self, *, groups: int = 1) -> None:
        require_positive_int(groups=groups)
        self.groups = groups

    def __call__(self, model: nn.Module) -> nn.Module:
        shared = treated_copy(model, self)
        stacks = alike_stacks(shared)
        for path, stack in stacks.items():
            if len(stack) < self.groups:
                raise ArgumentError(
                    f"groups must be at most the layers of a stack; got {self.groups}, and {path} has {len(stack)}."
                )
            first: dict[int, nn.Module] = {}
            for i, layer in enumerate(stack):
                stack[i] = first.setdefault(i * self.groups // len(stack), layer)
        return shared

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy in which every place has a layer of its own again, all equal within a group."""
        untied = copy.deepcopy(model)
        for stack in alike_stacks(untied).values():
            seen: set[int] = set()
            for i, layer in enumerate(stack):
                if id(layer) in seen:
                    stack[i] = copy.deepcopy(layer)
                seen.add(id(layer))
        return untied

    def __repr__(self) -> str:
        return f"ShareLayers(groups={self.groups})"


def alike_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost stacks of two layers or more that have the same parts and shapes, by path.

    Raises:
        ArgumentError: If there is none; where a stack has layers of several forms, it names two and what differs.
    """
    found: dict[str, nn.ModuleList] = {}
    differing = ""
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not isinstance(part, nn.ModuleList) or len(part) < 2 or inside:
            continue
        difference = _difference(path, part)
        if not difference:
            found[path] = part
        differing = differing or difference
    if not found:
        raise ArgumentError(
            "model must hold an nn.ModuleList of two or more layers of one form; "
            f"{differing or f'this {type(model).__name__} has none.'}"
        )
    return found


def _difference(path: str, stack: nn.ModuleList) -> str:
    """Which layer cannot be the first one too, and why, in a sentence; empty where all are alike."""
    first, prefix = _form(stack[0]), f"{path}." if path else ""
    for i, layer in enumerate(stack):
        form = _form(layer)
        for name in (*first, *form):
            if first.get(name) != form.get(name):
                mine, theirs = form.get(name, "none"), first.get(name, "none")
                return (
                    f"{prefix}{i} and {prefix}0 differ in {name}, {mine} and {theirs}. Share before what made them so."
                )
    return ""


def _form(layer: nn.Module) -> dict[str, str]:
    """What layers that may share have in common: their class, and the names and shapes of what they store."""
    tensors = {name: value for name, value in layer.state_dict().items() if isinstance(value, Tensor)}
    return {"class": type(layer).__qualname__, **{name: str(list(t.shape)) for name, t in tensors.items()}}
