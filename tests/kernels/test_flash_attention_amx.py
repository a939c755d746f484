"""The AMX kernel, run to the byte as a processor with AMX runs it: `amx_cases.py`, in a process with emulated tiles."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, DeviceError, KernelBuildError, MissingDependencyError
from transformer_problems.kernels import flash_attention_amx as kernel
from transformer_problems.kernels.compiler import FLAGS, build, find_compiler
from transformer_problems.kernels.flash_attention_amx import amx_refusal, flash_attention_amx, has_amx

HERE = Path(__file__).parent
_CPU = Path("/proc/cpuinfo")


def why_not() -> str | None:
    """Why the kernel's own code cannot be run here, even with its tiles emulated."""
    if platform.machine() != "x86_64" or not _CPU.exists():
        return "needs Linux on x86-64"
    flags = set(_CPU.read_text().split())
    missing = {"avx512f", "avx512bw", "avx512vl"} - flags
    if missing:
        return f"needs a processor with {', '.join(sorted(missing))}"
    try:
        find_compiler()
    except MissingDependencyError:
        return "needs a C++ compiler"
    return None


@pytest.mark.parametrize("conversions", [False, True], ids=["rounding by integers", "rounding by instruction"])
def test_cases(conversions: bool) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    environment = dict(os.environ, OMP_NUM_THREADS="2")
    environment.pop("TILES_REFUSED", None)
    if not kernel.processor_has_amx():
        flags = (*FLAGS, "-O2", "-ffp-contract=off")
        environment |= {"EMULATED_TILES": "1", "LD_PRELOAD": str(build(HERE / "amx_emulation.cpp", flags=flags))}
    if conversions:
        environment["BFLOAT16_CONVERSIONS"] = "1"
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "amx_cases.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_amx_it_is_refused_and_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "processor_has_amx", lambda: False)
    monkeypatch.setattr(kernel, "load", lambda *args, **kwargs: pytest.fail("built"))
    kernel._library.cache_clear(), has_amx.cache_clear()
    q, k, v = torch.zeros(3, 1, 1, 4, 16, dtype=torch.bfloat16).unbind()
    with pytest.raises(
        DeviceError, match=r"^flash_attention_amx needs an x86-64 processor .* amx_tile and amx_bf16; .*"
    ):
        flash_attention_amx(q, k, v)
    assert not has_amx()
    has_amx.cache_clear()


def test_a_kernel_that_cannot_be_built_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise KernelBuildError("no luck")

    monkeypatch.setattr(kernel, "processor_has_amx", lambda: True)
    monkeypatch.setattr(kernel, "load", fails)
    kernel._library.cache_clear(), has_amx.cache_clear()
    with pytest.warns(UserWarning, match="attention in bfloat16 uses its slower PyTorch path: no luck") as told:
        assert not has_amx() and not has_amx()
    assert len(told) == 1
    kernel._library.cache_clear(), has_amx.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512bw avx512vl amx_tile amx_bf16 amx_int8", True),
        ("fpu avx512f avx512bw avx512vl amx_tile amx_int8", False),
        ("fpu avx2", False),
    ],
)
def test_the_processor_is_asked(flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(kernel, "_CPU_INFO", listed)
    assert kernel.processor_has_amx.__wrapped__() is expected
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not kernel.processor_has_amx.__wrapped__()


def test_wrong_arguments_are_refused() -> None:
    q = torch.zeros(1, 4, 5, 16, dtype=torch.bfloat16)
    refused = [
        ((q.float(), q, q), "q, k and v must be bfloat16 for AMX; got torch.float32"),
        ((q[0], q[0], q[0]), r"q must be \[B, H, N, D\], k and v \[B, G, M, D\] for AMX; got \[4, 5, 16\]"),
        ((q, q, q[..., :8]), "k and v .* for AMX"),
        ((q, q[..., None], q[..., None]), r"k and v \[B, G, M, D\] for AMX; .* \[1, 4, 5, 16, 1\]"),
        (
            (torch.zeros(1, 1, 2, 257).bfloat16(),) * 3,
            "head_dim must be from 1 to 256 for AMX; got 257. Use more heads",
        ),
        ((q.clone().requires_grad_(), q, q), r"must need no gradient for AMX.*torch\.no_grad\(\)"),
        ((q.to("meta"),) * 3, "must be on the CPU for AMX; got meta"),
        ((q, q[:, :3], q[:, :3]), "num_heads must be a multiple of num_kv_heads; got 4 and 3"),
    ]
    for inputs, message in refused:
        with pytest.raises(ArgumentError, match=message):
            flash_attention_amx(*inputs)
    with torch.no_grad():
        assert amx_refusal(q.clone().requires_grad_(), q, q) is None
    for mask in (torch.ones(1, 5), torch.ones(1, 6, dtype=torch.bool), [[True] * 5]):
        with pytest.raises(ArgumentError, match=r"key_mask must be bool, True may attend, \[1, 5\] on the CPU; got"):
            flash_attention_amx(q, q, q, key_mask=mask)  # type: ignore[arg-type]
