"""Gated attention: a sigmoid gate on what attention brings, so that a token can refuse it."""

from typing import Any, Literal

from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError


class GatedAttention(nn.Module):
    """out_proj(sigmoid(W x) * heads(x)): the layer's input decides how much of each head's output passes.

    Softmax weights sum to one, so attention must bring something even where nothing is relevant; the gate can close.
    Costs C * C more parameters by element, C * H by head, and no change to the cache.

    Args:
        attention: The layer whose heads are gated, SelfAttention or any mixer that ends in an `out_proj`. Its output
            projection moves into this module, behind the gate: use it only through this module from then on.
        granularity: One gate for each "element" of what out_proj reads, or one for each "head" of it.
        bias: The gate's projection carries a bias term.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: [N] or [B, N]; output: [B, N, C].

    Raises:
        ArgumentError: If `attention` has no linear out_proj to put a gate before, granularity is neither, or it is
            "head" and `attention` has no num_heads.

    Source:
        Qiu et al. 2025, arXiv:2505.06708, section 2.2, position G1 (after the attention product).
    """

    def __init__(
        self, attention: nn.Module, *, granularity: Literal["element", "head"] = "element", bias: bool = False
    ) -> None:
        super().__init__()
        out_proj = getattr(attention, "out_proj", None)
        if not isinstance(out_proj, nn.Linear):
            raise ArgumentError(
                f"attention must end in a linear out_proj; {type(attention).__name__} has {type(out_proj).__name__}. "
                "Pass a SelfAttention that is not gated yet."
            )
        if granularity not in ("element", "head"):
            raise ArgumentError(f"granularity must be 'element' or 'head'; got {granularity!r}.")
        self.num_heads: int | None = getattr(attention, "num_heads", None)
        num_gates = self.num_heads if granularity == "head" else out_proj.in_features
        if num_gates is None:
            raise ArgumentError(
                f"granularity 'head' needs an attention with num_heads; {type(attention).__name__} has none. "
                "Choose granularity='element'."
            )
        self.attention, self.out_proj = attention, out_proj
        attention.out_proj = nn.Identity()
        self.is_causal: bool = attention.is_causal  # type: ignore[assignment]
        self.gradient_segment: int | None = getattr(attention, "gradient_segment", None)
        self.chooses_keys: bool = getattr(attention, "chooses_keys", False)
        self.embed_dim, self.granularity = out_proj.out_features, granularity
        weight = out_proj.weight
        self.gate_proj = nn.Linear(
            out_proj.out_features, num_gates, bias=bias, device=weight.device, dtype=weight.dtype
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return self._gated(x, self.attention(x, key_mask=key_mask, positions=positions))

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first token: that of the attention inside."""
        return self.attention.initial_state(batch_size)  # type: ignore[operator]

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        y, state = self.attention.stream(x, state)  # type: ignore[operator]
        return self._gated(x, y), state

    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}"

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        """y: [B, N, H*D], the heads side by side."""
        gate = self.gate_proj(x).sigmoid()  # [B, N, H*D] or [B, N, H]
        if self.granularity == "head":
            gate = gate.repeat_interleave(y.shape[-1] // gate.shape[-1], dim=-1)
        out: Tensor = self.out_proj(gate * y)
        return out
