"""Which device a run uses, and what machine it is on."""

import datetime
import platform
from pathlib import Path
from typing import Literal

import torch

from transformer_problems import __version__
from transformer_problems.core.errors import DeviceError
from transformer_problems.core.records import Environment

DeviceChoice = Literal["auto", "cpu", "cuda"]


def resolve_device(choice: DeviceChoice) -> torch.device:
    """The device a choice stands for on this machine; "auto" takes CUDA where there is one.

    Raises:
        DeviceError: If CUDA is asked for and absent.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: this machine has no usable CUDA device. Use --device auto or cpu.")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def describe_environment(device: torch.device, revision: str) -> Environment:
    """Versions, machine and settings that every measurement of a run shares."""
    return Environment(
        version=__version__,
        revision=revision,
        python=platform.python_version(),
        torch=torch.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        device=device.type,
        threads=torch.get_num_threads(),
        dtype="float32",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
