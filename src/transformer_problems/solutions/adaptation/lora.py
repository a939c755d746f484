"""LoRA: beside each frozen matrix a product of two thin ones learns the new task."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive, require_positive_int, require_share
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.seeding import generator
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    check_patterns,
    matches,
    replace_linears,
    replace_modules,
    treated_copy,
    uncalled_layers,
)
from transformer_problems.solutions.adaptation.lora_linear import LoRALinear, check_gradients, is_packed, place_of


class LoRA:
    """Freezes a model and puts adapters beside its linear layers, of floats or rounded to four bits before.

    Only the adapters learn, and what `train` names. `merge` adds them into the weights, `undo` takes them out again.
    `save_adapter` writes all that a task has to store.

    Args:
        rank: R, the width of an adapter.
        alpha: Adapters are scaled by alpha / R.
        dropout: Of the adapters' inputs.
        targets: Patterns, as in fnmatch, of the paths of the layers that get one.
        skip: Patterns of layers that get none all the same.
        train: Patterns of the parameters that learn beside the adapters, such as a new head: ("head.*",). A layer whose
            weight is among them gets no adapter.
        seed: Of the adapters' start.

    Raises:
        ArgumentError: If a size does not fit, patterns name nothing or the output layer of nn.MultiheadAttention, whose
            weight is read without a call, or weights are shared or not finite.
        CombinationError: If the model has adapters already, or a layer that passes no gradients on.

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
        require_share(dropout=dropout)
        if dropout == 1:
            raise ArgumentError("dropout must be below 1, which leaves adapters no input; got 1. Choose 0.1.")
        if math.isinf(alpha):
            raise ArgumentError("alpha must be finite; got inf.")
        self.rank, self.alpha, self.dropout, self.seed = rank, alpha, dropout, seed
        self.targets = as_patterns("targets", targets, can_be_empty=False)
        self.skip, self.train = as_patterns("skip", skip), as_patterns("train", train)

    def __call__(self, model: nn.Module) -> nn.Module:
        return self._adapted(treated_copy(model, self))

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy without the adapters, whose other weights are as they are now; everything learns.

        Raises:
            ArgumentError: If there are no adapters.
        """
        return _without_adapters(model, lambda adapter: adapter.base)

    def merge(self, model: nn.Module) -> nn.Module:
        """A copy whose weights hold the adapters' change; outputs are equal up to the weights' rounding.

        Raises:
            ArgumentError: If there are no adapters.
        """
        return _without_adapters(model, LoRALinear.merged)

    def base_of(self, path: str, layer: nn.Module) -> nn.Module:
        """What an adapter stands beside."""
        if is_packed(layer):
            check_gradients(path, layer)
        return layer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, alpha={self.alpha:g}, targets={self.targets})"

    def _adapted(self, model: nn.Module) -> nn.Module:
        learning = {name: p for name, p in model.named_parameters() if matches(name, self.train)}
        chosen, draws = self._chosen(model), generator(self.seed, "lora")
        model.requires_grad_(False)

        def make(path: str, layer: nn.Module) -> nn.Module:
            return LoRALinear(self.base_of(path, layer), self.rank, self.alpha, dropout=self.dropout, draws=draws)

        floats = {path for path, layer in chosen.items() if isinstance(layer, nn.Linear)}
        if floats:
            others = [path for path, layer in _layers_of(model).items() if isinstance(layer, nn.Linear)]
            replace_linears(model, make, skip=[path for path in others if path not in floats])
        replace_modules(model, lambda path, part: is_packed(part) and path in chosen, make)
        _let_learn(model, learning)
        return model

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers that get an adapter, by path; those whose weight learns as a whole need none."""
        layers, parameters = _layers_of(model), [name for name, _ in model.named_parameters()]
        if not layers or "" in layers:
            raise ArgumentError(
                f"model must hold linear layers; this {type(model).__name__} holds none. Put a layer that stands alone "
                "into a torch.nn.Sequential."
            )
        check_patterns("target", self.targets, layers)
        check_patterns("layer to skip", self.skip, layers)
        check_patterns("parameter", self.train, parameters)
        chosen = {
            path: layer
            for path, layer in layers.items()
            if matches(path, self.targets) and not matches(path, self.skip)
            if not matches(f"{path}.weight", self.train)
        }
        if not chosen:
            raise ArgumentError(f"targets must name a layer that skip and train leave; {self.targets} name none.")
        _check_called(model, chosen)
        for path, layer in chosen.items():
            self._check_rank(path, layer)
        return chosen

    def _check_rank(self, path: str, layer: nn.Module) -> None:
        (num_outputs, num_inputs), _, _ = place_of(layer)
        smallest = min(num_inputs, num_outputs)
        if self.rank > smallest:
            raise ArgumentError(
                f"rank must be at most the smaller width of every layer; got {self.rank} for {path} of {num_inputs} "
                f"x {num_outputs}. Choose {smallest} or less, or skip the layer."
            )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a task adds to its base: the adapters and everything else that learns, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: nn.Module, path: Path | str) -> int:
    """Write what `adapter_state` gives into a safetensors file, and return its bytes.

    The file also tells each adapter's factor alpha / R, without which its weights say nothing.

    Raises:
        ArgumentError: If the model has no adapters.
        OutputError: If the file cannot be written.
    """
    factors = _factors_of(model)
    if not factors:
        raise ArgumentError(f"model must hold adapters; this {type(model).__name__} has none. Adapt it first.")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in adapter_state(model).items()}, str(path), metadata=factors
        )
    except (OSError, SafetensorError) as error:
        raise OutputError(f"path must be writable; got {path}: {error}. Choose another.") from error
    return Path(path).stat().st_size


def load_adapter(model: nn.Module, source: Mapping[str, Tensor] | Path | str) -> None:
    """Put what `adapter_state` gave or `save_adapter` wrote into a model adapted in the same way, in place.

    Raises:
        ArgumentError: If the file is missing or truncated, names or shapes are not those of what learns in the model,
            or values are not finite; the model is left as it was.
    """
    tensors = _read(source, _factors_of(model)) if isinstance(source, Path | str) else source
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
        if not torch.isfinite(tensors[name]).all():
            raise ArgumentError(f"tensors must be finite; {name} holds NaN or infinity. Train the adapter again.")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def _factors_of(model: nn.Module) -> dict[str, str]:
    """What each adapter's change is multiplied by, by the layer's path."""
    adapters = {path: part for path, part in model.named_modules() if isinstance(part, LoRALinear)}
    return {path: f"{part.alpha / part.rank:g}" for path, part in adapters.items()}


def _read(path: Path | str, factors: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            saved = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"source must be a whole safetensors file; got {path}: {error}. Save it again.") from error
    other = next((layer for layer in factors if layer in saved and saved[layer] != factors[layer]), None)
    if other is not None:
        raise ArgumentError(
            f"source must be saved from adapters of the same alpha / rank; {other} had {saved[other]} and has "
            f"{factors[other]}. Adapt the model with the same alpha and rank."
        )
    return tensors


def _without_adapters(model: nn.Module, make: Callable[[LoRALinear], nn.Module]) -> nn.Module:
    """A copy with `make(adapter)` in the place of each adapter; everything in it learns."""
    copied = copy.deepcopy(model)

    def remade(_: str, part: nn.Module) -> nn.Module:
        assert isinstance(part, LoRALinear)
        return make(part)

    if not replace_modules(copied, lambda _, part: isinstance(part, LoRALinear), remade):
        raise ArgumentError(f"model must hold adapters; this {type(model).__name__} has none.")
    return copied.requires_grad_(True)


def _let_learn(model: nn.Module, learning: Mapping[str, nn.Parameter]) -> None:
    """Let these parameters of the model learn, which may have moved."""
    left = {id(p) for p in model.parameters()}
    for name, p in learning.items():
        if id(p) not in left:
            raise ArgumentError(f"train must name parameters that stay floats; {name} is rounded. Skip its layer.")
        p.requires_grad_(True)


def _check_called(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers beside which an adapter would never be asked."""
    uncalled = uncalled_layers(model)
    paths = [path for path, layer in chosen.items() if id(layer) in uncalled]
    if paths:
        patterns = tuple(sorted({"*" + ".".join(path.split(".")[-2:]) for path in paths}))
        raise ArgumentError(
            f"targets must name layers that are called; {paths[0]} is not, for torch.nn.MultiheadAttention reads its "
            f"weight. Pass skip={patterns} to adapt the other layers, or build the model with SelfAttention."
        )


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of floats and of codes, by each of their paths."""
    parts = model.named_modules(remove_duplicate=False)
    return {path: part for path, part in parts if isinstance(part, nn.Linear) or is_packed(part)}
