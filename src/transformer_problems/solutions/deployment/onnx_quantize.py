"""ONNX files whose weights are int8, made by onnxruntime's quantiser."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.deployment.drafts import bytes_of, written_beside
from transformer_problems.solutions.deployment.onnx_session import Array, OnnxSession
from transformer_problems.solutions.deployment.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

Sample: TypeAlias = "Tensor | Array | Sequence[Tensor | Array]"
_PRODUCTS = ("MatMul", "Gemm")
_ROUNDED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}


@dataclass(frozen=True, slots=True)
class QuantizedOnnx:
    """What quantize_onnx wrote.

    Args:
        path: The file.
        num_bytes: Of the file, and of the weights beside it where they lie there.
        num_weights: Weight matrices that are int8 now.
    """

    path: Path
    num_bytes: int
    num_weights: int


def quantize_onnx(
    path: Path | str,
    target: Path | str,
    *,
    calibration: Iterable[Sample] | None = None,
    embeddings: bool = True,
    reduce_range: bool = False,
) -> QuantizedOnnx:
    """Writes a copy of an ONNX file with int8 weights, a scale for each output, and products of int8 inputs.

    Inputs of a product are rounded by their own range as they come, or, with calibration, by the range met on samples,
    which saves finding it each time and errs on inputs beyond it; whatever else reads such an input sees it rounded
    then too. Products of two inputs, as in attention, are computed in floats, as are convolutions without calibration.

    How much accuracy is lost has to be measured: compare the answers of both files.

    Args:
        path: A float32 file, such as export_onnx writes.
        target: Where to write; may be `path` itself.
        calibration: Samples of inputs, one tensor or array, or one for each input. Default none: ranges as they come.
        embeddings: Whether tables of embeddings are rounded too.
        reduce_range: Weights of 7 bits, for x86 processors without VNNI, whose 16-bit sums overflow with 8.

    Raises:
        MissingDependencyError: If onnx or onnxruntime is not installed.
        ArgumentError: If the file is missing, broken or quantised already, has nothing to quantise, or samples do not
            fit it.
        OutputError: If `target` lies in no folder or cannot be written.

    Source:
        Jacob et al. 2017, arXiv:1712.05877, section 2; ONNX Runtime, "Quantize ONNX models",
        onnxruntime.ai/docs/performance/model-optimizations/quantization.

    Example:
        >>> from transformer_problems import quantize_onnx
        >>> quantized = quantize_onnx("encoder.onnx", "encoder_int8.onnx")
    """
    onnx = require("onnx", extra="onnx")
    path, target = Path(path), Path(target)
    session = OnnxSession(path, optimisation="none")
    feeds = None if calibration is None else [_feed(session, sample) for sample in calibration]
    if feeds is not None and not feeds:
        raise ArgumentError("calibration must hold one sample at least; got none. Use None for ranges as they come.")
    model = _float_model(onnx, path)
    quantization = require("onnxruntime.quantization", extra="onnx")
    settings = {
        "op_types_to_quantize": [*_PRODUCTS, *(["Gather"] if embeddings else []), *([] if feeds is None else ["Conv"])],
        "nodes_to_exclude": _products_of_inputs(model.graph),
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": _lies_beside(onnx, path),
    }
    with written_beside(target) as draft:
        with quiet():
            if feeds is None:
                quantization.quantize_dynamic(model, draft, **settings)
            else:
                settings |= {
                    "activation_type": quantization.QuantType.QUInt8,  # x86 multiplies no two signed numbers
                    # an output with a large range would spoil its neighbours, logits too, if they were rounded together
                    "extra_options": {"OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
                }
                quantization.quantize_static(model, draft, _reader(quantization, feeds), **settings)
        num_weights = _count_codes(onnx, draft)
        if not num_weights:
            raise ArgumentError(
                f"path must hold products with constant float32 weights, which are what is quantised; {path} has none."
            )
        OnnxSession(draft)  # refuses what onnxruntime could not run
        num_bytes = bytes_of(draft)
    return QuantizedOnnx(target, num_bytes, num_weights)


def _feed(session: OnnxSession, sample: Sample) -> dict[str, Array]:
    feed = session.feed(*(sample if isinstance(sample, tuple | list) else (sample,)))
    for name, x in feed.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ArgumentError(f"calibration must be finite; a sample of {name} holds NaN or infinity. Leave it out.")
    return feed


def _float_model(onnx: Any, path: Path) -> Any:
    """The file's model, with a name for every node; refused if it is quantised already."""
    model = onnx.load(str(path))
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{place}"
        if node.op_type in _ROUNDED:
            raise ArgumentError(
                f"path must be a file in floats; {path} is quantised already: it has {node.op_type}. Start from the "
                "file that it was made of."
            )
    return model


def _products_of_inputs(graph: Any) -> list[str]:
    """Names of products without a constant weight."""
    constants = {weight.name for weight in graph.initializer}
    return [node.name for node in graph.node if node.op_type in _PRODUCTS and not constants & set(node.input[:2])]


def _lies_beside(onnx: Any, path: Path) -> bool:
    """Whether the file's weights lie in another."""
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    return any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in weights)


def _count_codes(onnx: Any, path: Path) -> int:
    """Weights of two dimensions or more in eight bits, signed or not; scales and zero points have fewer dimensions."""
    codes = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    return sum(weight.data_type in codes and len(weight.dims) >= 2 for weight in weights)


def _reader(quantization: Any, feeds: Sequence[dict[str, Array]]) -> Any:
    """The samples in the form that onnxruntime reads them in."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    return Reader()
