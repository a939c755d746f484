"""A session gives what the graph says, refuses what does not fit it in one clear error, and needs no PyTorch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, OutputError, UnknownNameError
from transformer_problems.solutions.deployment.onnx_session import OnnxSession, OnnxValue

WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def write(path: Path, *, outputs: int = 1, dtype: int = TensorProto.FLOAT) -> Path:
    """y = x W, z = gelu(y) written out as an exporter would, w = the sum of two ids' rows."""
    half, root = np.float32(0.5), np.float32(2**0.5)
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "zero"], ["y"]),
        helper.make_node("Gather", ["weight", "ids"], ["rows"]),
        helper.make_node("Div", ["rows", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["shifted"]),
        helper.make_node("Mul", ["rows", "shifted"], ["doubled"]),
        helper.make_node("Mul", ["doubled", "half"], ["z"]),
    ]
    constants = {"weight": WEIGHT, "zero": np.zeros(3, np.float32), "one": np.float32(1), "half": half, "root": root}
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", dtype, ["batch", 4]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("y", "z")[:outputs]],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "model.onnx", outputs=2)


X, IDS = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0])


@pytest.mark.parametrize("optimisation", ["none", "basic", "extended", "all"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_level_gives_what_the_graph_says(file: Path, optimisation: str, threads: int) -> None:
    session = OnnxSession(file, threads=threads, optimisation=optimisation)
    y, z = session(X, IDS)
    weight = torch.from_numpy(WEIGHT)
    torch.testing.assert_close(y, (X.double() @ weight.double()).float())  # one product in float32
    torch.testing.assert_close(z, torch.nn.functional.gelu(weight[IDS].double()).float())
    for ours, theirs in zip(session.run(X.numpy(), IDS.numpy()), (y, z), strict=True):
        assert np.array_equal(ours, theirs.numpy())
    assert session.load_s > 0
    assert session.inputs == (OnnxValue("x", "float32", ("batch", 4)), OnnxValue("ids", "int64", ("batch",)))
    assert "x: float32 [batch, 4]" in repr(session)


def test_one_output_is_a_tensor_by_itself(tmp_path: Path) -> None:
    y = OnnxSession(write(tmp_path / "model.onnx"))(X, IDS)
    assert isinstance(y, torch.Tensor) and y.shape == (2, 3)


def test_no_rows_give_no_rows(file: Path) -> None:
    y, z = OnnxSession(file)(X[:0], IDS[:0])
    assert y.shape == z.shape == (0, 3)


def test_strided_inputs_are_read_in_their_order(file: Path) -> None:
    session = OnnxSession(file)
    strided = X.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(session(strided, IDS)[0], session(X, IDS)[0])
    assert torch.equal(session(X, torch.tensor([3, 9, 0])[::2])[1], session(X, IDS)[1])


def test_gradients_are_refused_unless_nobody_asks(file: Path) -> None:
    session, x = OnnxSession(file), X.clone().requires_grad_()
    with pytest.raises(ArgumentError, match=r"x must not need a gradient.*detach"):
        session(x, IDS)
    with torch.no_grad():
        y, _ = session(x, IDS)
    with torch.inference_mode():
        assert torch.equal(session(X * 1, IDS)[0], y)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X,), r"as many as the 2 of model.onnx; got 1. Pass x: float32 \[batch, 4\]; ids: int64 \[batch\]"),
        ((X, IDS, IDS), "as many as the 2 of model.onnx; got 3"),
        ((X.double(), IDS), r"x must be float32 \[batch, 4\]; got float64 \[2, 4\]"),
        ((X, IDS.int()), r"ids must be int64 \[batch\]; got int32 \[2\]"),
        ((X[0], IDS), r"x must be float32 \[batch, 4\]; got float32 \[4\]"),
        ((X[:, :3], IDS), r"x must be float32 \[batch, 4\]; got float32 \[2, 3\]"),
        ((X, IDS[:1]), r"ids must be int64 \[batch\]; got int64 \[1\]"),
        ((X.to("meta"), IDS), r"x must lie on the CPU; it is on meta"),
        ((X.numpy(), IDS), r"inputs must all be of type Tensor; got ndarray. .* run\(\) with numpy arrays"),
        ((X, IDS + 9), r"inputs must be ones that model.onnx can compute.*out of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_nothing_is_printed(
    file: Path, inputs: tuple[torch.Tensor, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    session = OnnxSession(file)
    with pytest.raises(ArgumentError, match=message):
        session(*inputs)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ArgumentError, match="inputs must all be of type ndarray; got Tensor"):
        session.run(X, IDS)  # type: ignore[arg-type]


def test_files_that_are_none_are_refused_and_nothing_is_printed(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = file.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "text": b"no model", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArgumentError, match=f"path must be a whole ONNX file.*{name}.*Export it again"):
            OnnxSession(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"there is no .*absent\.onnx"):
        OnnxSession(tmp_path / "absent.onnx")
    with pytest.raises(ArgumentError, match="there is no"):
        OnnxSession(tmp_path)
    with pytest.raises(ArgumentError, match=r"x of bfloat\.onnx must be a tensor of one of float32, .*bfloat16"):
        OnnxSession(bfloat_input(tmp_path / "bfloat.onnx"))
    assert capfd.readouterr() == ("", "")


def bfloat_input(path: Path) -> Path:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_wrong_settings_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="threads must be positive; got 0"):
        OnnxSession(file, threads=0)
    with pytest.raises(UnknownNameError, match="unknown optimisation 'full'"):
        OnnxSession(file, optimisation="full")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"optimised_path must lie in a folder that exists"):
        OnnxSession(file, optimised_path=tmp_path / "absent" / "model.onnx")


def test_without_onnxruntime_the_error_says_what_installs_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'transformer-problems\[onnx\]'"):
        OnnxSession(file)


def test_the_optimised_graph_is_kept_and_gives_the_same(file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "optimised.onnx"
    session = OnnxSession(file, optimisation="extended", optimised_path=kept)
    assert len(onnx.load(kept).graph.node) < len(onnx.load(file).graph.node)  # the written-out GELU is one node
    again = OnnxSession(kept, optimisation="none")
    for ours, theirs in zip(again(X, IDS), session(X, IDS), strict=True):
        assert torch.equal(ours, theirs)


WITHOUT_TORCH = """
import sys
from pathlib import Path


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not here")


sys.meta_path.insert(0, NoTorch())
import numpy as np
import onnxruntime
from transformer_problems.solutions.deployment.onnx_session import OnnxSession

folder = Path(sys.argv[1])
feed = dict(np.load(folder / "inputs.npz"))
plain = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, feed)
np.savez(folder / "outputs.npz", plain=plain[0], ours=OnnxSession(folder / "model.onnx").run(*feed.values())[0])
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
"""


def test_a_process_without_torch_gives_the_same(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", outputs=2)
    np.savez(tmp_path / "inputs.npz", x=X.numpy(), ids=IDS.numpy())
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], check=True, capture_output=True)
    found = np.load(tmp_path / "outputs.npz")
    here = OnnxSession(tmp_path / "model.onnx")(X, IDS)[0].numpy()
    assert np.array_equal(found["ours"], here) and np.array_equal(found["plain"], here)
