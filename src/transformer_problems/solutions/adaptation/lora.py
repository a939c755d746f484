"""LoRA: beside each frozen matrix a product of two thin ones learns the new task."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive, require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.seeding import generator
from transformer_problems.core.transforms import TransformKind, replace_linears, treated_copy


class FrozenBase(Protocol):
    """A frozen matrix product that an adapter stands beside: a linear layer, or one whose weight is packed.

    `as_linear` gives a plain layer with a change added to its weight, [O, I].
    """

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...

    def as_linear(self, change: Tensor) -> nn.Linear: ...


class LoRALinear(nn.Module):
    """base(x) + alpha / R * B A x with a base that does not learn, A [R, I] and B [O, R].

    B starts at zero, so the layer starts as its base. Costs 2 R (I + O) FLOPs a token beside the base, and nothing
    once merged.

    Args:
        base: A linear layer, or a frozen one of packed weights.
        rank: R.
        alpha: The change is scaled by alpha / R, so that a learning rate suits any rank.
        dropout: Share of the adapter's inputs that are zeroed while training.
        draws: Where A's values come from.

    Shape:
        x: [..., I]; output: [..., O].
    """

    made_by: TransformKind = "adapt"

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0, draws: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        sizes = cast("FrozenBase", base)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device, dtype = _place_of(base)
        bound = 1 / math.sqrt(sizes.in_features)  # Kaiming uniform with a = sqrt(5), as nn.Linear starts
        start = (torch.rand(rank, sizes.in_features, generator=draws) * 2 - 1) * bound
        self.lora_a = nn.Parameter(start.to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(sizes.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        inputs = nn.functional.dropout(x, self.dropout, self.training)
        narrow = nn.functional.linear(inputs, self.lora_a)  # [..., R]
        rows, scale = y.shape[:-1].numel(), self.alpha / self.rank
        base = y.reshape(rows, y.shape[-1])
        return torch.addmm(base, narrow.reshape(rows, self.rank), self.lora_b.t(), alpha=scale).view_as(y)

    def change(self) -> Tensor:
        """alpha / R B A, [O, I], in float32 or wider."""
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        return (self.alpha / self.rank) * (self.lora_b.detach().to(wide) @ self.lora_a.detach().to(wide))

    def merged(self) -> nn.Module:
        """A plain layer whose weight is the base's and the change.

        Raises:
            CombinationError: If the base keeps some of its weights at zero.
        """
        if getattr(self.base, "keep", None) is not None:
            raise CombinationError(
                f"an adapter cannot be merged into a {type(self.base).__name__}, whose zeros it would fill. Keep it "
                "unmerged, or adapt first and prune the merged model."
            )
        if isinstance(self.base, nn.Linear):
            layer, weight = self.base, self.base.weight
            weight.data = (weight + self.change()).to(weight.dtype)
            return layer.requires_grad_(True)
        return cast("FrozenBase", self.base).as_linear(self.change())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class LoRA:
    """Freezes a model and puts adapters beside its linear layers.

    Only the adapters learn, and what `train` names. `merge` adds them into the weights, `undo` takes them out again.

    Args:
        rank: R, the width of an adapter.
        alpha: Adapters are scaled by alpha / R.
        dropout: Of the adapters' inputs.
        targets: Patterns, as in fnmatch, of the paths of the layers that get one.
        skip: Patterns of layers that get none all the same.
        train: Patterns of the parameters that learn beside the adapters, such as a new head: ("head.*",).
        seed: Of the adapters' start.

    Raises:
        ArgumentError: If a size does not fit, patterns name nothing, weights are shared or not finite.
        CombinationError: If the model has adapters already.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1. Differs from the paper: A starts uniform, not normal, as the
        authors' own code does.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import LoRA
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> adapted = LoRA(rank=4, targets=("0",), train=("2.*",))(model)
        >>> [name for name, p in adapted.named_parameters() if p.requires_grad]
        ['0.lora_a', '0.lora_b', '2.weight', '2.bias']
    """

    kind: TransformKind = "adapt"

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        targets: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
        train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        require_positive_int(rank=rank)
        require_positive(alpha=alpha)
        if not 0 <= dropout < 1:
            raise ArgumentError(f"dropout must be at least 0 and below 1; got {dropout}.")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.skip, self.train, self.seed = tuple(targets), tuple(skip), tuple(train), seed

    def __call__(self, model: nn.Module) -> nn.Module:
        return self._adapted(treated_copy(model, self))

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy without the adapters, as it was before; everything learns again.

        Raises:
            ArgumentError: If there are no adapters.
        """
        return replace_adapters(model, lambda adapter: adapter.base)

    def merge(self, model: nn.Module) -> nn.Module:
        """A copy whose weights hold the adapters' change; outputs are equal up to the weights' rounding.

        Raises:
            ArgumentError: If there are no adapters.
        """
        return replace_adapters(model, LoRALinear.merged)

    def base_of(self, path: str, layer: nn.Linear) -> nn.Module:
        """What an adapter stands beside."""
        return layer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, alpha={self.alpha:g}, targets={self.targets})"

    def _adapted(self, model: nn.Module) -> nn.Module:
        learning = _named(model, self.train)
        outside = [path for path, _ in _linears_of(model) if not _matches(path, self.targets)]
        draws = generator(self.seed, "lora")
        if len(outside) == len(_linears_of(model)):
            raise UnknownNameError("target", ", ".join(self.targets), [path for path, _ in _linears_of(model)])
        model.requires_grad_(False)
        replace_linears(model, lambda path, layer: self._adapter(path, layer, draws), skip=(*outside, *self.skip))
        for name in learning:
            model.get_parameter(name).requires_grad_(True)
        return model

    def _adapter(self, path: str, layer: nn.Linear, draws: torch.Generator) -> LoRALinear:
        smallest = min(layer.in_features, layer.out_features)
        if self.rank > smallest:
            raise ArgumentError(
                f"rank must be at most the smaller width of every layer; got {self.rank} for {path} of "
                f"{layer.in_features} x {layer.out_features}. Choose {smallest} or less, or skip the layer."
            )
        return LoRALinear(self.base_of(path, layer), self.rank, self.alpha, dropout=self.dropout, draws=draws)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a task adds to its base: the adapters and everything else that learns, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `adapter_state` gave into a model adapted in the same way, in place.

    Raises:
        ArgumentError: If the names or shapes are not those of what learns in the model; it is left as it was.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    strange = sorted(own.keys() ^ tensors.keys())
    if strange:
        raise ArgumentError(f"tensors must be those of what learns in the model; {strange[0]} is in one of them alone.")
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            raise ArgumentError(
                f"tensors must have the model's shapes; {name} is {tuple(tensors[name].shape)} in place of "
                f"{tuple(p.shape)}. Adapt the model with the same rank and targets."
            )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def replace_adapters(model: nn.Module, make: Callable[[LoRALinear], nn.Module]) -> nn.Module:
    """A copy with `make(adapter)` in the place of each adapter, shared ones once; everything in it learns."""
    copied = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a child's second name
            if isinstance(child, LoRALinear):
                if id(child) not in made:
                    made[id(child)] = make(child)
                setattr(parent, name, made[id(child)])
    if not made:
        raise ArgumentError(f"model must hold adapters; this {type(model).__name__} has none.")
    return copied.requires_grad_(True)


def _place_of(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of a base, and the dtype that it computes in."""
    if isinstance(base, nn.Linear):
        return base.weight.device, base.weight.dtype
    buffer = next(base.buffers())
    return buffer.device, cast("torch.dtype", cast("Any", base).dtype)


def _linears_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, part) for path, part in model.named_modules(remove_duplicate=False) if isinstance(part, nn.Linear)]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that the patterns name, each at least one."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError("parameter", pattern, names)
    return [name for name in names if _matches(name, patterns)]
