"""Mamba: a selective state space layer, recurrent in use and parallel over channels in training."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.fit import check_same_batch, check_start
from transformer_problems.core.heads import check_input
from transformer_problems.kernels.linear import Linear
from transformer_problems.solutions.recurrence.selective_scan import Backend, selective_scan

_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 1e-1  # of the untrained layer, section 3.6 of the paper


@dataclass(frozen=True, slots=True)
class MambaState:
    """All that a Mamba layer keeps of its past; of constant size.

    Args:
        conv: The last conv_width - 1 inputs of the convolution, [B, conv_width - 1, E].
        ssm: The state space's state, [B, E, S].
        num_seen: Tokens seen since the beginning.
    """

    conv: Tensor
    ssm: Tensor
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"conv": self.conv, "ssm": self.ssm}

    def detach(self) -> Self:
        return type(self)(self.conv.detach(), self.ssm.detach(), self.num_seen)


class Mamba(nn.Module):
    """A state space layer whose step size, input and output matrices depend on the token.

    A short causal convolution, then for each of E = expansion * C channels a recurrence of S states (see
    `selective_scan`), gated by silu of a second projection. Costs O(N * E * (C + S)) for a sequence and the same
    for each token however long the past, which is held in E * (S + conv_width - 1) numbers. What it recalls must
    fit into them: unlike attention it cannot look a token up again. Order is inherent; `positions` are ignored.

    A token masked by `key_mask` influences no other token: its input is zero, so the convolution sees a zero in
    its place, and its step is zero, so the state passes it unchanged. Its own output is zero. A sequence padded
    in front so gives what it gives alone.

    Parameter names and shapes are those of the authors' checkpoints, and so of transformers' MambaMixer.

    Args:
        embed_dim: C, the model width.
        state_dim: S, states a channel.
        expansion: E / C.
        conv_width: Tokens that the convolution sees, a token's own among them.
        dt_rank: Rank of the projection to step sizes. Default C / 16, rounded up.
        backend: Of the scan: see `selective_scan`.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: ignored; output: [B, N, C].

    Raises:
        ArgumentError: If a size is not positive.

    Source:
        Gu and Dao 2023, arXiv:2312.00752, sections 3.2 to 3.4 and 3.6 (initial values). Differs from the paper:
        B is discretised by Euler's rule, as in the authors' code; no norm or skip is inside.
    """

    is_causal = True

    def __init__(
        self,
        embed_dim: int,
        *,
        state_dim: int = 16,
        expansion: int = 2,
        conv_width: int = 4,
        dt_rank: int | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(embed_dim / 16) if dt_rank is None else dt_rank
        require_positive_int(
            embed_dim=embed_dim, state_dim=state_dim, expansion=expansion, conv_width=conv_width, dt_rank=dt_rank
        )
        inner_dim = expansion * embed_dim
        self.embed_dim = embed_dim
        self.state_dim, self.conv_width, self.dt_rank, self.backend = state_dim, conv_width, dt_rank, backend
        self.in_proj = Linear(embed_dim, 2 * inner_dim, bias=False, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(inner_dim, inner_dim, conv_width, groups=inner_dim, device=device, dtype=dtype)
        self.x_proj = Linear(inner_dim, dt_rank + 2 * state_dim, bias=False, device=device, dtype=dtype)
        self.dt_proj = Linear(dt_rank, inner_dim, device=device, dtype=dtype)
        self.A_log = nn.Parameter(torch.empty(inner_dim, state_dim, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(inner_dim, device=device, dtype=dtype))
        self.out_proj = Linear(inner_dim, embed_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decay rates 1 to S in each channel; untrained steps spread log-uniformly over 0.001 to 0.1."""
        with torch.no_grad():
            rates = torch.arange(1, self.state_dim + 1, device=self.A_log.device)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
            self.D.fill_(1.0)
            bound = self.dt_rank**-0.5
            self.dt_proj.weight.uniform_(-bound, bound)
            low, high = math.log(_SMALLEST_STEP), math.log(_LARGEST_STEP)
            step = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(low, high).exp()
            self.dt_proj.bias.copy_(step.expm1().log())  # the inverse of softplus

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        y, _ = self._run(x, self.initial_state(len(x)), key_mask)
        return y

    def initial_state(self, batch_size: int) -> MambaState:
        """The state before the first token: zeros."""
        check_start(batch_size)
        conv = self.conv1d.weight.new_zeros(batch_size, self.conv_width - 1, self.D.shape[0])
        ssm = self.A_log.new_zeros(batch_size, *self.A_log.shape, dtype=_sum_dtype(self.A_log))
        return MambaState(conv, ssm)

    def stream(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.ssm))
        return self._run(x, state, None)

    def extra_repr(self) -> str:
        return f"state_dim={self.state_dim}, conv_width={self.conv_width}, dt_rank={self.dt_rank}"

    def _run(self, x: Tensor, state: MambaState, key_mask: Tensor | None) -> tuple[Tensor, MambaState]:
        masked = None if key_mask is None else ~key_mask[..., None]
        if masked is not None:
            x = x.masked_fill(masked, 0.0)
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # [B, N, E]
        window = torch.cat([state.conv, u], dim=1)
        u = nn.functional.silu(self._convolve(window))
        low_rank, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta = nn.functional.softplus(self.dt_proj(low_rank))
        if masked is not None:
            delta = delta.masked_fill(masked, 0.0)
        A = -self.A_log.to(_sum_dtype(self.A_log)).exp()
        y, ssm = selective_scan(u, delta, A, B, C, self.D, initial_state=state.ssm, backend=self.backend)
        tail = window[:, x.shape[1] :].clone()  # a copy, or the state would hold the whole chunk
        return self.out_proj(y * nn.functional.silu(gate)), MambaState(tail, ssm, state.num_seen + x.shape[1])

    def _convolve(self, window: Tensor) -> Tensor:
        """self.conv1d with channels last, where a sum of shifts is several times faster on a CPU.

        Shape:
            window: [B, conv_width - 1 + N, E]; output: [B, N, E].
        """
        assert self.conv1d.bias is not None
        y: Tensor = self.conv1d.bias
        num_tokens = window.shape[1] - self.conv_width + 1
        for k in range(self.conv_width):
            y = torch.addcmul(y, window[:, k : k + num_tokens], self.conv1d.weight[:, 0, k])
        return y


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
