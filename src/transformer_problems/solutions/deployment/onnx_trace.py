"""What the export to ONNX asks of PyTorch: the example as a call, its dynamic sizes, and the graph of the model."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.solutions.deployment.quiet import quiet

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
DynamicAxes = Mapping[int, str] | Mapping[str, Mapping[int, str]]
_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'")
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")  # torch.export's name of an input's size
_COLOURS = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """A call of a model's forward with example tensors, by the names of its arguments.

    Args:
        inputs: Tensors by name, in the order of forward.
        by_name: Whether they are passed as keyword arguments.
    """

    inputs: dict[str, Tensor]
    by_name: bool

    @classmethod
    def of(cls, model: nn.Module, example: ExampleInputs) -> Self:
        by_name = isinstance(example, Mapping)
        args = () if isinstance(example, Mapping) else (example,) if isinstance(example, Tensor) else tuple(example)
        named = dict(example) if isinstance(example, Mapping) else {}
        for x in (*args, *named.values()):
            _check_example(x)
        try:
            bound = inspect.signature(model.forward).bind(*args, **named).arguments
        except TypeError as error:
            raise ArgumentError(
                f"example_inputs must fit forward of {type(model).__name__}: {error}. Give one tensor, several in its "
                "order, or a mapping by the names of its arguments."
            ) from error
        if not all(isinstance(x, Tensor) for x in bound.values()):
            raise ArgumentError(
                f"example_inputs must each have an argument of their own in forward of {type(model).__name__}, which "
                f"gathers them in {', '.join(bound)}. Wrap it in a module whose forward names them."
            )
        return cls({name: x.detach().clone() for name, x in bound.items()}, by_name)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return () if self.by_name else self.tensors()

    @property
    def kwargs(self) -> dict[str, Tensor]:
        return dict(zip(self.inputs, self.tensors(), strict=True)) if self.by_name else {}

    def tensors(self) -> tuple[Tensor, ...]:
        """Copies, so that a model that writes into its inputs leaves the example as it is."""
        return tuple(x.clone() for x in self.inputs.values())

    def double(self) -> Self:
        """The same call with floats in float64."""
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs.items()}
        return type(self)(inputs, self.by_name)

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's outputs by name: those of a mapping, else "output", with a number where there are several."""
        outputs = dict(_leaves(model(*self.args, **self.kwargs), ""))
        return outputs if len(outputs) > 1 or "output_0" not in outputs else {"output": outputs["output_0"]}


def dynamic_axes(inputs: Mapping[str, Tensor], dynamic: DynamicAxes) -> dict[str, dict[int, str]]:
    """Names of the dimensions that may vary, for every input.

    Raises:
        UnknownNameError: If there is no such input.
        ArgumentError: If there is no such dimension, or the example does not show that its size may vary.
    """
    axes: dict[str, dict[int, str]] = {name: {} for name in inputs}
    for key, value in dynamic.items():
        if isinstance(value, str):
            for name in inputs:
                axes[name][int(key)] = value
        elif key in axes:
            axes[str(key)] |= value
        else:
            raise UnknownNameError("input", str(key), inputs)
    sizes: dict[str, int] = {}
    for name, x in inputs.items():
        for axis, size_name in axes[name].items():
            _check_axis(name, x, axis, size_name, sizes)
    return axes


def traced(model: nn.Module, call: ExampleCall, axes: Mapping[str, Mapping[int, str]]) -> ExportedProgram:
    """The model as a graph of PyTorch's operators with the named sizes left open.

    Running the model's Python is tried first. It takes sizes that pass through len() or torch.Size.numel() for fixed,
    so what it refuses is read a second time by analysing the byte code, which keeps those open.

    Raises:
        ArgumentError: If neither way leads through.
    """
    names = {size for named in axes.values() for size in named.values()}
    # DYNAMIC lets the model bound a size, as a table of positions does; a Dim of that name would have to say the bound
    shapes = {name: dict.fromkeys(named, Dim.DYNAMIC) for name, named in axes.items()}
    dynamic: Any = shapes if call.by_name else tuple(shapes.values())
    errors = []
    for strict in (False, True):
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic, strict=strict)
        except Exception as error:  # whatever the model's code raises when it meets a size that is no number
            errors.append(error)
    raise ArgumentError(
        f"model must be traceable with the dynamic sizes {sorted(names)}; {_where(errors[0], model)}: "
        f"{_in_names(_reason(errors[0]), axes)} Leave sizes out of dynamic, or keep values of tensors and sizes out "
        "of Python's if, int() and bool() there."
    ) from errors[0]


def converted(program: ExportedProgram, inputs: Iterable[str], outputs: Iterable[str], opset: int) -> Any:
    """The graph in ONNX's operators, a torch.onnx.ONNXProgram.

    Raises:
        ArgumentError: If ONNX has none for one of PyTorch's operators, with its name and where the model uses it.
    """
    try:
        with quiet():
            return torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
            )
    except torch.onnx.OnnxExporterError as error:
        causes = _causes(error)
        operator = _OPERATOR.search("\n".join(map(str, causes)))
        if operator is None:
            raise ArgumentError(
                f"model must be one that ONNX can express; the exporter says: {_reason(causes[-1])}"
            ) from error
        raise ArgumentError(
            f"model must use operators that ONNX has; it has none for {_user_of(operator[1], program)}. Replace it in "
            "the model, or export a part without it."
        ) from error


def _check_example(x: object) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"example_inputs must be tensors; got {type(x).__name__}.")
    if x.device.type != "cpu" or (x.is_floating_point() and x.dtype != torch.float32):
        raise ArgumentError(
            f"example_inputs must lie on a CPU and be in float32 or whole numbers; got {x.dtype} on {x.device}. "
            "Move them with .cpu() and .float()."
        )


def _check_axis(name: str, x: Tensor, axis: int, size_name: str, sizes: dict[str, int]) -> None:
    if not isinstance(axis, int) or not 0 <= axis < x.dim():
        raise ArgumentError(f"dynamic must name dimensions of {name}, 0 to {x.dim() - 1}; got {axis!r}.")
    if not isinstance(size_name, str) or not size_name.isidentifier():
        raise ArgumentError(f"dynamic must give names such as 'batch'; got {size_name!r} for {name}.")
    if x.shape[axis] < 2:
        raise ArgumentError(
            f"example_inputs must be 2 or more in dimensions that are dynamic, since sizes of 1 broadcast; {name} has "
            f"{x.shape[axis]} for {size_name!r}. Give a larger example."
        )
    if sizes.setdefault(size_name, x.shape[axis]) != x.shape[axis]:
        raise ArgumentError(
            f"dynamic must give one name to equal sizes only; {size_name!r} is {sizes[size_name]} and {x.shape[axis]} "
            f"in {name}. Choose two names."
        )


def _leaves(result: object, name: str) -> list[tuple[str, Tensor]]:
    """Tensors of a result with names made of keys and places, in the order in which torch.export lists them."""
    if isinstance(result, Tensor):
        return [(name or "output_0", result)]
    if result is None:
        return []
    parts: Iterable[tuple[object, object]]
    if isinstance(result, Mapping):
        parts = ((f"{name}_{key}" if name else str(key), part) for key, part in result.items())
    elif isinstance(result, tuple | list):
        parts = ((f"{name or 'output'}_{place}", part) for place, part in enumerate(result))
    else:
        raise ArgumentError(
            f"model must return tensors, in tuples or mappings; got {type(result).__name__}. Wrap it in a module that "
            "returns its tensors."
        )
    return [leaf for part_name, part in parts for leaf in _leaves(part, str(part_name))]


def _where(error: BaseException, model: nn.Module) -> str:
    """That the innermost module whose code was running when the error arose, or the model, is not."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: nn.Module = model
    step = error.__traceback__
    while step is not None:
        running = step.tb_frame.f_locals.get("self")
        found = running if isinstance(running, nn.Module) and id(running) in paths else found
        step = step.tb_next
    kind, path = type(found).__name__, paths[id(found)]
    return f"{path}, of class {kind}, is not" if path else f"{kind} is not"


def _in_names(reason: str, axes: Mapping[str, Mapping[int, str]]) -> str:
    """A reason with sizes called as they are in `axes`."""

    def name_of(match: re.Match[str]) -> str:
        return axes.get(match[1], {}).get(int(match[2]), match[0])

    return _SIZE.sub(name_of, reason)


def _user_of(operator: str, program: ExportedProgram) -> str:
    """An operator with the module that uses it, if the graph tells; it may stand there before its decomposition."""
    short = re.split(r"[.:]+", operator)[-1]
    for node in program.graph.nodes:
        if node.op == "call_function" and short in str(node.target):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            if stack:
                path, kind = stack[-1]
                kind = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
                return f"{node.target}, which {kind}{f' at {path}' if path else ''} uses"
            return str(node.target)
    return operator


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and everything that it came from."""
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _reason(error: BaseException) -> str:
    """What is said of a dynamic size, else the first line."""
    lines = [_COLOURS.sub("", line).strip() for line in str(error).splitlines() if line.strip()]
    said = [line[2:] for line in lines if line.startswith("- ")]
    line = said[0].partition(". If you")[0] if said else lines[0] if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."
