"""One product for queries, keys and values in place of three."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import TransformKind, as_patterns, check_patterns, matches, treated_copy
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.deployment.plain_layers import check_plain, check_untied

_PARTS = ("q_proj", "k_proj", "v_proj")
_SLOT = "qkv_proj"
_FOREIGN = (("query", "key", "value"), ("in_proj_weight",), ("c_attn",), ("query_key_value",))  # of other packages


class FusedProjections(Linear):
    """Linear layers over the same input as one: their weights one above the other, their biases one after the other.

    Args:
        in_features: C.
        sizes: Outputs of each layer; they follow each other in the output.
        bias: Whether the layers have biases.

    Shape:
        x: [..., C]; output: [..., sum(sizes)].

    Source:
        Ivanov et al. 2020, arXiv:2007.00072, where it is called algebraic fusion.
    """

    made_by: TransformKind = "fuse"

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, sum(sizes), bias, device=device, dtype=dtype)
        self.sizes = tuple(sizes)

    @classmethod
    @torch.no_grad()
    def from_layers(cls, layers: Sequence[nn.Linear]) -> "FusedProjections":
        """The layers as one; it shares no memory with them.

        Raises:
            ArgumentError: If they differ in what they read, in having a bias, in dtype, device or in learning.
        """
        _check_alike(layers)
        first = layers[0]
        sizes = [layer.out_features for layer in layers]
        made = cls(first.in_features, sizes, bias=first.bias is not None, device="meta", dtype=first.weight.dtype)
        for name, _ in list(made.named_parameters()):
            joined = torch.cat([getattr(layer, name) for layer in layers])
            setattr(made, name, nn.Parameter(joined, requires_grad=getattr(first, name).requires_grad))
        return made.train(first.training)

    @torch.no_grad()
    def layers(self) -> tuple[Linear, ...]:
        """The separate layers, with the very numbers of this one; they share no memory with it."""
        made = []
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        for start, size in zip(starts, self.sizes, strict=True):
            layer = Linear(self.in_features, size, self.bias is not None, device="meta", dtype=self.weight.dtype)
            for name, whole in self.named_parameters():
                part = nn.Parameter(whole[start : start + size].clone(), requires_grad=whole.requires_grad)
                setattr(layer, name, part)
            made.append(layer.train(self.training))
        return tuple(made)


class FuseProjections:
    """Makes the query, key and value projections of every attention layer one product.

    The layer's input is read once and three kernels become one, which counts where a product is small: few tokens, as
    in each step of decoding, or a device that waits for launches. Outputs are those of the separate products up to the
    order of sums; `undo` gives back the very same weights.

    A layer can be fused if it has linear layers q_proj, k_proj and v_proj and an attribute qkv_proj, None so far, by
    which its forward asks for all three at once: SelfAttention, and so Decoder, Encoder, VisionTransformer and
    LlamaDecoder. save_llama writes separate layers, so undo before.

    Args:
        skip: Patterns, as in fnmatch, of the paths of attention layers to leave alone, e.g. "blocks.0.mixer".

    Raises:
        ArgumentError: If there is nothing to fuse, the three read inputs of different widths or differ in bias, dtype,
            device or whether they learn, weights are shared or not finite, or a pattern names no layer.
        CombinationError: If an attention layer asks for its projections one by one, they are more than plain linear
            layers, or the model was rounded or adapted before.

    Source:
        Ivanov et al. 2020, arXiv:2007.00072, where it is called algebraic fusion.

    Example:
        >>> from transformer_problems import Decoder, FuseProjections, SelfAttention
        >>> model = Decoder(256, 64, num_layers=2, mixer=lambda: SelfAttention(64, num_heads=4, num_kv_heads=2))
        >>> FuseProjections()(model).body.blocks[0].mixer.qkv_proj
        FusedProjections(in_features=64, out_features=128, bias=False)
    """

    kind: TransformKind = "fuse"

    def __init__(self, *, skip: Sequence[str] = ()) -> None:
        self.skip = as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        fused = treated_copy(model, self)
        paths = [path for path, part in fused.named_modules() if _is_separate(part)]
        check_patterns("attention layer to skip", self.skip, paths)
        chosen = [path for path in paths if not matches(path, self.skip)]
        if not chosen:
            raise ArgumentError(_nothing_found(fused, any_skipped=bool(paths)))
        for path in chosen:
            _check_fusible(fused, path)
        for path in chosen:
            _fuse(fused.get_submodule(path))
        return fused

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy with three separate layers again, equal to the original bit by bit.

        Raises:
            ArgumentError: If there is nothing fused, or it was rounded or adapted since.
        """
        apart = copy.deepcopy(model)
        found = [part for part in apart.modules() if isinstance(getattr(part, _SLOT, None), FusedProjections)]
        if not found:
            raise ArgumentError(
                f"model must hold FusedProjections to take apart; this {type(model).__name__} holds none. Undo later "
                "treatments first."
            )
        for part in found:
            _take_apart(part)
        return apart

    def __repr__(self) -> str:
        return f"FuseProjections({f'skip={self.skip}' if self.skip else ''})"


def _is_separate(part: nn.Module) -> bool:
    return all(isinstance(getattr(part, name, None), nn.Module) for name in _PARTS)


def _nothing_found(model: nn.Module, *, any_skipped: bool) -> str:
    looked_for = f"model must hold attention with separate {', '.join(_PARTS)} that is not skipped; "
    if any_skipped:
        return f"{looked_for}every one is skipped. Leave one out of skip."
    for path, part in model.named_modules():
        if isinstance(getattr(part, _SLOT, None), nn.Module):
            return f"{looked_for}those of {path or 'the model'} are one already."
        for names in _FOREIGN:
            if all(getattr(part, name, None) is not None for name in names):
                return (
                    f"{looked_for}{path or 'the model'}, a {type(part).__name__}, has {', '.join(names)} of its own "
                    "kind. Compile the model instead: CompileGraph()."
                )
    return f"{looked_for}this {type(model).__name__} holds none."


def _check_fusible(model: nn.Module, path: str) -> None:
    part: Any = model.get_submodule(path)
    layers = {name: getattr(part, name) for name in _PARTS}
    if not hasattr(part, _SLOT):
        raise CombinationError(
            f"attention must ask for its projections through {_SLOT} to have them fused; {path or 'the model'}, a "
            f"{type(part).__name__}, asks for {', '.join(_PARTS)} one by one. Pass skip=({path!r},), or compile the "
            "model instead: CompileGraph()."
        )
    check_plain(path, layers)
    check_untied(model, path, layers)
    try:
        _check_alike(list(layers.values()))
    except ArgumentError as error:
        raise ArgumentError(f"{path or 'the model'}: {error} Pass skip=({path!r},) to leave it as it is.") from error


def _check_alike(layers: Sequence[nn.Linear]) -> None:
    for what, values in (
        ("read inputs of one width", [layer.in_features for layer in layers]),
        ("all have a bias or none", [layer.bias is not None for layer in layers]),
        ("be of one dtype", [layer.weight.dtype for layer in layers]),
        ("lie on one device", [layer.weight.device for layer in layers]),
        ("all learn or none", [[p.requires_grad for p in layer.parameters()] for layer in layers]),
    ):
        if any(value != values[0] for value in values):
            raise ArgumentError(f"layers that become one must {what}; got {', '.join(map(str, values))}.")


def _fuse(part: nn.Module) -> None:
    fused = FusedProjections.from_layers([getattr(part, name) for name in _PARTS])
    setattr(part, _SLOT, fused)
    _exchange(part, {_SLOT: fused}, gone=_PARTS)


def _take_apart(part: nn.Module) -> None:
    fused: Any = getattr(part, _SLOT)
    _exchange(part, dict(zip(_PARTS, fused.layers(), strict=True)), gone=(_SLOT,))
    setattr(part, _SLOT, None)


def _exchange(part: nn.Module, made: Mapping[str, nn.Module], *, gone: Sequence[str]) -> None:
    """Put modules where the first of others was, so that parameters keep the order that optimizers know them by."""
    children = list(part._modules.items())
    part._modules.clear()
    for name, child in children:
        if name == gone[0]:
            part._modules.update(made)
        elif name not in gone and name not in made:
            part._modules[name] = child
