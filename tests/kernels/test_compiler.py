"""The builder of C++ kernels: what it finds, keeps and says."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transformer_problems.core.errors import KernelBuildError, MissingDependencyError
from transformer_problems.kernels import compiler
from transformer_problems.kernels.compiler import build, cache_folder, find_compiler

try:
    find_compiler()
    HAS_COMPILER = True
except MissingDependencyError:
    HAS_COMPILER = False
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('#ifndef ANSWER\n#define ANSWER 42\n#endif\nextern "C" int answer() { return ANSWER; }\n')
    return path


@needs_compiler
def test_builds_once_for_each_source_and_flags(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "built"
    first = build(source, folder=folder)
    written = first.stat().st_mtime_ns
    assert build(source, folder=folder) == first and first.stat().st_mtime_ns == written
    other = build(source, flags=[*compiler.FLAGS, "-DANSWER=7"], folder=folder)
    assert ctypes.CDLL(str(first)).answer() == 42 and ctypes.CDLL(str(other)).answer() == 7
    source.write_text(source.read_text() + "// changed\n")
    assert build(source, folder=folder) not in {first, other}


@needs_compiler
def test_builders_at_the_same_time_do_not_clash(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "built"
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(lambda _: build(source, folder=folder), range(4)))
    assert list(folder.iterdir()) == [path]  # nothing half-built is left
    assert ctypes.CDLL(str(path)).answer() == 42


@needs_compiler
def test_a_failed_build_quotes_the_compiler_and_keeps_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer( { }\n")
    with pytest.raises(KernelBuildError, match=r"compiling answer\.cpp failed with exit code 1: (.|\n)*error:"):
        build(source, folder=tmp_path / "built")
    assert not any((tmp_path / "built").iterdir())


@needs_compiler
def test_a_folder_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    with pytest.raises(KernelBuildError, match="cannot keep the kernel answer.cpp in .*a file.*XDG_CACHE_HOME"):
        build(source, folder=blocked)


@needs_compiler
def test_a_damaged_library_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build(source).write_bytes(b"damaged")
    with pytest.raises(KernelBuildError, match="Delete the file to have it built anew"):
        compiler.load(source)


def test_the_named_compiler_is_asked_for_and_missed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(MissingDependencyError, match="looked for no-such-compiler. Install one .* CXX"):
        build(source)


def test_libraries_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "transformer-problems" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "transformer-problems" / "kernels"
