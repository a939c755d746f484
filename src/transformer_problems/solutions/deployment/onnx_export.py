"""Exports a model to an ONNX file that has been checked against the model."""

import copy
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.deployment.compiled import CompiledModel
from transformer_problems.solutions.deployment.drafts import bytes_of, written_beside
from transformer_problems.solutions.deployment.onnx_session import OnnxSession
from transformer_problems.solutions.deployment.onnx_trace import (
    DynamicAxes,
    ExampleCall,
    ExampleInputs,
    converted,
    dynamic_axes,
    traced,
)
from transformer_problems.solutions.deployment.quiet import quiet

_BATCH: Mapping[int, str] = {0: "batch"}
_LOWEST_OPSET = 18  # what PyTorch's exporter writes by itself
_EMBEDDED_BYTES = 2**31 - 2**20  # a protobuf holds 2 GB; a megabyte of them is left to the graph
_MOST_NOISE = 0.01  # of the largest output; beyond it the check would let anything pass
_NOISE_MULTIPLE = 20.0  # two orders of summation differ by a few times the noise, a wrong operator by thousands


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was written, and how far its outputs for the example are from the model's.

    Args:
        path: The file.
        num_bytes: Of the file, and of the weights beside it where they lie there.
        opset: Version of the operators.
        input_names, output_names: In the order in which a session takes and gives them.
        error: Largest difference between the file's outputs and the model's, from its float64 outputs by default.
        noise: Largest difference between the model's float32 and float64 outputs; None where `tolerance` was given.
        tolerance: Largest error that was allowed.
    """

    path: Path
    num_bytes: int
    opset: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    error: float
    noise: float | None
    tolerance: float


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: Path | str,
    *,
    dynamic: DynamicAxes = _BATCH,
    opset: int = _LOWEST_OPSET,
    external_data: bool | None = None,
    tolerance: float | None = None,
) -> OnnxReport:
    """Writes the model, in eval mode, as an ONNX file, after onnxruntime has run it on the example.

    The file's outputs must equal the model's own in float64 to within 20 times the larger of two: what rounding to
    float32 does to the model itself on that example, and float32's last bit at the largest output. Whole-number
    outputs must be equal. Only then does the file take its place at `path`; after an error, `path` is as it was.
    The check needs memory for a copy of the model in float64, and one in onnxruntime.

    Python control flow is followed as the example leads it, and sizes that are not named in `dynamic` stay those of
    the example.

    Args:
        model: On a CPU, in float32, not quantised. Its modes are restored.
        example_inputs: A tensor, several in the order of forward, or several by the names of its arguments; of two
            sequences at least, and two tokens where the length is dynamic, since sizes of 1 broadcast.
        path: Where to write. Weights beside it are in a file of the same name with ".data" added.
        dynamic: Names of dimensions whose size may vary, by their index for all inputs, or by input and index:
            {0: "batch", 1: "length"}, or {"images": {0: "batch"}}. Equal names are equal sizes. {} for none.
        opset: Version of ONNX's operators, 18 or more; from 23 on attention is one operator, which not every
            runtime has and which takes no empty batch.
        external_data: Whether weights lie beside the file. Default only if they are larger than 2 GB, as they must.
        tolerance: Largest difference from the model's own outputs to allow, in place of the rule above; for models
            that do not run in float64.

    Raises:
        MissingDependencyError: If onnx, onnxscript or onnxruntime is not installed.
        ArgumentError: If an argument does not fit, the model is compiled or its Python code cannot be traced with these
            dynamic sizes, ONNX lacks an operator, or the file's outputs are too far from the model's.
        UnknownNameError: If `dynamic` names an input that there is not.
        OutputError: If `path` lies in no folder or cannot be written.

    Source:
        Open Neural Network Exchange, onnx.ai/onnx/repo-docs/IR.html; torch.export: pytorch.org/docs/stable/export.html.

    Example:
        >>> from transformer_problems import export_onnx
        >>> report = export_onnx(model, tokens, "encoder.onnx", dynamic={0: "batch", 1: "length"})
    """
    onnx = require("onnx", extra="onnx")
    for package in ("onnxscript", "onnxruntime"):
        require(package, extra="onnx")
    path = Path(path)
    _check_settings(model, onnx, opset, tolerance)
    with torch.inference_mode(False), evaluating(model), written_beside(path) as draft:
        call = ExampleCall.of(model, example_inputs)
        axes = dynamic_axes(call.inputs, dynamic)
        with torch.no_grad():
            outputs = call(model)
            exact = outputs if tolerance is not None else _in_float64(model, call, outputs)
        noise = None if tolerance is not None else _noise(outputs.values(), exact.values())
        allowed = _allowed(noise, exact.values()) if tolerance is None else float(tolerance)
        program = converted(traced(model, call, axes), call.inputs, outputs, opset)
        _save(program, draft, external_data)
        _tidy(onnx, draft, axes, opset)
        error = _error_of(draft, call, exact, allowed, noise)
        num_bytes = bytes_of(draft)
    return OnnxReport(path, num_bytes, opset, tuple(call.inputs), tuple(outputs), error, noise, allowed)


def _check_settings(model: nn.Module, onnx: Any, opset: int, tolerance: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ArgumentError(f"weights must be finite; {name} holds NaN or infinity. Load or train the model again.")
    newest = onnx.defs.onnx_opset_version()
    if not isinstance(opset, int) or not _LOWEST_OPSET <= opset <= newest:
        raise ArgumentError(f"opset must be {_LOWEST_OPSET} to {newest}; got {opset!r}. Choose {_LOWEST_OPSET}.")
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 <= tolerance < math.inf):
        raise ArgumentError(f"tolerance must be a number, 0 or more; got {tolerance!r}. Use None for the rule.")
    for path, module in model.named_modules():
        if isinstance(module, CompiledModel):
            raise ArgumentError(
                f"model must not be compiled; {path or 'it'} is a CompiledModel. Export the plain model, before "
                "compiling it; CompileGraph.undo gives it back."
            )
        if getattr(module, "made_by", None) == "quantize":
            raise ArgumentError(
                f"model must hold floats; {path or 'it'}, of class {type(module).__name__}, holds codes. Export the "
                "float model and give its file to quantize_onnx."
            )
    for path, weight in model.named_parameters():
        if weight.device.type != "cpu" or (weight.is_floating_point() and weight.dtype != torch.float32):
            raise ArgumentError(
                f"model must lie on a CPU in float32; {path} is {weight.dtype} on {weight.device}. Export "
                "model.cpu().float(), and quantize the file if it is to be smaller."
            )


def _in_float64(model: nn.Module, call: ExampleCall, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float outputs as float64 gives them; whole numbers as they are, since a tie may fall otherwise there."""
    try:
        exact = call.double()(copy.deepcopy(model).double())
    except Exception as error:  # whatever a layer raises that knows only float32
        raise ArgumentError(
            f"model must run in float64, which tells how exact float32 is; it does not: {error} Pass tolerance, the "
            "largest difference from the model's outputs that you accept."
        ) from error
    return {name: y if y.is_floating_point() else outputs.get(name, y) for name, y in exact.items()}


def _noise(outputs: Collection[Tensor], exact: Collection[Tensor]) -> float:
    """Largest difference that rounding to float32 makes; refused where it is more than rounding does."""
    noise, largest = _largest_difference(outputs, exact), _largest(exact)
    if noise > _MOST_NOISE * largest:
        raise ArgumentError(
            f"model must give nearly the same in float32 and float64, to tell how exact its file has to be; of outputs "
            f"up to {largest:.3g} they differ by {noise:.3g}. Look for random numbers and a state that the model keeps "
            "between calls, choose another example, or pass tolerance."
        )
    return noise


def _save(program: Any, draft: Path, external_data: bool | None) -> None:
    """Write the file, with its weights beside it if they are too large for one, or as asked."""
    if external_data is None:
        weights = program.model.graph.initializers.values()
        external_data = sum(weight.const_value.nbytes for weight in weights) > _EMBEDDED_BYTES
    with quiet():
        program.save(str(draft), external_data=external_data)


def _tidy(onnx: Any, draft: Path, axes: Mapping[str, Mapping[int, str]], opset: int) -> None:
    """Give sizes the names asked for, leave out the traces of source files that PyTorch adds, and check the file."""
    proto = onnx.load(str(draft), load_external_data=False)
    graph, found = proto.graph, {}
    for value in graph.input:
        for axis, size_name in axes[value.name].items():
            found[value.type.tensor_type.shape.dim[axis].dim_param] = size_name
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in found) or r"(?!)")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # it may be an expression, such as s6*s11
                dim.dim_param = symbols.sub(lambda match: found[match[0]], dim.dim_param)
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
    onnx.save(proto, str(draft))
    onnx.checker.check_model(str(draft), full_check=True)
    written = {entry.domain: entry.version for entry in proto.opset_import}.get("")
    if written != opset:
        raise ArgumentError(f"opset must be one that this model can be written in; got {opset}. Choose {written}.")


def _error_of(
    draft: Path, call: ExampleCall, exact: Mapping[str, Tensor], allowed: float, noise: float | None
) -> float:
    """How far the file's outputs are from the model's.

    Raises:
        ArgumentError: If that is more than allowed.
    """
    with torch.no_grad():
        outputs = OnnxSession(draft)(*call.tensors())
    error = _largest_difference([outputs] if isinstance(outputs, Tensor) else outputs, exact.values())
    if not error <= allowed:
        why = "" if noise is None else f", {_NOISE_MULTIPLE:g} times the model's own float32 noise of {noise:.3g}"
        raise ArgumentError(
            f"the file's outputs must be within {allowed:.3g} of the model's{why}; they differ by {error:.3g}. Look "
            "for random numbers, a state that the model keeps between calls, and Python branches on values; pass a "
            "larger tolerance if that difference does not matter to you."
        )
    return error


def _largest_difference(ours: Collection[Tensor], theirs: Collection[Tensor]) -> float:
    """Over all numbers of all tensors; infinite where shapes, whole numbers, or what is not finite differ."""
    if [x.shape for x in ours] != [y.shape for y in theirs]:
        return math.inf
    largest = 0.0
    for x, y in zip(ours, theirs, strict=True):
        wrong = ~((x == y) | ((x != x) & (y != y)))
        if not wrong.any():
            continue
        if not x.is_floating_point():
            return math.inf
        largest = max(largest, (x.double() - y.double()).abs().nan_to_num(nan=math.inf)[wrong].max().item())
    return largest


def _allowed(noise: float | None, exact: Collection[Tensor]) -> float:
    """A multiple of the noise, or of float32's last bit at the largest output where the noise is below that."""
    return _NOISE_MULTIPLE * max(noise or 0.0, torch.finfo(torch.float32).eps * _largest(exact))


def _largest(outputs: Collection[Tensor]) -> float:
    """The largest finite magnitude among the float outputs."""
    floats = [y[y.isfinite()].abs() for y in outputs if y.is_floating_point()]
    return max((y.max().item() for y in floats if y.numel()), default=0.0)
