"""The selective scan against the naive loop, on both of its backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, MissingDependencyError
from transformer_problems.kernels import compiler
from transformer_problems.solutions.recurrence import selective_scan as module
from transformer_problems.solutions.recurrence.selective_scan import Backend, selective_scan, selective_scan_backend

try:
    compiler.find_compiler()
    HAS_COMPILER = True
except MissingDependencyError:
    HAS_COMPILER = False
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
BACKENDS = ["torch", pytest.param("cpp", marks=needs_compiler)]
NAMES = ("u", "delta", "A", "B", "C", "D", "initial_state")
TOLERANCE = {"atol": 1e-11, "rtol": 1e-11}  # float64 sums of some hundred terms

pytestmark = pytest.mark.filterwarnings("ignore:selective_scan uses its slower PyTorch path")


def draw(
    length: int, width: int = 5, states: int = 3, *, batch_size: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs with steps above zero and decaying states, of every length the same seed."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(batch_size, length, width),
        normal(batch_size, length, width).exp() / 4,
        -normal(width, states).exp(),
        normal(batch_size, length, states),
        normal(batch_size, length, states),
        normal(width),
        normal(batch_size, width, states),
    )
    return {name: t.to(dtype).requires_grad_() for name, t in zip(NAMES, tensors, strict=True)}


def naive(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    h, outputs = initial_state, []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, 1), h


def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """A number that every output and every final state changes in its own way."""
    return sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 8, 19])  # a part of a vector, a whole one, and two with a rest
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_naive_loop_in_outputs_and_gradients(length: int, width: int, backend: Backend) -> None:
    inputs = draw(length, width)
    ours, theirs = selective_scan(**inputs, backend=backend), naive(**inputs)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    gradients = [torch.autograd.grad(loss(outputs), list(inputs.values())) for outputs in (ours, theirs)]
    for name, mine, other in zip(NAMES, *gradients, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_near_float64(backend: Backend) -> None:
    inputs, exact = draw(101, 37, 16, dtype=torch.float32), draw(101, 37, 16)
    outputs, expected = selective_scan(**inputs, backend=backend), naive(**exact)
    ours = [*outputs, *torch.autograd.grad(loss(outputs), list(inputs.values()))]
    theirs = [*expected, *torch.autograd.grad(loss(expected), list(exact.values()))]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        # float32 rounds at 6e-8; sums of up to 101 * 37 terms multiply it by less than a hundred
        assert (mine - other).abs().max() < 5e-6 * other.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: Backend) -> None:
    inputs = draw(5, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(*t[:6], initial_state=t[6], backend=backend), [*inputs.values()]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: Backend) -> None:
    inputs = draw(3)
    y, _ = selective_scan(**inputs, backend=backend)
    with pytest.raises(ArgumentError, match="create_graph must be False"):
        torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4))
def test_pieces_continued_from_the_state_give_the_whole(backend: Backend, sizes: list[int]) -> None:
    inputs = draw(sum(sizes))
    whole, last = selective_scan(**inputs, backend=backend)
    state, outputs, start = inputs["initial_state"], [], 0
    for size in sizes:
        piece = {name: inputs[name][:, start : start + size] for name in ("u", "delta", "B", "C")}
        y, state = selective_scan(**piece, A=inputs["A"], D=inputs["D"], initial_state=state, backend=backend)
        outputs.append(y)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **TOLERANCE)
    torch.testing.assert_close(state, last, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_a_state_in_every_chunk_is_kept_for_the_backward_pass(backend: Backend) -> None:
    length, width, states = 1024, 16, 16
    inputs = draw(length, width, states, batch_size=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(**{k: v for k, v in inputs.items() if k != "D"}, backend=backend)
    inputs_size = sum(inputs[name].numel() for name in ("u", "delta", "A", "B", "C"))
    assert sum(kept) - inputs_size <= length * width * states // 32 + width * states


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_input_weight_and_state(backend: Backend) -> None:
    inputs = draw(9)
    short = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    zeros = {"D": torch.zeros_like(inputs["D"]), "initial_state": torch.zeros_like(inputs["initial_state"])}
    torch.testing.assert_close(selective_scan(**short, backend=backend), naive(**short, **zeros), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_zero_passes_the_state_unchanged(dtype: torch.dtype, backend: Backend) -> None:
    inputs = draw(70, dtype=dtype) | {"delta": torch.zeros(2, 70, 5, dtype=dtype)}
    _, state = selective_scan(**inputs, backend=backend)
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_forget_all_or_overflow_without_nan(backend: Backend) -> None:
    inputs = draw(2, dtype=torch.float32) | {"u": torch.zeros(2, 2, 5), "delta": torch.full((2, 2, 5), 1e4)}
    with torch.no_grad():
        _, forgotten = selective_scan(**inputs | {"A": -torch.ones(5, 3)}, backend=backend)
        _, exploded = selective_scan(**inputs | {"A": torch.ones(5, 3)}, backend=backend)
    assert (forgotten.abs() < 1e-37).all()  # e^-87, below which the C++ kernel's float32 exponential is constant
    assert exploded.isinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_summed_in_float32(backend: Backend) -> None:
    exact = {name: t.detach().bfloat16() for name, t in draw(64).items() if name != "initial_state"}
    y, state = selective_scan(**exact, backend=backend)
    expected, _ = selective_scan(**{name: t.double() for name, t in exact.items()}, backend=backend)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # the same numbers in both, so only the output is rounded to bfloat16's 8 bits: half a step of 2^-7
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


@needs_compiler
def test_threads_share_the_channels() -> None:
    inputs = draw(256, 130, 16, batch_size=2)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            outputs = selective_scan(**inputs, backend="cpp")
            results.append((*outputs, *torch.autograd.grad(loss(outputs), list(inputs.values()))))
        finally:
            torch.set_num_threads(threads)
    torch.testing.assert_close(*results, **TOLERANCE)


def test_auto_takes_the_torch_path_and_says_so_once_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.load.cache_clear()
    module._has_cpp.cache_clear()
    inputs = draw(3)
    try:
        with pytest.warns(UserWarning, match="slower PyTorch path: no C.. compiler found; looked for no-such") as told:
            y, _ = selective_scan(**inputs)
            assert selective_scan_backend(inputs["u"]) == "torch"
            selective_scan(**inputs)
        assert len(told) == 1 and told[0].filename == __file__
        torch.testing.assert_close(y, naive(**inputs)[0], **TOLERANCE)
        with pytest.raises(MissingDependencyError, match="environment variable CXX"):
            selective_scan(**inputs, backend="cpp")
    finally:
        module._has_cpp.cache_clear()


@needs_compiler
def test_auto_takes_the_compiled_path_on_the_cpu() -> None:
    assert selective_scan_backend(torch.zeros(1)) == "cpp"
    assert selective_scan_backend(torch.zeros(1, device="meta")) == "torch"


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_with_gaps_or_repeats_in_memory_give_what_copies_give(backend: Backend) -> None:
    inputs = {name: t.detach() for name, t in draw(7).items()}
    ways = (
        {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in inputs.items()},
        {name: torch.stack([t, -t], dim=-1).flatten(-2)[..., ::2] for name, t in inputs.items()},
        {name: t[:1].expand_as(t) for name, t in inputs.items()},
        {name: t[..., :1].expand_as(t) for name, t in inputs.items()},
    )
    for way in ways:
        copied = {name: t.contiguous() for name, t in way.items()}
        for one, other in zip(*(selective_scan(**x, backend=backend) for x in (way, copied)), strict=True):
            assert torch.equal(one, other)


def test_misfits_are_named() -> None:
    inputs = draw(3)
    with pytest.raises(ArgumentError, match=r"B must be \[2, 3, 3\] for u \[2, 3, 5\] and 3 states; got \[2, 2, 3\]"):
        selective_scan(**inputs | {"B": inputs["B"][:, :2]})
    for name, wrong, message in (
        ("u", inputs["u"].tolist(), "u must be a floating-point tensor; got an object of type list"),
        ("u", inputs["u"].long(), r"u must be floating point; got torch.int64 \[2, 3, 5\]"),
        ("delta", inputs["delta"].detach().numpy(), "delta must be a floating-point tensor; got an object of type nda"),
        ("B", inputs["B"].to(torch.complex64), r"B must be floating point; got torch.complex64 \[2, 3, 3\]"),
        ("A", inputs["A"].to("meta"), "A must be on cpu, as u; got meta. Move one of them"),
        ("initial_state", [1.0], r"initial_state must be a floating-point tensor; got \[1.0\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            selective_scan(**inputs | {name: wrong})
    with pytest.raises(ArgumentError, match=r"u must be \[B, N, C\]"):
        selective_scan(**inputs | {"u": inputs["u"][0]})
    with pytest.raises(ArgumentError, match="backend must be 'auto', 'torch' or 'cpp'; got 'cuda'"):
        selective_scan(**inputs, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="'cpp' works on CPU tensors; got meta"):
        selective_scan(**{name: t.to("meta") for name, t in inputs.items()}, backend="cpp")
