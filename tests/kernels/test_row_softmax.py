"""The row softmax is exact in both directions on every back end, and its CUDA source compiles where nvcc is."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from transformer_problems.kernels import row_softmax as kernel
from transformer_problems.kernels.cuda_compiler import CUDA_FLAGS, find_nvcc
from transformer_problems.kernels.row_softmax import row_softmax, softmax_backend
from transformer_problems.lab.meters.kernels import count_kernels

BACKENDS = ["cpp", "torch", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 1), (2, 3, 63, 63), (64, 64), (2, 17, 100), (1, 5, 1009), (7, 3)]  # the last: rows that see nothing


def draw(*shape: int, dtype: torch.dtype = torch.float64, backend: str = "cpp") -> Tensor:
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scores = 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores.to("cuda" if backend == "cuda" else "cpu", dtype)


def exact(scores: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Row by row, over what the row may see."""
    rows, columns = scores.shape[-2:]
    flat = scores.reshape(-1, rows, columns)
    lines = []
    for matrix in flat:
        for i, row in enumerate(matrix):
            seen = max(0, i + 1 + columns - rows) if is_causal else columns
            powers = torch.exp(scale * row[:seen])
            lines.append(torch.cat([powers / powers.sum(), row.new_zeros(columns - seen)]))
    return torch.stack(lines).view(scores.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], is_causal: bool, dtype: torch.dtype, backend: str
) -> None:
    scores = draw(*shape, dtype=dtype, backend=backend).requires_grad_()
    wide = scores.detach().cpu().double().requires_grad_()
    weights, expected = (
        row_softmax(scores, scale=0.35, is_causal=is_causal, backend=backend),
        exact(wide, 0.35, is_causal),
    )
    pull = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    (weights.double() * pull.to(weights.device)).sum().backward()
    (expected * pull).sum().backward()
    step = torch.finfo(dtype).eps  # exponents of up to some 15 carry as many roundings
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=32 * step, atol=step)
    torch.testing.assert_close(scores.grad.cpu().double(), wide.grad, rtol=32 * step, atol=8 * step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_are_their_limits_and_hidden_numbers_are_not_read(backend: str) -> None:
    never = float("-inf")
    scores = draw(3, 3, dtype=torch.float32, backend=backend)
    scores[0], scores[0, 1:] = 1e30, float("nan")
    scores[1] = never
    scores[2] = torch.tensor([1e4, never, 1e4])
    weights = row_softmax(scores, is_causal=True, backend=backend)
    assert weights.tolist()[1:] == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    if backend != "torch":
        assert weights.tolist()[0] == [1.0, 0.0, 0.0]
    scores[2, 0] = float("nan")
    assert row_softmax(scores, backend=backend)[2].isnan().all()


def test_gradients_of_first_and_second_order_are_those_of_the_weights() -> None:
    scores = draw(2, 4, 5).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return row_softmax(x, scale=0.3, is_causal=True, backend="cpp")

    assert torch.autograd.gradcheck(call, (scores,))
    assert torch.autograd.gradgradcheck(call, (scores,))


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    scores = draw(2, 4, 5, dtype=torch.float32)
    operator = torch.ops.transformer_problems.row_softmax.default
    torch.library.opcheck(operator, (scores.clone().requires_grad_(), 0.5, True, "cpp"))
    torch.library.opcheck(operator, (scores.mT, 0.5, False, "cpp"))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads: int) -> None:
    scores = draw(3, 130, 150, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        weights = row_softmax(scores, is_causal=True, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weights, row_softmax(scores, is_causal=True, backend="cpp"))


def test_it_is_one_kernel_where_pytorch_takes_several() -> None:
    scores = draw(2, 40, 40, dtype=torch.float32)
    own, apart = (
        count_kernels(lambda b=b: row_softmax(scores, scale=0.5, is_causal=True, backend=b)) for b in ("cpp", "torch")
    )
    assert own.kernels == 1 and own.bytes_moved == 2 * scores.numel() * 4
    assert apart.kernels > 3 and apart.bytes_moved > own.bytes_moved


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_of_nothing_it_gives_nothing(shape: tuple[int, ...]) -> None:
    for backend in ("cpp", "torch"):
        assert row_softmax(torch.zeros(shape), is_causal=True, backend=backend).shape == shape


def test_without_a_compiler_pytorch_answers_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise MissingDependencyError("no C++ compiler found")

    monkeypatch.setattr(kernel, "load", refuse)
    kernel._is_built.cache_clear()
    try:
        with pytest.warns(UserWarning, match="row_softmax uses its slower PyTorch path: no C"):
            assert softmax_backend(torch.zeros(2, 2)) == "torch"
    finally:
        kernel._is_built.cache_clear()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_inputs_with_gaps_or_repeats_in_memory_are_answered_as_packed_ones(backend: str) -> None:
    packed = draw(2, 5, 6)
    for scores in (
        packed.mT.contiguous().mT,
        torch.stack([packed, -packed], dim=-1).flatten(-2)[..., ::2],
        packed[:1, :1].expand(2, 5, 6),
        packed[..., :1].expand(2, 5, 6),
    ):
        x, copied = (t.detach().requires_grad_() for t in (scores, scores.contiguous()))
        results = []
        for given in (x, copied):
            y = row_softmax(given, is_causal=True, backend=backend)
            results.append((y, torch.autograd.grad(y[..., 0].sum(), given)[0]))  # a gradient of stride 0
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_it_cannot_take_is_refused() -> None:
    scores = draw(3, 4, dtype=torch.float32)
    assert softmax_backend(scores) == "cpp" and softmax_backend(scores.half()) == "torch"
    for call, message in (
        (lambda: row_softmax(scores.int()), "scores must be floating point; got torch.int32"),
        (lambda: row_softmax(scores[0]), r"scores must be a float tensor \[..., N, M\]; got torch.float32 \[4\]"),
        (lambda: row_softmax([[1.0]]), r"scores must be a floating-point tensor; got \[\[1.0\]\]"),
        (lambda: row_softmax(scores.numpy()), "scores must be a floating-point tensor; got an object of type ndarray"),
        (lambda: row_softmax(scores, is_causal="no"), "is_causal must be True or False; got 'no'"),
        (lambda: row_softmax(scores, scale=0.0), "scale must be positive; got 0.0"),
        (lambda: row_softmax(scores, scale=float("inf")), "scale must be a finite number; got inf"),
        (lambda: row_softmax(scores.half(), backend="cpp"), "'cpp' takes float32 and float64 on cpu; got torch.float1"),
        (lambda: row_softmax(scores, backend="cuda"), "'cuda' takes float32 and float64 on cuda; got torch.float32 on"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(UnknownNameError, match="unknown back end of row_softmax 'triton'"):
        row_softmax(scores, backend="triton")


def test_without_nvcc_the_error_says_where_it_was_sought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=f"looked for nvcc on the path and in {tmp_path}/bin"):
        find_nvcc()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_source_compiles(architecture: str, tmp_path: Path) -> None:
    built = tmp_path / "row_softmax.o"
    command = [find_nvcc(), *CUDA_FLAGS, f"-arch={architecture}", "-c", str(kernel._CUDA_SOURCE), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    symbols = built.read_bytes()
    for name in ("forward_float32", "forward_float64", "backward_float32", "backward_float64"):
        assert f"row_softmax_{name}".encode() in symbols
