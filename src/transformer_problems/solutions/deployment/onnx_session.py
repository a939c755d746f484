"""Runs ONNX files with onnxruntime; imports no torch unless it is given tensors."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError, OutputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
Optimisation = Literal["none", "basic", "extended", "all"]
_LEVELS: Mapping[str, str] = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_DTYPES: Mapping[str, str] = {  # onnxruntime's name of a type -> numpy's and torch's
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_FATAL_ONLY = 4  # errors are raised, so a second copy of them on stderr says nothing new


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output of an ONNX file: a size that is a text may be any, the same wherever the text stands."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @property
    def form(self) -> str:
        """Dtype and shape in words, e.g. "int64 [batch, 7]"."""
        return f"{self.dtype} [{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    def __str__(self) -> str:
        return f"{self.name}: {self.form}"


class OnnxSession:
    """An ONNX file, loaded and optimised by onnxruntime for a CPU.

    onnxruntime optimises the graph when it loads it: "basic" folds constants and removes what is not needed,
    "extended" fuses nodes (attention, GELU, layer norm), "all" also lays data out for this processor.

    Inputs are read where they lie if they are contiguous, and outputs are handed over without a copy. There are no
    gradients.

    Args:
        path: The file. Weights beside it, as large models have, are found by it.
        threads: Threads within an operation.
        optimisation: How much of the above: "none", "basic", "extended" or "all".
        optimised_path: Where to keep the optimised graph, to be loaded with optimisation="none". One of "all" fits
            processors of this kind only.

    Attributes:
        inputs, outputs: Names, dtypes and shapes.
        load_s: Seconds that reading and optimising took.

    Shape:
        As the file says; see `inputs`.

    Raises:
        MissingDependencyError: If onnxruntime is not installed.
        ArgumentError: If the file is missing, truncated or no ONNX file, or inputs do not fit it.
        UnknownNameError: If there is no such level of optimisation.
        OutputError: If the optimised graph cannot be written.

    Source:
        ONNX Runtime, "Graph Optimizations in ONNX Runtime", onnxruntime.ai/docs/performance/model-optimizations.

    Example:
        >>> from transformer_problems import OnnxSession
        >>> session = OnnxSession("encoder.onnx", threads=2)
        >>> logits = session(tokens)
    """

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int = 1,
        optimisation: Optimisation = "all",
        optimised_path: Path | str | None = None,
    ) -> None:
        require_positive_int(threads=threads)
        if optimisation not in get_args(Optimisation):
            raise UnknownNameError("optimisation", optimisation, get_args(Optimisation))
        self.path, self.threads, self.optimisation = Path(path), threads, optimisation
        if not self.path.is_file():
            raise ArgumentError(f"path must be an ONNX file; there is no {self.path}. Export one with export_onnx.")
        target = None if optimised_path is None else _writable(Path(optimised_path))
        started = time.perf_counter()
        self._session = self._load(target)
        self.load_s = time.perf_counter() - started
        self.inputs = tuple(_value(node, self.path) for node in self._session.get_inputs())
        self.outputs = tuple(_value(node, self.path) for node in self._session.get_outputs())

    def __call__(self, *tensors: "Tensor") -> "Tensor | tuple[Tensor, ...]":
        """The outputs for these inputs, in the file's order; a tuple where there are several."""
        import torch

        outputs = tuple(torch.from_numpy(y) for y in self._run(self.feed(*_all(tensors, torch.Tensor))))
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        """As a call, but from and to numpy arrays, and always a tuple; needs no torch."""
        return self._run(self.feed(*_all(arrays, np.ndarray)))

    def feed(self, *inputs: "Tensor | Array") -> dict[str, Array]:
        """Inputs by name, as onnxruntime takes them.

        Raises:
            ArgumentError: If their number, a dtype or a shape is not the file's, or one lies on another device or asks
                for a gradient.
        """
        wanted, sizes = "; ".join(map(str, self.inputs)), dict[str, int]()
        if len(inputs) != len(self.inputs):
            raise ArgumentError(
                f"inputs must be as many as the {len(self.inputs)} of {self.path.name}; got {len(inputs)}. "
                f"Pass {wanted or 'none'}."
            )
        for value, x in zip(self.inputs, inputs, strict=True):
            dtype = str(x.dtype).removeprefix("torch.")
            if dtype != value.dtype or not _fits(value.shape, x.shape, sizes):
                raise ArgumentError(
                    f"{value.name} must be {value.form}; got {dtype} {list(x.shape)}. {self.path.name} takes {wanted}."
                )
        return {value.name: _array(value.name, x) for value, x in zip(self.inputs, inputs, strict=True)}

    def __repr__(self) -> str:
        return (
            f"OnnxSession({str(self.path)!r}, threads={self.threads}, optimisation={self.optimisation!r}, "
            f"inputs=({'; '.join(map(str, self.inputs))}), outputs=({'; '.join(map(str, self.outputs))}))"
        )

    def _load(self, target: Path | None) -> Any:
        runtime = require("onnxruntime", extra="onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[self.optimisation])
        options.log_severity_level = _FATAL_ONLY
        if target is not None:
            options.optimized_model_filepath = str(target)
        return _refusing(
            lambda: runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"]),
            f"path must be a whole ONNX file, with its weights beside it where it has such; got {self.path}",
            "Export it again.",
        )

    def _run(self, feed: dict[str, Array]) -> tuple[Array, ...]:
        outputs = _refusing(
            lambda: self._session.run(None, feed),
            f"inputs must be ones that {self.path.name} can compute",
            "Compare them with the example that it was exported with.",
        )
        return tuple(np.asarray(y) for y in outputs)


def _all(inputs: Sequence[Any], kind: type) -> Sequence[Any]:
    for x in inputs:
        if not isinstance(x, kind):
            raise ArgumentError(
                f"inputs must all be of type {kind.__name__}; got {type(x).__name__}. Call the session with tensors, "
                "or run() with numpy arrays."
            )
    return inputs


def _array(name: str, x: "Tensor | Array") -> Array:
    """The same numbers, where they lie."""
    if isinstance(x, np.ndarray):
        return x
    import torch

    if x.device.type != "cpu":
        raise ArgumentError(f"{name} must lie on the CPU; it is on {x.device}. Move it with .cpu().")
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{name} must not need a gradient, for onnxruntime gives none. Pass {name}.detach() or call under "
            "torch.no_grad()."
        )
    array: Array = x.detach().numpy()
    return array


def _fits(wanted: Sequence[int | str | None], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether a shape has the sizes that are fixed, and one size for each name, of which `sizes` keeps track."""
    if len(wanted) != len(shape):
        return False
    return all(
        n is None or (sizes.setdefault(n, size) if isinstance(n, str) else n) == size
        for n, size in zip(wanted, shape, strict=True)
    )


def _value(node: Any, path: Path) -> OnnxValue:
    if node.type not in _DTYPES:
        raise ArgumentError(
            f"{node.name} of {path.name} must be a tensor of one of {', '.join(_DTYPES.values())}; it is {node.type}. "
            "Use onnxruntime itself for such a file."
        )
    return OnnxValue(node.name, _DTYPES[node.type], tuple(node.shape))


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise OutputError(f"optimised_path must lie in a folder that exists; got {path}. Make {path.parent} first.")
    return path


def _refusing(action: Callable[[], Any], rule: str, remedy: str) -> Any:
    """What the action returns; what onnxruntime raises becomes an ArgumentError."""
    try:
        return action()
    except Exception as error:  # onnxruntime's errors have no other class in common
        raise ArgumentError(f"{rule}. onnxruntime says: {' '.join(str(error).split())} {remedy}") from error
