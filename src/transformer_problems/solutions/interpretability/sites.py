"""Places in a model where activations are read and replaced: outputs of modules, and single attention heads."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import check_patterns, matches

_PROJECTIONS = ("out_proj", "o_proj", "c_proj", "dense")


@dataclass(frozen=True, slots=True)
class Site:
    """What a module gives, or one head of an attention layer: its slice of what the output projection reads.

    Args:
        path: A module's path, as in `named_modules`, or a pattern of several, as in fnmatch: "body.blocks.*".
        head: Which head of that attention layer, from 0. Default none: the module's whole output.

    Raises:
        ArgumentError: If the path is no text, or the head negative.

    Example:
        >>> from transformer_problems import Site
        >>> Site("body.blocks.0.mixer", head=3)
        Site(path='body.blocks.0.mixer', head=3)
    """

    path: str
    head: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise ArgumentError(f"path must be the path of a module, or a pattern of several; got {self.path!r}.")
        whole = isinstance(self.head, Integral) and not isinstance(self.head, bool)
        if self.head is not None and not (whole and self.head >= 0):
            raise ArgumentError(
                f"head must be a whole number from 0; got {self.head!r}. Leave it out for the whole output."
            )


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """An attention layer whose heads are equal slices of what its output projection reads.

    Args:
        projection: The output projection.
        num_heads: H.
    """

    projection: nn.Module
    num_heads: int


@dataclass(frozen=True, slots=True)
class Place:
    """One site in a given model.

    Args:
        site: Whose path names one module.
        module: What gives the activation: the module itself, or the projection that reads the head.
        num_heads: H of the head's layer, 0 for a whole output.
    """

    site: Site
    module: nn.Module
    num_heads: int = 0

    def watch(self, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """From now on, until the handle is removed, show `change` the activation and put what it returns in its place.

        Args:
            change: Activation -> another of the same shape, or None to leave it.
        """
        if self.site.head is None:
            return self.module.register_forward_hook(lambda _, inputs, output: self._changed_output(output, change))
        return self.module.register_forward_pre_hook(lambda _, inputs: self._changed_inputs(inputs, change))

    def _changed_output(self, output: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
        """Layers of transformers give tuples that begin with the hidden states."""
        whole = isinstance(output, Tensor)
        hidden = output if whole else output[0] if isinstance(output, tuple) and output else None
        if not isinstance(hidden, Tensor):
            raise CombinationError(
                f"{self.site.path} must give a tensor, or a tuple that begins with one; got {type(output).__name__}. "
                "Choose a module inside it."
            )
        changed = change(hidden)
        if changed is None:
            return None
        return changed if whole else (changed, *output[1:])

    def _changed_inputs(self, inputs: tuple[Any, ...], change: Callable[[Tensor], Tensor | None]) -> Any:
        x: Tensor = inputs[0]
        if x.shape[-1] % self.num_heads:
            raise CombinationError(
                f"the {self.num_heads} heads of {self.site.path} must be equal slices of what its output projection "
                f"reads; it reads {x.shape[-1]} channels. Choose the whole layer."
            )
        heads = x.unflatten(-1, (self.num_heads, -1))
        changed = change(heads[..., self.site.head, :])
        if changed is None:
            return None
        heads = heads.clone()
        heads[..., self.site.head, :] = changed
        return (heads.flatten(-2), *inputs[1:])


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The attention layers whose heads can be told apart, by path, in the model's order.

    These are modules that know their number of heads and have an output projection out_proj, o_proj, c_proj or dense,
    as SelfAttention and those of transformers' Llama, GPT-2, GPT-NeoX and OPT have, or hold both apart, as BERT's do.
    """
    found = {path: _attention_layer(part) for path, part in model.named_modules()}
    return {path: layer for path, layer in found.items() if layer is not None}


def find_places(model: nn.Module, sites: Sequence[Site | str]) -> list[Place]:
    """Every place that the sites name, in their order and then the model's; a text is a path or pattern.

    Raises:
        UnknownNameError: If a path or pattern matches nothing.
        ArgumentError: If there are no sites, or a layer has no such head.
        CombinationError: If a head is asked of a model without attention layers that have any to tell apart.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if isinstance(sites, str | Site) or not sites:
        raise ArgumentError(f"sites must be a sequence of one site or more; got {sites!r}. Write [Site(path)].")
    return [place for site in sites for place in _places(model, Site(site) if isinstance(site, str) else site)]


def record(places: Sequence[Place], run: Callable[[], object]) -> list[Tensor]:
    """The activation of each place while the model runs once, without gradient history.

    Raises:
        CombinationError: If a place is not met exactly once.
    """
    found: list[list[Tensor]] = [[] for _ in places]
    with ExitStack() as hooks:
        for place, calls in zip(places, found, strict=True):
            hooks.enter_context(place.watch(partial(_keep, calls)))
        run()
    for place, calls in zip(places, found, strict=True):
        if len(calls) != 1:
            raise CombinationError(
                f"a module must be called once in a pass to have one activation; {place.site.path} was called "
                f"{len(calls)} times. Choose another module."
            )
    return [calls[0] for calls in found]


def _keep(calls: list[Tensor], x: Tensor) -> None:
    calls.append(x.detach().clone())  # later layers may add to it in place


def _places(model: nn.Module, site: Site) -> list[Place]:
    if not isinstance(site, Site):
        raise ArgumentError(f"sites must be paths or Site objects; got {site!r}. Write Site(path).")
    if site.head is None:
        modules = {path: part for path, part in model.named_modules(remove_duplicate=False) if path}
        check_patterns("module", (site.path,), modules)
        return [Place(Site(path), part) for path, part in modules.items() if matches(path, (site.path,))]
    layers = attention_layers(model)
    if not layers:
        raise CombinationError(
            f"model must hold attention layers with heads and one of {', '.join(_PROJECTIONS)}; this "
            f"{type(model).__name__} holds none. Name a module, without a head."
        )
    check_patterns("attention layer", (site.path,), layers)
    places = []
    for path, layer in layers.items():
        if not matches(path, (site.path,)):
            continue
        if site.head >= layer.num_heads:
            raise ArgumentError(
                f"head must be one of the {layer.num_heads} of {path}; got {site.head}. Choose at most "
                f"{layer.num_heads - 1}."
            )
        places.append(Place(Site(path, site.head), layer.projection, layer.num_heads))
    return places


def _attention_layer(part: nn.Module) -> AttentionLayer | None:
    if isinstance(part, nn.MultiheadAttention):  # multiplies by the weight of its projection without calling it
        return None
    inner = getattr(part, "self", None)  # BERT's, whose projection stands beside its heads
    owner, attention = (getattr(part, "output", None), inner) if isinstance(inner, nn.Module) else (part, part)
    projection = next((found for name in _PROJECTIONS if _projects(found := getattr(owner, name, None))), None)
    num_heads = _num_heads(attention)
    return None if projection is None or num_heads is None else AttentionLayer(projection, num_heads)


def _projects(part: object) -> bool:
    return isinstance(part, nn.Module) and not isinstance(part, nn.Identity)  # which GatedAttention leaves behind


def _num_heads(attention: Any) -> int | None:
    """Some layers leave the number to their config; so do other modules that have one, but no heads."""
    named = (getattr(attention, name, None) for name in ("num_heads", "num_attention_heads"))
    number = next((found for found in named if isinstance(found, int)), None)
    if number is None and (hasattr(attention, "head_dim") or hasattr(attention, "head_size")):
        number = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    return number
