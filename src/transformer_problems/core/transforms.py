"""The ModelTransform slot: treatments of a whole model, their chains, and what all of them check and share."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError

TransformKind = Literal["share", "prune", "scale", "fold", "fuse", "adapt", "quantize"]

# (done before, asked for now) -> why that makes no sense. A pair that is not here is allowed.
_MEANINGLESS: dict[tuple[TransformKind, TransformKind], str] = {
    ("quantize", "quantize"): "its weights are codes already. Start from the float model",
    ("quantize", "prune"): "codes keep no float weights to rank. Prune first, then quantize",
    ("quantize", "scale"): "the rounding that scaling would ease has happened. Scale first, then quantize",
    ("quantize", "share"): "codes cannot be shared or factorised. Share first, then quantize",
    ("quantize", "fuse"): "codes of separate layers have separate scales. Fuse first, then quantize",
    ("scale", "scale"): "its inputs are scaled already. Undo that first",
    ("scale", "prune"): "weights that inputs were scaled for rank otherwise. Prune first, then scale",
    ("adapt", "adapt"): "it has adapters already. Merge or undo them first",
    ("adapt", "prune"): "the adapters would be left out of the ranking. Merge them first",
    ("adapt", "scale"): "the adapters would miss the scales. Merge them first",
    ("adapt", "share"): "the adapters of the layers differ. Merge them first",
    ("adapt", "fuse"): "the adapters belong to separate layers. Merge them first",
    ("adapt", "quantize"): "adapters are trained in floats. Merge them first, or quantize first and adapt then",
    ("fuse", "prune"): "fused layers hide what would be ranked. Prune first, then fuse",
    ("fuse", "share"): "fused layers are not the ones to share. Share first, then fuse",
    ("prune", "share"): "sharing overwrites what was pruned. Share first, then prune",
}


class ModelTransform(Protocol):
    """A treatment of a whole model: model in, smaller, faster or cheaper to train model out.

    A call returns a treated copy and leaves its argument as it was. Modules that it puts into the copy, or gives other
    sizes, carry the attribute `made_by`, its kind, by which later transforms know them. Where the treatment can be
    taken back, a method `undo(model)` returns the model without it.

    `rebuild(model, tensors)` gives an untreated model of the same architecture the modules and shapes that the treated
    state_dict `tensors` needs, without its values, so that `load_treated` can read a saved model.
    """

    kind: TransformKind

    def __call__(self, model: nn.Module) -> nn.Module: ...

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module: ...


class Chain:
    """Transforms that run one after the other; itself a ModelTransform.

    Args:
        transforms: In the order in which they run.

    Raises:
        CombinationError: If one of them makes no sense after one before it, with the reason.
        ArgumentError: If there are none.
    """

    def __init__(self, *transforms: ModelTransform) -> None:
        if not transforms:
            raise ArgumentError("transforms must hold one transform at least; got none.")
        for place, later in enumerate(transforms):
            for earlier in transforms[:place]:
                _check_order(earlier.kind, later.kind, type(later).__name__, f"after {type(earlier).__name__}")
        self.transforms = transforms
        self.kind: TransformKind = transforms[-1].kind

    def __call__(self, model: nn.Module) -> nn.Module:
        for transform in self.transforms:
            model = transform(model)
        return model

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        for transform in self.transforms:
            model = transform.rebuild(model, tensors)
        return model

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.transforms))})"


def treated_copy(model: nn.Module, transform: ModelTransform) -> nn.Module:
    """A deep copy that the transform may change, of a model that it can treat.

    Raises:
        CombinationError: If an earlier treatment makes this one meaningless.
        ArgumentError: If the model is no module or holds weights that are not finite.
    """
    name = type(transform).__name__
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for path, module in model.named_modules():
        earlier = getattr(module, "made_by", None)
        if earlier is not None:
            _check_order(earlier, transform.kind, name, f"on {path or 'the model'}, a {type(module).__name__}")
    for path, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ArgumentError(f"weights must be finite; {path} holds NaN or infinity. Load or train the model again.")
    return copy.deepcopy(model)


def replace_modules(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool], make: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Put `make(path, part)` in the place of every part that is wanted, in place, and return the paths replaced.

    A part that several parents hold is made once and stays shared. What is made is in the mode of what it replaces.
    """
    made: dict[int, nn.Module] = {}
    replaced: list[str] = []
    for prefix, parent in list(model.named_modules(remove_duplicate=False)):
        for name, child in list(parent._modules.items()):  # named_children leaves out a child's second name
            path = f"{prefix}.{name}" if prefix else name
            if child is None or not wanted(path, child):
                continue
            if id(child) not in made:
                made[id(child)] = make(path, child).train(child.training)
            setattr(parent, name, made[id(child)])
            replaced.append(path)
    _leave_fast_path(model, replaced)
    return replaced


def _leave_fast_path(model: nn.Module, replaced: Sequence[str]) -> None:
    """Let PyTorch's own encoder layers call what was put into them: their fast path reads weights and calls nothing."""
    for prefix, part in model.named_modules():
        if any(path.startswith(f"{prefix}.") or not prefix for path in replaced):
            if isinstance(part, nn.TransformerEncoderLayer):
                part.activation_relu_or_gelu = 0  # what PyTorch asks for whether it may
            elif isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False


def replace_linears(
    model: nn.Module, make: Callable[[str, nn.Linear], nn.Module], *, skip: Sequence[str] = ()
) -> list[str]:
    """`replace_modules` for every nn.Linear that is not skipped.

    The output layer of nn.MultiheadAttention stays, for its parent reads the weight and never calls the layer.

    Args:
        skip: Patterns, as in fnmatch, of the paths of layers to leave alone, e.g. "lm_head" or "*.head".

    Raises:
        ArgumentError: If there is nothing to replace, a pattern names no layer, or a weight is held elsewhere too.
    """
    check_skip(model, skip, nn.Linear)
    uncalled = uncalled_layers(model)
    owners = _owners(model)

    def wanted(path: str, part: nn.Module) -> bool:
        return isinstance(part, nn.Linear) and id(part) not in uncalled and not matches(path, skip)

    def made(path: str, part: nn.Module) -> nn.Module:
        assert isinstance(part, nn.Linear)
        _check_untied(path, part, owners)
        return make(path, part)

    replaced = replace_modules(model, wanted, made)
    if not replaced:
        raise ArgumentError("model must hold a torch.nn.Linear that is not skipped; it holds none.")
    return replaced


def uncalled_layers(model: nn.Module) -> set[int]:
    """Ids of the linear layers whose weight their parent reads: what stands in their place would never be called."""
    return {id(part.out_proj) for part in model.modules() if isinstance(part, nn.MultiheadAttention)}


def plain_weight(layer: nn.Linear) -> Tensor:
    """The weight [O, I] that a layer multiplies its inputs by, float32, whatever an earlier treatment keeps apart."""
    weight, keep = layer.weight.detach().float(), getattr(layer, "keep", None)
    weight = weight if keep is None else weight * keep
    input_scale = getattr(layer, "input_scale", None)
    return weight if input_scale is None else weight / input_scale


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns, as in fnmatch, names the path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def as_patterns(argument: str, patterns: Sequence[str], *, can_be_empty: bool = True) -> tuple[str, ...]:
    """Patterns as they were given to an argument of that name.

    Raises:
        ArgumentError: If they are no sequence of texts, a single text, which would be taken letter by letter, or none
            where one is needed.
    """
    if isinstance(patterns, str):
        raise ArgumentError(
            f"{argument} must be a sequence of patterns; got the single text {patterns!r}. Write ({patterns!r},)."
        )
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        rest = "() for none" if can_be_empty else "('*',) for all"
        raise ArgumentError(
            f"{argument} must be a sequence of patterns; got {patterns!r}. Write texts, as in ('head.*',), or {rest}."
        )
    if not patterns and not can_be_empty:
        raise ArgumentError(f"{argument} must hold one pattern at least; got {patterns!r}. Write ('*',) for all.")
    return tuple(patterns)


def check_patterns(kind: str, patterns: Sequence[str], known: Collection[str]) -> None:
    """Refuse a pattern that names none of the known paths, which are of that kind.

    Raises:
        UnknownNameError: If there is such a pattern.
    """
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in known):
            raise UnknownNameError(kind, pattern, known)


def check_skip(model: nn.Module, skip: Sequence[str], kind: type[nn.Module]) -> None:
    """Refuse patterns that no module of that kind answers to.

    Raises:
        ArgumentError: If there is such a pattern.
    """
    known = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)]
    check_patterns("layer to skip", as_patterns("skip", skip), known)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that a state_dict holds, each shared one once."""
    tensors = model.state_dict(keep_vars=True).values()
    unique = {(t.untyped_storage().data_ptr(), t.storage_offset(), t.shape): t.nbytes for t in tensors}
    return sum(unique.values())


def _check_order(earlier: TransformKind, later: TransformKind, name: str, where: str) -> None:
    reason = _MEANINGLESS.get((earlier, later))
    if reason is not None:
        raise CombinationError(f"{name} makes no sense {where}: {reason}.")


def _owners(model: nn.Module) -> dict[int, dict[int, str]]:
    """For each parameter, by id, the modules that hold it: their ids and paths."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module)] = path
    return owners


def _check_untied(path: str, layer: nn.Linear, owners: dict[int, dict[int, str]]) -> None:
    others = [other for module, other in owners[id(layer.weight)].items() if module != id(layer)]
    if others:
        raise ArgumentError(
            f"weights must belong to one layer; {path} and {others[0]} share theirs, which would be stored twice. "
            f"Pass skip=({path!r},) or untie them."
        )
