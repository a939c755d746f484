"""A served model's first answer: a fresh process reads a file, answers one request and tells how long and how large.

    python -m transformer_problems.problems.p18_realtime_deployment.serving FOLDER

What is imported before the answer is part of the cold start: for an ONNX file that is onnxruntime and not PyTorch.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from transformer_problems.problems.p18_realtime_deployment.forms import ImagePlan

_MODEL, _GRAPH, _PLAN, _REQUEST = "model.safetensors", "model.onnx", "plan.json", "request.npy"


@dataclass(frozen=True, slots=True)
class ColdStart:
    """From the start of a process to its first answer.

    Args:
        first_answer_s: Seconds, Python's own start included.
        resident_bytes: Of the process after its answer, libraries included; None where the system does not tell.
        used_torch: Whether PyTorch was imported.
    """

    first_answer_s: float
    resident_bytes: int | None
    used_torch: bool


def store_torch(model: "nn.Module", arm: str, plan: "ImagePlan", folder: Path) -> int:
    """Write a model with what is needed to build it again; returns the bytes of the file."""
    from transformer_problems.core.treated_files import save_treated

    (folder / _PLAN).write_text(json.dumps({"arm": arm, **asdict(plan)}))
    return save_treated(model, folder / _MODEL)


def graph_path(folder: Path) -> Path:
    """Where an ONNX file is looked for."""
    return folder / _GRAPH


def request_path(folder: Path) -> Path:
    """Where the one request is looked for, a numpy array [1, 1, H, W]."""
    return folder / _REQUEST


def cold_start(folder: Path) -> ColdStart:
    """Serve the folder's model in a fresh process of one thread."""
    command = [sys.executable, "-m", "transformer_problems.problems.p18_realtime_deployment.serving", str(folder)]
    source = str(Path(__file__).parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        answer = process.stdout.readline()
        first_answer_s = time.perf_counter() - started
        told = process.stdout.readline()
    if process.returncode or not answer:
        raise RuntimeError(f"the served model of {folder} ended with {process.returncode} before it answered")
    return ColdStart(first_answer_s, **json.loads(told))


def main() -> None:
    folder = Path(sys.argv[1])
    answer = _answer_with_onnx(folder) if graph_path(folder).exists() else _answer_with_torch(folder)
    print(answer, flush=True)
    print(json.dumps({"resident_bytes": _resident_bytes(), "used_torch": "torch" in sys.modules}), flush=True)


def _answer_with_onnx(folder: Path) -> int:
    import numpy as np

    from transformer_problems.solutions.deployment.onnx_session import OnnxSession

    (logits,) = OnnxSession(graph_path(folder)).run(np.load(request_path(folder)))
    return int(logits.argmax())


def _answer_with_torch(folder: Path) -> int:
    import numpy as np
    import torch

    with torch.inference_mode():
        return int(read_torch(folder)(torch.from_numpy(np.load(request_path(folder)))).argmax())


def read_torch(folder: Path) -> "nn.Module":
    """The model that `store_torch` wrote."""
    from safetensors.torch import load_model

    from transformer_problems.core.treated_files import load_treated
    from transformer_problems.problems.p18_realtime_deployment.forms import ImagePlan, build_model, treatment

    told = json.loads((folder / _PLAN).read_text())
    arm = told.pop("arm")
    model, done = build_model(arm, ImagePlan(**told)), treatment(arm)
    if done is None:
        load_model(model, str(folder / _MODEL))
    else:
        model = load_treated(folder / _MODEL, model, done)
    return model.eval()


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # there is none but on Linux
        return None


if __name__ == "__main__":
    main()
