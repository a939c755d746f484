"""Builds the CUDA C++ kernels on first use, with the nvcc that the machine has."""

import ctypes
import os
import shutil
from functools import cache
from pathlib import Path

import torch

from transformer_problems.core.errors import KernelBuildError, MissingDependencyError
from transformer_problems.kernels.compiler import keep, run

CUDA_FLAGS = ("-std=c++17", "-O3")


def find_nvcc() -> str:
    """The path of nvcc: on the path, or in $CUDA_HOME/bin, by default /usr/local/cuda/bin.

    Raises:
        MissingDependencyError: If there is none.
    """
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=home)
    if found is None:
        raise MissingDependencyError(
            f"no CUDA compiler found; looked for nvcc on the path and in {home}. Install the CUDA toolkit, or name its "
            "folder in the environment variable CUDA_HOME."
        )
    return found


@cache
def load_cuda(source: Path, device_index: int) -> ctypes.CDLL:
    """The built and loaded library of one .cu file for the architecture of a device, once a process.

    Raises:
        MissingDependencyError: If there is no nvcc.
        KernelBuildError: If the file cannot be built or its library not loaded.
    """
    nvcc = find_nvcc()
    major, minor = torch.cuda.get_device_capability(device_index)
    command = [nvcc, *CUDA_FLAGS, f"-arch=sm_{major}{minor}", "--shared", "-Xcompiler", "-fPIC"]
    library = keep(source, command, "\0".join([source.read_text(), *command, run([nvcc, "--version"], source)]))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelBuildError(f"cannot load {library}: {error}. Delete the file to have it built anew.") from error
