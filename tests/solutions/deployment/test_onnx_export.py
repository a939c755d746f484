"""An exported file gives what the model gives, at other sizes too; what cannot be exported is named and not written."""

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, OutputError, UnknownNameError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.deployment import onnx_export
from transformer_problems.solutions.deployment.compiled import CompiledModel
from transformer_problems.solutions.deployment.onnx_export import OnnxReport, export_onnx
from transformer_problems.solutions.deployment.onnx_session import OnnxSession
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding

BATCH, LENGTH = {0: "batch"}, {0: "batch", 1: "length"}


@pytest.fixture(scope="module", autouse=True)
def one_registry() -> Iterator[None]:
    """PyTorch parses all of its ONNX functions again at every export, which is most of the time of a small one."""
    registry = _registration.ONNXRegistry.from_torchlib()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", lambda *args, **kwargs: copy.copy(registry))
        yield


def attention(is_causal: bool = False) -> Callable[[], SelfAttention]:
    position = RotaryEmbedding(head_dim=8) if is_causal else None
    return lambda: SelfAttention(16, 2, is_causal=is_causal, position=position)


def tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % 11


def check_equal(report: OnnxReport, model: nn.Module, *inputs: Tensor, **named: Tensor) -> None:
    """The session's outputs are as far from float64 as the report allows for its example, and rounding as there."""
    with torch.no_grad():
        exact = (
            copy.deepcopy(model).double().eval()(*(x.double() if x.is_floating_point() else x for x in inputs), **named)
        )
        ours = OnnxSession(report.path)(*inputs, *named.values())
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=report.tolerance * 4)


def test_an_encoder_with_a_mask_and_free_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder(11, 16, 1, attention())
    example = {"tokens": tokens(2, 7), "key_mask": torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])}
    report = export_onnx(model, example, tmp_path / "encoder.onnx", dynamic=LENGTH)
    assert report.input_names == ("tokens", "key_mask") and report.output_names == ("output",)
    assert 0 <= report.error <= report.tolerance and 0 < report.noise < 1e-5
    session = OnnxSession(report.path)
    assert [value.shape for value in session.inputs] == [("batch", "length")] * 2
    assert session.outputs[0].shape == ("batch", "length", 11)
    for batch, length in ((1, 1), (3, 5), (2, 64)):
        mask = torch.arange(length).expand(batch, length) < length - torch.arange(batch)[:, None]
        check_equal(report, model, tokens(batch, length), key_mask=mask)
    assert session(tokens(0, 7), torch.ones(0, 7, dtype=torch.bool)).shape == (0, 7, 11)


def test_a_decoder_sees_no_later_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(11, 16, 1, attention(is_causal=True))
    report = export_onnx(model, tokens(2, 7), tmp_path / "decoder.onnx")
    check_equal(report, model, tokens(3, 7))
    session = OnnxSession(report.path)
    changed = tokens(3, 7)
    changed[:, 5:] = 0
    torch.testing.assert_close(session(changed)[:, :5], session(tokens(3, 7))[:, :5])


def test_a_vision_transformer_with_any_number_of_images_and_nothing_heard_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    patches = PatchEmbedding(16, 4)
    model = VisionTransformer(patches, (8, 8), 1, attention(), num_classes=3)
    model.eval().head.train()
    modes = {name: part.training for name, part in model.named_modules()}
    before, levels = copy.deepcopy(model.state_dict()), logger_levels()
    images = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as heard, torch.inference_mode():
        warnings.simplefilter("always")
        report = export_onnx(model, images, tmp_path / "vision.onnx", opset=20)
    assert capfd.readouterr() == ("", "") and not heard and not caplog.records
    assert logger_levels() == levels
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert OnnxSession(report.path).inputs[0].shape == ("batch", 3, 8, 8)
    check_equal(report, model, torch.randn(5, 3, 8, 8))
    proto = onnx.load(report.path)
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [report.opset] == [20]
    assert str(Path(__file__).parents[3]) not in str(proto)  # no paths of this machine


def logger_levels() -> dict[str, int]:
    names = ("", "torch", "torch.onnx", "onnxscript")
    return {name: logging.getLogger(name).level for name in names} | {"handlers": len(logging.getLogger().handlers)}


@pytest.mark.peer
def test_a_bert_of_transformers_with_named_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config)
    example = {"attention_mask": torch.ones(2, 7, dtype=torch.long), "input_ids": tokens(2, 7)}
    example["attention_mask"][1, 4:] = 0
    report = export_onnx(model, example, tmp_path / "bert.onnx", dynamic=LENGTH)
    assert model.training
    assert report.input_names == ("input_ids", "attention_mask")  # in the order of forward
    assert report.output_names == ("last_hidden_state", "pooler_output")
    longer = {"attention_mask": torch.ones(3, 9, dtype=torch.long), "input_ids": tokens(3, 9)}
    longer["attention_mask"][0, 2:] = 0
    with torch.no_grad():
        theirs = copy.deepcopy(model).double().eval()(**longer)
    hidden, pooled = OnnxSession(report.path)(*(longer[name] for name in report.input_names))
    torch.testing.assert_close(hidden.double(), theirs.last_hidden_state, rtol=0, atol=report.tolerance * 4)
    torch.testing.assert_close(pooled.double(), theirs.pooler_output, rtol=0, atol=report.tolerance * 4)


class Parts(nn.Module):
    """Outputs in a tuple within a mapping, one of them whole numbers."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor] | None]:
        return {"sum": x + y, "none": None, "both": (x * y, x.argmax(-1))}


def test_several_inputs_and_nested_outputs_keep_names_and_order(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    report = export_onnx(Parts(), [x, y], tmp_path / "parts.onnx", dynamic={"x": BATCH, "y": {0: "batch"}})
    assert report.output_names == ("sum", "both_0", "both_1")
    total, product, best = OnnxSession(report.path)(x[:1], y[:1])
    assert torch.equal(total, x[:1] + y[:1]) and torch.equal(product, x[:1] * y[:1])
    assert torch.equal(best, x[:1].argmax(-1))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(3)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Codes(nn.Identity):
    made_by = "quantize"


class Gathering(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return x[0]


class Strange(nn.Module):
    def forward(self, x: Tensor) -> set[Tensor]:
        return {x}


class OnlyFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("this layer knows only float32.")
        return x


def compiled() -> nn.Module:
    return CompiledModel(nn.Linear(3, 4), mode="default", backend="eager", dynamic=None)


def within(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), part)


def message(model: nn.Module, path: Path, **settings: object) -> str:
    path.write_text("what stood there before")
    with pytest.raises(ArgumentError) as caught:
        export_onnx(model, torch.ones(2, 3), path, **settings)  # type: ignore[arg-type]
    assert path.read_text() == "what stood there before"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return str(caught.value)


def test_a_missing_operator_is_named_with_its_module(tmp_path: Path) -> None:
    text = message(within(Bessel()), tmp_path / "model.onnx")
    assert "ONNX has; it has none for aten.special_bessel_j0.default, which Bessel at 1 uses. Replace it" in text


def test_a_branch_on_values_is_named_with_its_module(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = message(within(Branch()), tmp_path / "model.onnx")
    assert "1, of class Branch, is not: Could not guard on data-dependent expression" in text
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_size_that_the_model_fixes_is_named(tmp_path: Path) -> None:
    text = message(FixedLength(), tmp_path / "model.onnx", dynamic=LENGTH)
    assert "with the dynamic sizes ['batch', 'length']; FixedLength is not: You marked length as dynamic" in text


def test_outputs_that_differ_are_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(Random(), tmp_path / "model.onnx")
    assert "model must give nearly the same in float32 and float64" in text and "random numbers" in text
    text = message(Random(), tmp_path / "model.onnx", tolerance=1e-6)
    assert "must be within 1e-06 of the model's; they differ by 0." in text
    traced = onnx_export.traced

    def wrongly(model: nn.Module, *rest: object) -> object:
        model = copy.deepcopy(model)
        model.weight.data[0, 0] += 1e-4  # far above rounding, far below what anybody would notice
        return traced(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_export, "traced", wrongly)
    text = message(nn.Linear(3, 4), tmp_path / "model.onnx")
    assert "20 times the model's own float32 noise of" in text and "they differ by 0.0001" in text


def test_weights_lie_beside_the_file_where_asked_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, x = nn.Linear(64, 64), tmp_path / "model.onnx", torch.randn(2, 64)
    inside = export_onnx(model, x, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert inside.num_bytes == path.stat().st_size > 4 * 64 * 64
    beside = export_onnx(model, x, path, external_data=True)
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"} and sum(files.values()) == beside.num_bytes
    assert files["model.onnx"] < 4 * 64 * 64 <= files["model.onnx.data"]
    check_equal(beside, model, x)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ArgumentError, match="with its weights beside it"):
        OnnxSession(path)
    monkeypatch.setattr(onnx_export, "_EMBEDDED_BYTES", 1000)
    export_onnx(model, x, path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "example", "settings", "error"),
    [
        ("text", X, {}, "model must be a torch.nn.Module; got str"),
        (nn.Linear(3, 4).bfloat16(), X, {}, "model must lie on a CPU in float32; weight is torch.bfloat16 on cpu"),
        (Codes(), X, {}, "model must hold floats; it, of class Codes, holds codes.*quantize_onnx"),
        (compiled(), X, {}, "model must not be compiled; it is a CompiledModel. Export the plain model, before"),
        (within(compiled()), X, {}, "must not be compiled; 1 is a CompiledModel.*CompileGraph.undo gives it back"),
        (nn.Linear(3, 4), "text", {}, "example_inputs must be tensors; got str"),
        (nn.Linear(3, 4), X.double(), {}, "example_inputs must lie on a CPU and be in float32.*got torch.float64"),
        (nn.Linear(3, 4), (X, X), {}, "example_inputs must fit forward of Linear: too many positional arguments"),
        (nn.Linear(3, 4), {"x": X}, {}, "example_inputs must fit forward of Linear: missing a required argument"),
        (Gathering(), (X, X), {}, "argument of their own in forward of Gathering, which gathers them in x"),
        (Strange(), X, {}, "model must return tensors, in tuples or mappings; got set"),
        (nn.Linear(3, 4), X[:1], {}, "2 or more in dimensions that are dynamic.*input has 1 for 'batch'"),
        (nn.Linear(3, 4), X, {"dynamic": {2: "batch"}}, "dynamic must name dimensions of input, 0 to 1; got 2"),
        (nn.Linear(3, 4), X, {"dynamic": {0: "1"}}, "dynamic must give names such as 'batch'; got '1'"),
        (nn.Linear(3, 4), X, {"dynamic": {0: "n", 1: "n"}}, "one name to equal sizes only; 'n' is 2 and 3"),
        (nn.Linear(3, 4), X, {"opset": 11}, "opset must be 18 to [0-9]+; got 11. Choose 18"),
        (nn.Linear(3, 4), X, {"tolerance": -1.0}, "tolerance must be a number, 0 or more; got -1.0"),
        (OnlyFloat32(), X, {}, "model must run in float64.*knows only float32.*Pass tolerance"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: nn.Module, example: Tensor, settings: dict[str, object], error: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=error):
        export_onnx(model, example, tmp_path / "model.onnx", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_unknown_inputs_and_unwritable_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown input 'tokens'. Known: input"):
        export_onnx(nn.Linear(3, 4), X, tmp_path / "model.onnx", dynamic={"tokens": BATCH})
    with pytest.raises(OutputError, match="path must lie in a folder that can be written"):
        export_onnx(nn.Linear(3, 4), X, tmp_path / "absent" / "model.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="path must be a file that can be written"):
        export_onnx(nn.Identity(), X, tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_the_error_says_what_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed.*transformer-problems\[onnx\]"):
        export_onnx(nn.Linear(3, 4), X, tmp_path / "model.onnx")
