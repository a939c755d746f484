"""int8 files are a quarter of the size and within their rounding of the floats; what cannot be rounded is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.solutions.deployment.onnx_quantize import quantize_onnx
from transformer_problems.solutions.deployment.onnx_session import OnnxSession

RANDOM = np.random.default_rng(0)
TABLE, WEIGHT = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((50, 64), (64, 128)))
WEIGHT[:, 0] *= 100  # one output with a range of its own, which one scale for all would spoil
IDS = torch.arange(6).view(2, 3) * 7


def write(path: Path, *, is_constant: bool = True, external: bool = False) -> Path:
    """ids -> rows of a table -> rows W; scores between the rows, which are no product with a weight."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight" if is_constant else "turned"], ["y"]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "turned"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes if is_constant else [nodes[0], nodes[2], nodes[3]],
        "graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", None])
            for name in ("y", "scores")[not is_constant :]
        ],
        [numpy_helper.from_array(value, name) for name, value in (("table", TABLE), ("weight", WEIGHT))][
            : 1 + is_constant
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("calibration", [None, [IDS, (IDS.numpy(),), IDS[:1, :2]]])
def test_answers_are_within_the_steps_and_the_file_is_a_quarter(
    calibration: list[Tensor] | None, external: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "model.onnx", external=external)
    before = path.read_bytes()
    made = quantize_onnx(path, tmp_path / "small.onnx", calibration=calibration, embeddings=False)
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == before
    floats, codes = TABLE.nbytes, WEIGHT.size
    overhead = 10_000  # names, nodes, and a scale and zero point for each of 128 outputs
    assert made.num_weights == 1 and floats + codes < made.num_bytes < floats + codes + overhead
    y, scores = OnnxSession(made.path)(IDS)
    rows, weight = torch.from_numpy(TABLE).double()[IDS], torch.from_numpy(WEIGHT).double()
    # half a step of the weight times every input, half a step of the input times every weight, and their product
    half_w, half_x = weight.abs().amax(0) / 254, (rows.max() - rows.min()) / 510
    limit = rows.abs().sum(-1, keepdim=True) * half_w + half_x * weight.abs().sum(0) + 64 * half_x * half_w
    exact = rows @ weight
    error = (y.double() - exact).abs()
    in_scores = (scores.double() - rows @ rows.mT).norm() / scores.norm()
    assert in_scores < (1e-6 if calibration is None else 0.01)  # floats all through, or products of rounded rows
    assert (error <= limit * 1.01).all() and error.max() > 0
    assert (error[..., 1:].norm() / exact[..., 1:].norm()) < 0.02


@pytest.mark.parametrize("calibration", [None, [IDS]])
def test_onnxruntime_multiplies_codes_by_the_weight(calibration: list[Tensor] | None, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    made = quantize_onnx(path, tmp_path / "small.onnx", calibration=calibration, embeddings=False)
    rounding = [node for node in onnx.load(made.path).graph.node if "QuantizeLinear" in node.op_type]
    assert rounding and not any("turned" in node.input for node in rounding)  # it meets no weight
    OnnxSession(made.path, optimised_path=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    products = sorted(kind for kind in kinds if "MatMul" in kind)
    codes = "DynamicQuantizeMatMul" if calibration is None else "MatMulIntegerToFloat"
    assert len(products) == 2 and codes in products  # the other may be in floats or multiply the rows' codes


def test_embeddings_and_seven_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    made = quantize_onnx(path, tmp_path / "small.onnx", reduce_range=True)
    assert made.num_weights == 2 and made.num_bytes < TABLE.size + WEIGHT.size + 10_000
    weights = {w.name: numpy_helper.to_array(w) for w in onnx.load(made.path).graph.initializer}
    codes = next(value for name, value in weights.items() if name.startswith("weight") and value.ndim == 2)
    assert codes.dtype == np.int8 and 60 <= np.abs(codes.astype(int)).max() <= 64
    again = quantize_onnx(path, path)  # in the place of the floats
    assert again.path == path and again.num_bytes == path.stat().st_size < TABLE.size + WEIGHT.size + 10_000


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path, target = write(tmp_path / "model.onnx"), tmp_path / "small.onnx"
    (tmp_path / "half.onnx").write_bytes(path.read_bytes()[:1000])
    made = quantize_onnx(path, tmp_path / "done.onnx").path
    products = write(tmp_path / "products.onnx", is_constant=False)
    for source, settings, error in (
        (tmp_path / "absent.onnx", {}, "there is no"),
        (tmp_path / "half.onnx", {}, "path must be a whole ONNX file"),
        (made, {}, "is quantised already: it has "),
        (products, {"embeddings": False}, "must hold products with constant float32 weights"),
        (path, {"calibration": []}, "calibration must hold one sample at least"),
        (path, {"calibration": [IDS.float()]}, r"ids must be int64 \[batch, length\]; got float32"),
        (path, {"calibration": [(IDS, IDS)]}, "as many as the 1 of model.onnx; got 2"),
    ):
        with pytest.raises(ArgumentError, match=error):
            quantize_onnx(source, target, **settings)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="path must lie in a folder"):
        quantize_onnx(path, tmp_path / "absent" / "small.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["done.onnx", "half.onnx", "model.onnx", "products.onnx"]
