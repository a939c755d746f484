"""The delta rule: a linear-attention memory that overwrites what it held under a key instead of piling up."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.fit import check_same_batch, check_start
from transformer_problems.core.heads import check_input, merge_heads, split_heads
from transformer_problems.kernels.linear import Linear

# Forms of `delta_rule` that give the same numbers: one step after another, or whole chunks by matrix products.
Form = Literal["chunked", "recurrent"]

# A fresh gate keeps sigmoid(4) = 98% of the memory per token: half is left after 38 tokens.
_GATE_BIAS = 4.0


@dataclass(frozen=True, slots=True)
class DeltaState:
    """The memory of every head and the projections that the short convolution still needs.

    Args:
        memory: [B, H, D, D], float32 or wider.
        recent: Queries, keys and values before convolution, of the last conv_size - 1 tokens, [B, conv_size - 1, 3C].
        num_seen: Tokens seen since the beginning.
    """

    memory: Tensor
    recent: Tensor
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"memory": self.memory, "recent": self.recent}

    def detach(self) -> Self:
        return type(self)(self.memory.detach(), self.recent.detach(), self.num_seen)


class DeltaRule(nn.Module):
    """DeltaNet's token mixer: a D x D memory per head, corrected by every token, of constant size.

    Queries, keys and values pass a short causal convolution and SiLU; queries and keys are scaled to unit length;
    `delta_rule` mixes; heads are normalised by root mean square before the output projection. Whole sequences take
    the chunked form, O(N * D) per channel; a streamed token costs the same however long its past. Positions are
    ignored: order enters through the recurrence and the convolution alone. A masked token leaves the memory
    untouched and counts as zero in the convolution.

    Args:
        embed_dim: C, the model width.
        num_heads: H; C must be a multiple of it.
        chunk_size: Tokens solved together in the chunked form.
        gated: A decay in (0, 1) per token and head precedes each write (the gated delta rule).
        conv_size: Tokens that the convolution sees, the own included; 1 leaves it a scale per channel.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: ignored; output: [B, N, C].

    Raises:
        ArgumentError: If the heads do not divide the width, or a size is not positive.

    Source:
        Yang et al. 2024, arXiv:2406.06484, sections 3 and 3.3; gate: Yang et al. 2024, arXiv:2412.06464.
        Differs from the papers: keys have the width of the values, and no output gate is used.
    """

    is_causal = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        gated: bool = False,
        conv_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_positive_int(chunk_size=chunk_size, conv_size=conv_size)
        self.embed_dim = embed_dim
        self.num_heads, self.chunk_size, self.gated, self.conv_size = num_heads, chunk_size, gated, conv_size
        head_dim = embed_dim // num_heads
        self.qkv_proj = Linear(embed_dim, 3 * embed_dim, bias=False, device=device, dtype=dtype)
        self.conv = nn.Conv1d(
            3 * embed_dim, 3 * embed_dim, conv_size, groups=3 * embed_dim, bias=False, device=device, dtype=dtype
        )
        self.beta_proj = Linear(embed_dim, num_heads, device=device, dtype=dtype)
        self.gate_proj = Linear(embed_dim, num_heads, device=device, dtype=dtype) if gated else None
        if self.gate_proj is not None:
            nn.init.constant_(self.gate_proj.bias, _GATE_BIAS)
        self.norm = nn.RMSNorm(head_dim, eps=1e-5, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        return self._mix(x, self.initial_state(len(x)), key_mask, "chunked")[0]

    def initial_state(self, batch_size: int) -> DeltaState:
        """The state before the first token: an empty memory."""
        check_start(batch_size)
        weight = self.qkv_proj.weight
        width, head_dim = weight.shape[0], self.norm.weight.shape[0]
        wide = torch.promote_types(weight.dtype, torch.float32)
        return DeltaState(
            weight.new_zeros(batch_size, self.num_heads, head_dim, head_dim, dtype=wide),
            weight.new_zeros(batch_size, self.conv_size - 1, width),
        )

    def stream(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.memory))
        return self._mix(x, state, None, "recurrent" if x.shape[1] == 1 else "chunked")

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, chunk_size={self.chunk_size}, gated={self.gated}, conv_size={self.conv_size}"
        )

    def _mix(self, x: Tensor, state: DeltaState, key_mask: Tensor | None, form: Form) -> tuple[Tensor, DeltaState]:
        if x.shape[1] == 0:
            return x, state
        projected = self.qkv_proj(x)
        beta = self.beta_proj(x).sigmoid()
        gate = None if self.gate_proj is None else F.logsigmoid(self.gate_proj(x))
        if key_mask is not None:
            ignored = ~key_mask[..., None]
            projected, beta = projected.masked_fill(ignored, 0.0), beta.masked_fill(ignored, 0.0)
            gate = None if gate is None else gate.masked_fill(ignored, 0.0)
        context = torch.cat([state.recent, projected], dim=1)
        mixed = F.silu(self.conv(context.mT).mT)
        q, k, v = (split_heads(y, self.num_heads) for y in mixed.chunk(3, dim=-1))
        y, memory = delta_rule(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            beta.mT,
            gate=None if gate is None else gate.mT,
            initial_state=state.memory,
            chunk_size=self.chunk_size,
            form=form,
        )
        out: Tensor = self.out_proj(merge_heads(self.norm(y)))
        return out, DeltaState(memory, context[:, x.shape[1] :].clone(), state.num_seen + x.shape[1])


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    form: Form = "chunked",
) -> tuple[Tensor, Tensor]:
    """y_t = S_t q_t with S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    Each step reads what the memory S holds under key k_t and moves it towards v_t by the fraction beta_t. The
    recurrent form takes N dependent steps of O(D * Dv). The chunked form solves one unit-triangular system per
    chunk (the UT transform of the WY form), which turns the steps of a chunk into matrix products; what remains
    sequential is one D x D by D x Dv product a chunk. Sums are kept in float32 or wider.

    Args:
        beta: Writing strength, usually in (0, 1).
        gate: Log of the decay before each write, finite and at most 0 (the gated delta rule). Default no decay.
        initial_state: Memory to start from. Default all zeros.
        chunk_size: Tokens solved together, in the chunked form.
        form: "chunked" or "recurrent".

    Shape:
        q, k: [..., N, D], keys of unit length; v: [..., N, Dv]; beta, gate: [..., N];
        y: as v; states: [..., D, Dv], the transpose of the formula's S, float32 or wider.

    Raises:
        ArgumentError: If chunk_size is not positive or the form is unknown.

    Source:
        Yang et al. 2024, arXiv:2406.06484, sections 2.2 and 3; gate: Yang et al. 2024, arXiv:2412.06464.
        Differs from the papers: a chunk's effect on the memory, S -> A S + B, is formed for all chunks at once,
        so that the sequential part is a single product.
    """
    require_positive_int(chunk_size=chunk_size)
    if form not in ("chunked", "recurrent"):
        raise ArgumentError(f"form must be 'chunked' or 'recurrent'; got {form!r}.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1], dtype=dtype)
    state = state if initial_state is None else initial_state.to(dtype).expand_as(state)
    out_dtype = v.dtype
    q, k, v, beta = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
    gate = None if gate is None else gate.to(dtype)
    if form == "recurrent":
        y, state = _recurrent(q, k, v, beta, gate, state)
    else:
        y, state = _chunked(q, k, v, beta, gate, state, min(chunk_size, q.shape[-2]))
    return y.to(out_dtype), state


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[-2]):
        now = slice(t, t + 1)
        if gate is not None:
            state = state * gate[..., t, None, None].exp()
        error = v[..., now, :] - k[..., now, :] @ state  # [..., 1, Dv]
        state = state + k[..., now, :].mT @ (beta[..., now, None] * error)
        outputs.append(q[..., now, :] @ state)
    return torch.cat(outputs, dim=-2), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The tokens that fill up the last chunk write nothing: beta 0, gate 0."""
    lead, num_tokens = q.shape[:-2], q.shape[-2]
    missing = -num_tokens % size

    def chunks(x: Tensor) -> Tensor:
        """[..., N, D] as [X, T, size, D], with all leading dimensions in X."""
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(lead.numel(), x.shape[-2] // size, size, x.shape[-1])

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta.unsqueeze(-1))
    k_beta = k * beta
    overlap, reads = k_beta @ k.mT, q @ k.mT  # [X, T, size, size]
    kept = torch.eye(k.shape[-1], dtype=q.dtype, device=q.device)
    if gate is None:
        reads, k_late = reads.tril(), k
    else:
        log_decay = chunks(gate.unsqueeze(-1)).cumsum(-2)  # since the chunk's first token
        later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = (log_decay - log_decay.mT).masked_fill(later, float("-inf")).exp()
        decay, last = log_decay.exp(), log_decay[..., -1:, :]
        overlap, reads, kept = overlap * between, reads * between, kept * last.exp()
        q, k_beta, k_late = q * decay, k_beta * decay, k * (last - log_decay).exp()
    # A chunk writes U - W S, where S is the memory before it: U what it brings, W S what it found there already.
    writes = torch.cat([v * beta, k_beta], dim=-1)
    solved = torch.linalg.solve_triangular(overlap, writes, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    states = _scan(kept - k_late.mT @ w, k_late.mT @ u, state.reshape(-1, *state.shape[-2:]))
    before = torch.stack(states[:-1], dim=1)  # [X, T, D, Dv]
    y = q @ before + reads @ (u - w @ before)
    return y.flatten(1, 2)[:, :num_tokens].reshape(*lead, num_tokens, v.shape[-1]), states[-1].reshape(state.shape)


def _scan(kept: Tensor, added: Tensor, state: Tensor) -> list[Tensor]:
    """The memory before each chunk and after the last. kept: [X, T, D, D]; added, and the result: [X, T, D, Dv]."""
    states = [state]
    for a, b in zip(kept.unbind(1), added.unbind(1), strict=True):
        states.append(torch.baddbmm(b, a, states[-1]))
    return states
