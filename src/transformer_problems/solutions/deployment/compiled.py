"""Models that PyTorch's compiler fuses."""

import copy
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.core.transforms import TransformKind, treated_copy
from transformer_problems.kernels.compiler import find_compiler

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class CompiledModel(nn.Module):
    """A model that is compiled when it is first called, and again for inputs of other shapes.

    Everything but a call goes to the model as it is, uncompiled: `stream` and `initial_state` too, whose caches grow.
    A copy compiles what it holds, so a transform may treat the model within.

    Args:
        model: Held as it is.
        mode: What to spend on compiling, see torch.compile.
        backend: What compiles, see torch.compile.
        dynamic: Whether sizes may vary without compiling anew. None finds out from the second size that it meets.

    Source:
        Ansel et al. 2024, doi:10.1145/3620665.3640366.
    """

    made_by: TransformKind = "fuse"

    def __init__(self, model: nn.Module, *, mode: CompileMode, backend: str, dynamic: bool | None) -> None:
        super().__init__()
        self.model = model
        self.mode, self.backend, self.dynamic = mode, backend, dynamic
        self.training = model.training
        self._compiled: tuple[Any, ...] = ()  # in a tuple, for it holds the model a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # whatever the model takes
        if not self._compiled:
            self._compiled = (torch.compile(self.model, mode=self.mode, backend=self.backend, dynamic=self.dynamic),)
        return self._compiled[0](*args, **kwargs)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, backend={self.backend!r}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # while a copy is being made
                raise
            return getattr(self.model, name)


class CompileGraph:
    """Compiles the model's graph of operators into fewer, fused kernels, by torch.compile.

    Elementwise operators, norms and softmax join what is before or after them, so that what they pass on never goes
    through memory. The first call takes seconds to minutes, and each new shape again unless `dynamic`. Outputs are
    equal up to the rounding of fused arithmetic. Names of parameters begin with "model.".

    Args:
        mode: "default"; "reduce-overhead" for small inputs on CUDA; "max-autotune" to search the fastest kernels.
        backend: What compiles: "inductor", which generates C++ on a CPU and Triton on CUDA, or one of
            torch.compiler.list_backends().
        dynamic: Whether sizes may vary without compiling anew. None finds out from the second size that it meets.

    Raises:
        UnknownNameError: If there is no such mode or back end.
        MissingDependencyError: If "inductor" has no C++ compiler here.
        ArgumentError: If weights are not finite, or the model is compiled already.
        CombinationError: If the model was rounded or adapted before; compile first.

    Source:
        Ansel et al. 2024, doi:10.1145/3620665.3640366.

    Example:
        >>> from torch import nn
        >>> from transformer_problems import CompileGraph
        >>> CompileGraph()(nn.Sequential(nn.Linear(8, 8), nn.GELU())).mode
        'default'
    """

    kind: TransformKind = "fuse"

    def __init__(
        self, mode: CompileMode = "default", *, backend: str = "inductor", dynamic: bool | None = None
    ) -> None:
        if mode not in get_args(CompileMode):
            raise UnknownNameError("mode of compilation", str(mode), get_args(CompileMode))
        self.mode, self.backend, self.dynamic = mode, backend, dynamic

    def __call__(self, model: nn.Module) -> nn.Module:
        copied = treated_copy(model, self)
        if isinstance(model, CompiledModel):
            raise ArgumentError("model must not be compiled already; got a CompiledModel. Undo it first.")
        self._check_backend()
        return CompiledModel(copied, mode=self.mode, backend=self.backend, dynamic=self.dynamic)

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def undo(self, model: nn.Module) -> nn.Module:
        """A copy of the model within.

        Raises:
            ArgumentError: If the model is not a compiled one.
        """
        if not isinstance(model, CompiledModel):
            raise ArgumentError(f"model must be a CompiledModel to be taken out; got {type(model).__name__}.")
        return copy.deepcopy(model.model)

    def __repr__(self) -> str:
        given = [repr(self.mode)] if self.mode != "default" else []
        given += [f"backend={self.backend!r}"] if self.backend != "inductor" else []
        given += [f"dynamic={self.dynamic}"] if self.dynamic is not None else []
        return f"CompileGraph({', '.join(given)})"

    def _check_backend(self) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            raise UnknownNameError("back end of torch.compile", str(self.backend), known)
        if self.backend == "inductor":
            _check_compiler()


def _check_compiler() -> None:
    """Refuse a machine whose compiler PyTorch would look for in vain, at the first call, in many lines."""
    try:
        command = find_compiler()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"torch.compile generates C++: {error} Or pass backend='aot_eager'.") from error
    if sys.platform == "linux" and command[0] != "g++" and "CXX" not in os.environ:
        raise MissingDependencyError(
            f"torch.compile calls g++, which this machine lacks. Set the environment variable CXX={command[0]}."
        )
