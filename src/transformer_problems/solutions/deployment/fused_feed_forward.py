"""Feed-forward networks whose bias and GELU are one operator."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    check_patterns,
    matches,
    replace_modules,
    treated_copy,
)
from transformer_problems.kernels.bias_gelu import GeluBackend, bias_gelu, gelu_backend
from transformer_problems.kernels.linear import linear
from transformer_problems.solutions.deployment.plain_layers import check_plain, is_plain

_DIFFERENCE = 2e-5  # float32 rounds these sums to about 1e-6; the tanh form of GELU is 2e-4 away


class FusedFeedForward(nn.Module):
    """down(gelu(up(x))) where up's bias and the GELU are one pass over memory, and backward their gradients another.

    Without a gradient the pass writes over what it reads, so the inner layer is held once. With one, it is held once
    for the backward pass. Where `up` is no plain linear layer any more (rounded, adapted), and in a graph that is
    compiled or exported, whose compiler fuses by itself, PyTorch's operators answer.

    Args:
        plain: The module that this one answers for; its layers `up` and `down` become this module's too.
        backend: What adds and activates; "auto" is our C++ kernel where it can be built and takes the dtype.

    Shape:
        x: [..., C]; output: [..., C].

    Source:
        Ivanov et al. 2020, arXiv:2007.00072, whose fused operators join biases and activations alike.
    """

    made_by: TransformKind = "fuse"

    def __init__(self, plain: nn.Module, *, backend: GeluBackend | Literal["auto"] = "auto") -> None:
        super().__init__()
        self.up: nn.Module = plain.get_submodule("up")
        self.down: nn.Module = plain.get_submodule("down")
        self.backend = backend
        self.training = plain.training
        shell = copy.copy(plain)
        shell._modules = dict.fromkeys(plain._modules)  # or it would keep layers that are exchanged here later
        self._shell = (shell,)  # in a tuple, for it is no part of this module

    def backend_for(self, x: Tensor) -> GeluBackend:
        """What adds and activates for an input like x."""
        return gelu_backend(x) if self.backend == "auto" else self.backend

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self._inner(x))
        return y

    def plain(self) -> nn.Module:
        """The module that this one answers for, with the layers that this one holds now."""
        plain = copy.copy(self._shell[0])
        plain._modules = {"up": self.up, "down": self.down}
        plain.training = self.training
        return plain

    def _inner(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not is_plain(self.up):
            return nn.functional.gelu(self.up(x))
        inner = linear(x, self.up.weight)
        bias = None if self.up.bias is None else self.up.bias.to(inner.dtype)  # which autocast may have changed
        learns = torch.is_grad_enabled() and (inner.requires_grad or (bias is not None and bias.requires_grad))
        return bias_gelu(inner, bias, inplace=not learns, backend=self.backend)


class FuseFeedForward:
    """Makes the bias and the GELU of every feed-forward network one operator, forward and backward.

    A network is any module with linear layers `up` and `down`, and nothing else, that computes down(gelu(up(x))) with
    the exact GELU, as FeedForward: it is asked for an answer with other weights to see that it does. Names and weights
    stay, so a state_dict fits both.

    What falls: a training step runs two operators fewer for each network and reads and writes the inner layer's
    gradient once less; inference runs as many as before, for PyTorch adds the bias within the product, but holds one
    inner layer in place of two. Small GELUs come out more exact.

    Args:
        skip: Patterns, as in fnmatch, of the paths of networks to leave alone.
        backend: What adds and activates.

    Raises:
        ArgumentError: If there is nothing to fuse, weights are not finite, or a pattern names no network.
        CombinationError: If a network's layers are more than plain linear layers, or the model was rounded or adapted
            before.

    Source:
        Ivanov et al. 2020, arXiv:2007.00072. Differs from the paper: on CPUs, and one of its fused operators alone,
        without dropout.

    Example:
        >>> from transformer_problems import Decoder, FuseFeedForward, SelfAttention
        >>> model = Decoder(256, 64, num_layers=2, mixer=lambda: SelfAttention(64, num_heads=4))
        >>> type(FuseFeedForward()(model).body.blocks[0].feed_forward).__name__
        'FusedFeedForward'
    """

    kind: TransformKind = "fuse"

    def __init__(self, *, skip: Sequence[str] = (), backend: GeluBackend | Literal["auto"] = "auto") -> None:
        self.skip, self.backend = as_patterns("skip", skip), backend

    def __call__(self, model: nn.Module) -> nn.Module:
        fused = treated_copy(model, self)
        paths = [path for path, part in fused.named_modules() if _is_pair(part)]
        check_patterns("feed-forward network to skip", self.skip, paths)
        chosen = [path for path in paths if not matches(path, self.skip)]
        for path in chosen:
            part = fused.get_submodule(path)
            check_plain(path, {"up": part.up, "down": part.down})
        chosen = [path for path in chosen if _computes_gelu_in_both_modes(fused.get_submodule(path))]
        if not chosen:
            raise ArgumentError(_nothing_found(fused, paths))
        made = {id(part): FusedFeedForward(part, backend=self.backend) for part in map(fused.get_submodule, chosen)}
        return _exchanged(fused, made)

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy with the networks as they were, with the weights that they have now.

        Raises:
            ArgumentError: If there is nothing fused.
        """
        apart = copy.deepcopy(model)
        made = {id(part): part.plain() for part in apart.modules() if isinstance(part, FusedFeedForward)}
        if not made:
            raise ArgumentError(
                f"model must hold FusedFeedForward to take apart; this {type(model).__name__} holds none."
            )
        return _exchanged(apart, made)

    def __repr__(self) -> str:
        given = [f"skip={self.skip}"] if self.skip else []
        given += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return f"FuseFeedForward({', '.join(given)})"


def _is_pair(part: nn.Module) -> bool:
    """Whether a module is made of layers `up` and `down` alone, linear ones or what once was such."""
    if isinstance(part, FusedFeedForward) or set(part._modules) != {"up", "down"} or part._parameters or part._buffers:
        return False
    if part._forward_hooks or part._forward_pre_hooks:  # which a fused one would not call
        return False
    return all(child is not None and hasattr(child, "in_features") for child in part._modules.values())


def _computes_gelu_in_both_modes(part: nn.Module) -> bool:
    """Dropout, say, would show in training alone."""
    was_training, answers = part.training, []
    for mode in (True, False):
        part.training = mode
        answers.append(_computes_gelu(part))
    part.training = was_training
    return all(answers)


@torch.no_grad()
def _computes_gelu(part: Any) -> bool:
    """Whether the module's answer is down(gelu(up(x))): asked with drawn weights, for its own may be zero."""
    device, draws = part.up.weight.device, torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(p.shape, generator=draws).div_(p.shape[-1] ** 0.5).to(device)
        for name, p in part.named_parameters()
    }
    x = torch.randn(1, 4, part.up.in_features, generator=draws).to(device)
    inner = nn.functional.linear(x, drawn["up.weight"], drawn.get("up.bias"))
    expected = nn.functional.linear(nn.functional.gelu(inner), drawn["down.weight"], drawn.get("down.bias"))
    try:
        answer = torch.func.functional_call(part, drawn, (x,))
    except (TypeError, ValueError, RuntimeError):  # it takes something else than x
        return False
    same_form = isinstance(answer, Tensor) and answer.shape == expected.shape and answer.dtype == expected.dtype
    return same_form and bool((answer - expected).abs().max() < _DIFFERENCE)


def _nothing_found(model: nn.Module, paths: Sequence[str]) -> str:
    looked_for = (
        "model must hold a module of linear layers up and down alone, not skipped, that computes down(gelu(up(x))); "
    )
    if any(isinstance(part, FusedFeedForward) for part in model.modules()):
        return f"{looked_for}those of this {type(model).__name__} are fused already."
    if paths:
        part = model.get_submodule(paths[0])
        return f"{looked_for}{paths[0] or 'the model'}, a {type(part).__name__}, is skipped or computes something else."
    return f"{looked_for}this {type(model).__name__} holds none. Compile it instead: CompileGraph()."


def _exchanged(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """The model with other modules in the places of some, by their id; it may be one of them."""
    replace_modules(model, lambda _, part: id(part) in made, lambda _, part: made[id(part)])
    return made.get(id(model), model)
