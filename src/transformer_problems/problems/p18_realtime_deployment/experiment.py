"""Single requests on an ordinary machine: the slow answers, the first answer, and what a faster form gets wrong."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.digits import DIGITS_SOURCE, Images
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.requests import RequestTimes, time_requests
from transformer_problems.lab.results import Results
from transformer_problems.problems.p18_realtime_deployment.forms import FORMS_OF_ONE, SIDE, ImagePlan
from transformer_problems.problems.p18_realtime_deployment.serving import (
    cold_start,
    graph_path,
    request_path,
    store_torch,
)
from transformer_problems.problems.p18_realtime_deployment.training import asked_images, finished, served_model
from transformer_problems.solutions.deployment.onnx_export import export_onnx
from transformer_problems.solutions.deployment.onnx_quantize import quantize_onnx
from transformer_problems.solutions.deployment.onnx_session import OnnxSession

_DEADLINES_MS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0, 23.0, 32.0)
_PERCENTS = (50, 95, 99)

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here: requests are timed in blocks, each of which gives one figure of everything."""

    plan: ImagePlan
    blocks: int
    requests: int  # in a block
    cold_starts: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(ImagePlan(64, 4, 30, 15, batch_size=16), blocks=4, requests=50, cold_starts=1, seeds=1),
    "standard": _Size(ImagePlan(128, 6, 200, 100, batch_size=32), blocks=10, requests=200, cold_starts=3, seeds=3),
    "full": _Size(ImagePlan(384, 12, 2_000, 1_000, batch_size=64), blocks=20, requests=500, cold_starts=5, seeds=5),
}


class RealTimeDeployment:
    """A small Vision Transformer that answers one image at a time: as it is, in other forms, or smaller."""

    problem = 18
    arms = (
        Arm("eager", "float32, eager"),
        Arm("int8", "int8, dynamic", "quantization", lead=True),
        Arm("int8_static", "int8, static", "quantization"),
        Arm("pruned", "Half the heads and neurons", "pruning", lead=True),
        Arm("distilled", "Distilled, half the layers", "distillation", lead=True),
        Arm("edge", "MobileViT, norms folded", "edge-optimized-transformers", lead=True),
        Arm("onnx", "ONNX Runtime", "onnx", lead=True),
        Arm("onnx_int8", "ONNX Runtime, int8", "onnx"),
    )
    chart = Chart(
        metric="share_in_time",
        problem_title="float32 in eager PyTorch",
        solutions_title="The same requests with each solution",
        x_label="deadline, milliseconds",
        y_label="requests answered in time",
        better="higher",
        x_log=True,
        y_from=0.0,
    )
    columns = (
        Column("p50_s", "p50, seconds", better="lower"),
        Column("p95_s", "p95", better="lower"),
        Column("p99_s", "p99", better="lower"),
        Column("cold_start_s", "cold start, seconds", better="lower"),
        Column("resident_bytes", "resident bytes", better="lower"),
        Column("file_bytes", "bytes of the file", better="lower"),
        Column("accuracy", "right answers", better="higher"),
        Column("agreement", "agrees with float32", better="higher"),
    )
    gains = (Effect("p95_s", "ratio", ("faster at the 95th percentile", "slower at the 95th percentile")),)
    costs = (
        Effect("accuracy", "difference", ("points fewer right answers", "points more right answers"), scale=100),
        Effect("cold_start_s", "ratio", ("faster cold start", "slower cold start")),
        Effect("resident_bytes", "ratio", ("less resident memory", "more resident memory")),
        Effect("file_bytes", "ratio", ("smaller file", "larger file")),
    )
    shared_examples = frozenset({"accuracy"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        bench = replace(bench, device=torch.device("cpu"))  # where every form of the model can be served
        size, arm, tested = _SIZES[bench.cell.scale], bench.cell.arm, asked_images()
        model = served_model(bench, size.plan).eval()
        bench.progress(0.5)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            answer, num_bytes = _served(arm, model, size.plan, folder)
            yield Measurement("file_bytes", "B", num_bytes)
            yield from _first_answers(folder, tested, size.cold_starts)
            bench.progress(0.7)
            yield from _told_rightly(answer, tested, bench)
            if arm in FORMS_OF_ONE:
                yield from _agreement(answer, finished(bench, size.plan), tested, bench)
            requests = [image.to(bench.device) for image in tested.pixels.split(1)]
            for block in range(size.blocks):
                times = time_requests(answer, requests, num=size.requests, device=bench.device)
                for metric, unit, value, x in _of_block(times):
                    x_unit = "" if x is None else "ms"
                    yield Measurement(metric, unit, value, x=x, x_unit=x_unit, repeat=block)
                bench.progress(0.7 + 0.3 * (block + 1) / size.blocks)

    def finding(self, results: Results) -> str:
        p50, p95, p99, cold = (results.mean("eager", m) for m in ("p50_s", "p95_s", "p99_s", "cold_start_s"))
        return (
            f"A float32 classifier in eager PyTorch answers half of its requests within {p50 * 1e3:.1f} ms, but of a "
            f"hundred, five take more than {p95 * 1e3:.1f} ms and one more than {p99 * 1e3:.1f} ms; after a start its "
            f"first answer takes {cold:.1f} s."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES[results.scale]
        plan = size.plan
        notes = [
            f"Requests are {DIGITS_SOURCE}, drawn larger to {SIDE} x {SIDE}, one at a time, {size.requests} in each of "
            f"{size.blocks} blocks, whose percentiles are averaged. Models are {plan.num_layers} layers deep, of width "
            f"{plan.width}, and take {plan.steps + plan.finishing_steps} steps of {plan.batch_size} images with AdamW "
            f"at a peak rate of 0.001; pruned ones are pruned {plan.finishing_steps} steps before the end, and "
            f"students take {plan.finishing_steps} steps beside their finished teacher.",
            "All models are served by the CPU. A student is as fast as half the layers are, whoever taught it; what a "
            "teacher adds would be accuracy.",
            "Cold start is that of a new process, from its start to its first answer, Python and all libraries "
            "included; resident bytes are the whole process's after it. Both on one thread.",
        ]
        if (used := results.largest("onnx", "used_torch")) is not None:
            notes.append(
                f"The ONNX files are served by a process that {'imports' if used else 'never imports'} PyTorch. They "
                "are written only if their outputs are within 20 times what float32 itself errs by against float64."
            )
        return tuple(notes)


def _served(arm: str, model: nn.Module, plan: ImagePlan, folder: Path) -> tuple[Answer, int]:
    """What answers requests, and the bytes of the file that it is served from, which is written here."""
    if not arm.startswith("onnx"):
        num_bytes = store_torch(model, arm, plan, folder)
        return torch.inference_mode()(model.forward), num_bytes
    path = graph_path(folder)
    num_bytes = export_onnx(model.cpu(), torch.zeros(2, 1, SIDE, SIDE), path).num_bytes
    if arm == "onnx_int8":
        num_bytes = quantize_onnx(path, path).num_bytes
    session = OnnxSession(path, threads=torch.get_num_threads())

    def answer(images: Tensor) -> Tensor:
        logits = session(images)
        assert isinstance(logits, Tensor)
        return logits

    return answer, num_bytes


def _first_answers(folder: Path, tested: Images, num: int) -> Iterator[Measurement]:
    np.save(request_path(folder), tested.pixels[:1].numpy())
    for repeat in range(num):
        start = cold_start(folder)
        yield Measurement("cold_start_s", "s", start.first_answer_s, repeat=repeat)
        yield Measurement("used_torch", "1", int(start.used_torch), repeat=repeat)
        if start.resident_bytes is not None:
            yield Measurement("resident_bytes", "B", start.resident_bytes, repeat=repeat)


def _told_rightly(answer: Answer, tested: Images, bench: Bench) -> Iterator[Measurement]:
    right = (_classes(answer, tested, bench) == tested.classes).double()
    for repeat, value in enumerate(right.tolist()):
        yield Measurement("accuracy", "1", value, repeat=repeat)


def _agreement(answer: Answer, original: nn.Module, tested: Images, bench: Bench) -> Iterator[Measurement]:
    """The share of images that a form of the model puts into the same class as the model itself."""
    with torch.inference_mode():
        expected = _classes(original.forward, tested, bench)
    yield Measurement("agreement", "1", float((_classes(answer, tested, bench) == expected).double().mean()))


def _classes(answer: Answer, tested: Images, bench: Bench) -> Tensor:
    found = [answer(some.to(bench.device)).argmax(dim=1).cpu() for some in tested.pixels.split(50)]
    return torch.cat(found)


def _of_block(times: RequestTimes) -> Iterator[tuple[str, str, float, float | None]]:
    """What one block of requests tells: metric, unit, value, deadline."""
    for percent in _PERCENTS:
        yield f"p{percent}_s", "s", times.percentile_s(percent), None
    for deadline_ms in _DEADLINES_MS:
        yield "share_in_time", "1", times.share_within(deadline_ms / 1e3), deadline_ms


EXPERIMENT = RealTimeDeployment()
