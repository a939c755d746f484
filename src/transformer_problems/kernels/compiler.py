"""Builds the C++ kernels on first use, with the compiler that the machine has, and keeps what it built."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from transformer_problems.core.errors import KernelBuildError, MissingDependencyError

FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
)
_TIMEOUT_S = 300


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX if it is set, else the first of g++, clang++ and c++ that exists.

    Raises:
        MissingDependencyError: If there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise MissingDependencyError(
        f"no C++ compiler found; looked for {', '.join(command[0] for command in candidates)}. Install one "
        "(Debian: apt install g++; macOS: xcode-select --install) or name one in the environment variable CXX."
    )


def cache_folder() -> Path:
    """Where built kernels are kept: transformer-problems/kernels in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformer-problems" / "kernels"


def build(source: Path, *, flags: Sequence[str] = FLAGS, folder: Path | None = None) -> Path:
    """Compile one C++ file into a shared library, or find the library that an earlier call compiled.

    A library is known by the hash of its source, the headers beside it, the flags and everything that the compiler
    predefines under them: its version and the processor's instruction sets, so a home folder may be shared by unlike
    machines. It is compiled beside its final name and then moved there, so that processes which build it at once do
    not clash.

    Args:
        folder: Where libraries are kept. Default `cache_folder()`.

    Returns:
        The path of the library.

    Raises:
        MissingDependencyError: If there is no compiler.
        KernelBuildError: If the compiler fails, with its own words, or the folder cannot be written.
    """
    compiler = find_compiler()
    predefined = run([*compiler, *flags, "-x", "c++", "-E", "-dM", os.devnull], source)
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    return keep(source, [*compiler, *flags], "\0".join([*texts, *compiler, *flags, predefined]), folder=folder)


def keep(source: Path, command: Sequence[str], known_by: str, *, folder: Path | None = None) -> Path:
    """The library that a command makes of one file, compiled unless the folder has one known by the same text.

    Args:
        command: The compiler and its flags; the source and where to put the library are added.
        known_by: All that decides what the library is.

    Raises:
        KernelBuildError: If the compiler fails, with its own words, or the folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    library = folder / f"{source.stem}-{hashlib.sha256(known_by.encode()).hexdigest()[:24]}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                built = Path(workplace) / library.name
                run([*command, str(source), "-o", str(built)], source)
                built.replace(library)
    except OSError as error:
        raise KernelBuildError(
            f"cannot keep the kernel {source.name} in {folder}: {error}. Name a folder that can be written in the "
            "environment variable XDG_CACHE_HOME."
        ) from error
    return library


def has_kernel(name: str, load_it: Callable[[], object]) -> bool:
    """Whether this machine can load a kernel; warns with the reason where it cannot. Callers ask once and keep it."""
    try:
        load_it()
    except (KernelBuildError, MissingDependencyError) as error:
        warnings.warn(f"{name} uses its slower PyTorch path: {error}", stacklevel=5)
        return False
    return True


@cache
def load(source: Path, *, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The built and loaded library of one C++ file, once a process.

    Args:
        extra_flags: Flags for this file beyond `FLAGS`, e.g. "-fopenmp", with which it shares PyTorch's threads where
            both use the system's OpenMP.

    Raises:
        MissingDependencyError: If there is no compiler.
        KernelBuildError: If the file cannot be built or its library not loaded.
    """
    library = build(source, flags=(*FLAGS, *extra_flags))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelBuildError(f"cannot load {library}: {error}. Delete the file to have it built anew.") from error


def run(command: list[str], source: Path) -> str:
    """What a compiler prints.

    Raises:
        KernelBuildError: If it fails, with its own words, or takes more than some minutes.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelBuildError(
            f"compiling {source.name} took more than {_TIMEOUT_S} s: {shlex.join(command)}"
        ) from error
    if done.returncode:
        raise KernelBuildError(
            f"compiling {source.name} failed with exit code {done.returncode}: {shlex.join(command)}\n{done.stderr}"
        )
    return done.stdout
