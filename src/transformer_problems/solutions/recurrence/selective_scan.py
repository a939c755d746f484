"""The selective scan: a linear recurrence whose coefficients each token chooses."""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import check_floating
from transformer_problems.kernels.compiler import has_kernel
from transformer_problems.kernels.selective_scan import (
    build_selective_scan,
    selective_scan_backward,
    selective_scan_forward,
)

Backend = Literal["auto", "torch", "cpp"]
_CHUNK_LEN = {"cpp": 64, "torch": 32}  # tokens whose states are held at once, few enough to stay in cache


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t] and y[t] = C[t] h[t] + D u[t], for each channel.

    Costs O(N * C * S) time. Neither pass holds the states of all tokens: the forward pass keeps one state a chunk
    of tokens and the backward pass recomputes a chunk at a time, so memory beyond the inputs' own is
    O(N * C * S / chunk). States and sums are float32, or float64 for float64 inputs. First derivatives only.

    Args:
        u: The input sequence.
        delta: Step size of each token and channel; 0 leaves the state as it is.
        A: Decay rates, below zero for a state that forgets.
        B: How each token's input enters the states.
        C: How each token's output reads them.
        D: Weight of the input in the output. Default none.
        initial_state: The state before the first token. Default zeros.
        backend: "cpp", compiled on first use with the machine's own compiler, for CPU tensors; "torch", anywhere,
            which on a GPU launches a kernel a token; "auto" is what `selective_scan_backend` says.

    Shape:
        u, delta: [B, N, C]; A: [C, S]; B, C: [B, N, S]; D: [C]; initial_state: [B, C, S].
        y: [B, N, C], in u's dtype; final_state: [B, C, S], in the dtype of the sums.

    Raises:
        ArgumentError: If shapes do not fit, or backend "cpp" is asked for tensors that are not on the CPU.
        MissingDependencyError: If backend "cpp" is asked for and there is no compiler.
        KernelBuildError: If backend "cpp" is asked for and its compiler fails.
        ArgumentError: In the backward pass, if a second derivative is prepared (create_graph=True).

    Source:
        Gu and Dao 2023, arXiv:2312.00752, algorithm 2 and section 3.3. Differs from the paper: tokens are taken
        one after the other, with channels in parallel, as suits a CPU, instead of by a parallel scan; B is
        discretised by Euler's rule (as in the authors' code), not by the zero-order hold of equation 4.
    """
    _check_shapes(u, delta, A, B, C, D, initial_state)
    if backend == "auto":
        backend = selective_scan_backend(u)
    if backend not in _CHUNK_LEN:
        raise ArgumentError(f"backend must be 'auto', 'torch' or 'cpp'; got {backend!r}.")
    if backend == "cpp" and u.device.type != "cpu":
        raise ArgumentError(f"backend 'cpp' works on CPU tensors; got {u.device}. Choose backend='torch'.")
    dtype = torch.promote_types(u.dtype, torch.float32)
    if initial_state is None:
        initial_state = A.new_zeros(len(u), *A.shape)
    tensors = (t.to(dtype) for t in (u, delta, A.mT, B, C, initial_state.mT))
    y, final_state = _SelectiveScan.apply(*tensors, backend)  # type: ignore[no-untyped-call]
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), u.to(dtype))
    return y.to(u.dtype), final_state.mT


def selective_scan_backend(u: Tensor) -> Literal["torch", "cpp"]:
    """What backend "auto" means for such a tensor: "cpp" on the CPU where it can be compiled, else "torch".

    Warns once where the C++ kernel would be used but cannot be had.
    """
    return "cpp" if u.device.type == "cpu" and _has_cpp() else "torch"


@cache
def _has_cpp() -> bool:
    return has_kernel("selective_scan", lambda: build_selective_scan())


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    check_floating("u", u)
    check_floating("A", A)
    if u.dim() != 3 or A.dim() != 2:
        raise ArgumentError(f"u must be [B, N, C] and A [C, S]; got {list(u.shape)} and {list(A.shape)}.")
    batch_size, num_tokens, width = u.shape
    states = A.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "A": (A, (width, states)),
        "delta": (delta, (batch_size, num_tokens, width)),
        "B": (B, (batch_size, num_tokens, states)),
        "C": (C, (batch_size, num_tokens, states)),
        "D": (D, (width,)),
        "initial_state": (initial_state, (batch_size, width, states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.device != u.device:
            raise ArgumentError(f"{name} must be on {u.device}, as u; got {tensor.device}. Move one of them.")
        if tensor.shape != shape:
            raise ArgumentError(
                f"{name} must be {list(shape)} for u {list(u.shape)} and {states} states; got {list(tensor.shape)}."
            )


class _SelectiveScan(torch.autograd.Function):
    """The scan with A [S, C] and states [B, S, C]: channels last, so that neighbours in memory go together."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        run = selective_scan_forward if backend == "cpp" else _torch_forward
        u, delta, A, B, C, state = (t.contiguous() for t in (u, delta, A, B, C, state))
        y, states = run(u, delta, A, B, C, state, chunk_len=_CHUNK_LEN[backend])
        ctx.backend = backend
        ctx.save_for_backward(u, delta, A, B, C, states)
        return y, states[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients made here carry no history, and would be constants without a word
            raise ArgumentError("create_graph must be False: selective_scan has first derivatives only.")
        run = selective_scan_backward if ctx.backend == "cpp" else _torch_backward
        grads = run(grad_y.contiguous(), grad_state, *ctx.saved_tensors, chunk_len=_CHUNK_LEN[ctx.backend])
        return *grads, None


def _torch_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, *, chunk_len: int
) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `kernels.selective_scan.selective_scan_forward`."""
    y = torch.empty_like(u)
    num_tokens = u.shape[1]
    states = u.new_empty(-(-num_tokens // chunk_len) + 1, *initial_state.shape)
    states[0] = initial_state
    buffers = _buffers(u, A, chunk_len, 2)
    for k in range(len(states) - 1):
        now = slice(k * chunk_len, min((k + 1) * chunk_len, num_tokens))
        x, step, enter, read, out = (t[:, now].transpose(0, 1) for t in (u, delta, B, C, y))  # time first
        decay, h = (buffer[: now.stop - now.start] for buffer in buffers)
        _scan_chunk(x, step, A, enter, states[k], decay, h)
        states[k + 1] = h[-1]
        out.copy_((read[:, :, None] @ h)[:, :, 0])
    return y, states


def _torch_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    *,
    chunk_len: int,
) -> tuple[Tensor, ...]:
    """The PyTorch twin of `kernels.selective_scan.selective_scan_backward`."""
    grads = [torch.empty_like(t) for t in (u, delta, B, C)]
    grad_A, carry = torch.zeros_like(A), grad_state.clone()
    num_tokens = u.shape[1]
    buffers = _buffers(u, A, chunk_len, 3)
    for k in reversed(range(len(states) - 1)):
        now = slice(k * chunk_len, min((k + 1) * chunk_len, num_tokens))
        x, step, enter, read, grad = (t[:, now].transpose(0, 1) for t in (u, delta, B, C, grad_y))
        grad_x, grad_step, grad_enter, grad_read = (t[:, now].transpose(0, 1) for t in grads)
        decay, h, g = (buffer[: now.stop - now.start] for buffer in buffers)
        _scan_chunk(x, step, A, enter, states[k], decay, h)
        grad_read.copy_((h @ grad[..., None])[..., 0])
        _scan_chunk_back(read, grad, carry, decay, g)  # g: gradient of the loss by each state
        grad_enter.copy_((g @ (step * x)[..., None])[..., 0])
        of_input = (enter[:, :, None] @ g)[:, :, 0]  # by delta * u
        torch.mul(decay[0], g[0], out=carry)
        decay.mul_(g)
        decay[0] *= states[k]
        decay[1:] *= h[:-1]  # decay is now the gradient by the exponent delta * A
        torch.mul(decay, A, out=g)
        grad_x.copy_(of_input * step)
        grad_step.copy_(torch.addcmul(g.sum(2), of_input, x))
        grad_A += decay.mul_(step[:, :, None]).sum((0, 1))
    return grads[0], grads[1], grad_A, grads[2], grads[3], carry


def _buffers(u: Tensor, A: Tensor, chunk_len: int, count: int) -> list[Tensor]:
    """Room for the states of one chunk, [n, B, S, C], reused by all chunks."""
    shape = (min(chunk_len, u.shape[1]), len(u), *A.shape)
    return [u.new_empty(shape) for _ in range(count)]


def _scan_chunk(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, decay: Tensor, h: Tensor) -> None:
    """Fill `decay` with exp(delta A) and `h` with the states of one chunk. u, delta: [n, B, C]; B: [n, B, S]."""
    torch.mul(delta[:, :, None], A, out=decay).exp_()
    torch.mul(B[..., None], (delta * u)[:, :, None], out=h)
    for factor, now in zip(decay.unbind(), h.unbind(), strict=True):
        state = torch.addcmul(now, factor, state, out=now)


def _scan_chunk_back(C: Tensor, grad_y: Tensor, grad_state: Tensor, decay: Tensor, g: Tensor) -> None:
    """Fill `g` with C[t] grad_y[t] + decay[t+1] g[t+1], beginning with `grad_state` behind the last token."""
    torch.mul(C[..., None], grad_y[:, :, None], out=g)
    rows, factors = g.unbind(), decay.unbind()
    rows[-1].add_(grad_state)
    for t in reversed(range(len(rows) - 1)):
        torch.addcmul(rows[t], factors[t + 1], rows[t + 1], out=rows[t])
