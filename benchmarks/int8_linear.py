"""Seconds of linear layers in int8 against float32, torchao, ONNX Runtime and PyTorch's own dynamic quantization.

    python benchmarks/int8_linear.py --threads 2

All round inputs on the fly. They take turns, so that a slower moment of the machine falls on all. Before each turn are
a rest, in which the threads of the one before stop waiting actively for more work, and a call that is not counted,
which wakes its own. A peer that is not installed is left out, and so said.
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer_problems.solutions.compression.int8 import Int8Linear

SIZES = ((768, 768), (768, 3072), (3072, 768))
REST_S = 0.01
CALLS = 3  # counted, of each turn
Layer = Callable[[Tensor], object]


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, median of {options.repeats} turns of {CALLS} calls")
    for inputs, outputs in SIZES:
        layer = nn.Linear(inputs, outputs).eval()
        ours = Int8Linear.from_linear(layer)
        layers: dict[str, Layer] = {"float32": layer, "ours": ours}
        for name, make in (("torchao", torchao_layer), ("ONNX Runtime", onnx_layer), ("PyTorch's own", torch_layer)):
            try:
                with quiet():
                    layers[name] = make(layer)
            except ImportError:
                print(f"  {name} is not installed")
        for rows in (1, 128):
            seconds = taking_turns(layers, torch.randn(rows, inputs), options.repeats)
            peers = {name: value for name, value in seconds.items() if name not in ("float32", "ours")}
            fastest = min(peers, key=lambda name: peers[name])
            figures = ", ".join(f"{name} {value * 1e6:.0f} us" for name, value in seconds.items())
            print(f"{inputs} x {outputs}, {rows} rows: {figures}")
            print(
                f"    float32 / ours {seconds['float32'] / seconds['ours']:.2f} ({ours.backend_for(rows)}), "
                f"{fastest} / ours {peers[fastest] / seconds['ours']:.2f}"
            )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Without what libraries say while they are imported and convert."""
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def torchao_layer(layer: nn.Linear) -> Layer:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features)).eval()
    model[0].load_state_dict(layer.state_dict())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def onnx_layer(layer: nn.Linear) -> Layer:
    """An int8 matrix product of the ONNX standard, run by ONNX Runtime without copies of its input."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    names = [onnx.numpy_helper.from_array(layer.weight.detach().T.contiguous().numpy(), "w")]
    names.append(onnx.numpy_helper.from_array(layer.bias.detach().numpy(), "b"))
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["xw"]), onnx.helper.make_node("Add", ["xw", "b"], ["y"])]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", layer.in_features])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", layer.out_features])
    graph = onnx.helper.make_graph(nodes, "layer", [x], [y], names)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 4
    with tempfile.TemporaryDirectory() as folder:
        plain, rounded = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, str(plain))
        quantize_dynamic(plain, rounded, per_channel=True)
        session = onnxruntime.InferenceSession(str(rounded), settings, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def torch_layer(layer: nn.Linear) -> Layer:
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    return quantized


@torch.inference_mode()
def taking_turns(layers: dict[str, Layer], x: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        for _ in range(3):
            layer(x)
    for _ in range(repeats):
        for name, layer in layers.items():
            time.sleep(REST_S)
            layer(x)
            for _ in range(CALLS):
                start = time.perf_counter()
                layer(x)
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
