"""The Conformer's convolution module: a gated depthwise convolution along the sequence."""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_flag, require_positive_int
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.fit import check_same_batch, check_start
from transformer_problems.core.heads import check_input
from transformer_problems.core.slots import State
from transformer_problems.kernels.linear import Linear

ConvolutionNorm = Literal["batch", "layer"]


@dataclass(frozen=True, slots=True)
class ConvolutionState:
    """What a causal convolution keeps of its past; of constant size.

    Args:
        frames: The last kernel_size - 1 inputs of the depthwise convolution, [B, kernel_size - 1, C].
        num_seen: Frames seen since the beginning.
    """

    frames: Tensor
    num_seen: int = 0

    @property
    def num_bytes(self) -> int:
        return self.frames.numel() * self.frames.element_size()

    def tensors(self) -> dict[str, Tensor]:
        return {"frames": self.frames}

    def detach(self) -> Self:
        return type(self)(self.frames.detach(), self.num_seen)


@dataclass(frozen=True, slots=True)
class MixerAndConvolutionState:
    """The states of a mixer and of the convolution that stands beside it."""

    mixer: State
    convolution: ConvolutionState

    @property
    def num_bytes(self) -> int:
        return self.mixer.num_bytes + self.convolution.num_bytes

    def tensors(self) -> dict[str, Tensor]:
        parts = {"mixer": self.mixer, "convolution": self.convolution}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.tensors().items()}

    def detach(self) -> Self:
        return type(self)(self.mixer.detach(), self.convolution.detach())


def check_kernel_size(kernel_size: int) -> None:
    """Refuse what is no odd number above zero.

    Raises:
        ArgumentError: If so.
    """
    require_positive_int(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ArgumentError(
            f"kernel_size must be odd, as many frames on each side; got {kernel_size}. "
            f"Choose {kernel_size - 1} or {kernel_size + 1}."
        )


class ConvolutionModule(nn.Module):
    """pointwise(silu(norm(depthwise(glu(pointwise(x)))))): each channel mixes the kernel_size frames around its own.

    What is near counts by its place in the kernel, at every position alike. Costs O(N * C * (3 C + kernel_size)).
    Frames masked by `key_mask` enter the depthwise convolution as the zeros that stand beyond both ends, and batch
    statistics are those of the other frames, so real frames do not depend on padding. `positions` are ignored.

    The causal form sees a frame's own and the kernel_size - 1 before it, which is all that a stream keeps. With batch
    norm it streams in evaluation mode only, where the statistics are fixed.

    Args:
        embed_dim: C, the model width.
        kernel_size: Frames that the depthwise convolution sees; odd, so that as many are on each side.
        is_causal: All of them are a frame's own and those before it.
        norm: "batch" norm as in the paper, or "layer" norm, which has no statistics to keep.

    Shape:
        x: [B, N, C]; key_mask: [B, N]; positions: ignored; output: [B, N, C].

    Raises:
        ArgumentError: If a size is not positive or the kernel even, an input's shape or dtype is wrong, batch norm
            is to be trained on a single real frame, or a stream is asked of what cannot stream.
        UnknownNameError: If `norm` is neither.

    Source:
        Gulati et al. 2020, arXiv:2005.08100, section 2.2. Differs from the paper: the layer norm in front and the
        skip are left to the block; no dropout; the kernel has 31 frames where the paper has 32.

    Example:
        >>> import torch
        >>> from transformer_problems import ConvolutionModule
        >>> ConvolutionModule(64, kernel_size=15)(torch.randn(8, 100, 64)).shape
        torch.Size([8, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        kernel_size: int = 31,
        *,
        is_causal: bool = False,
        norm: ConvolutionNorm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(embed_dim=embed_dim)
        check_kernel_size(kernel_size)
        require_flag(is_causal=is_causal)
        if norm not in get_args(ConvolutionNorm):
            raise UnknownNameError("norm of the convolution", norm, get_args(ConvolutionNorm))
        self.embed_dim, self.kernel_size, self.is_causal = embed_dim, kernel_size, is_causal
        self.pointwise_in = Linear(embed_dim, 2 * embed_dim, bias=False, device=device, dtype=dtype)
        self.depthwise = nn.Conv1d(
            embed_dim, embed_dim, kernel_size, groups=embed_dim, bias=False, device=device, dtype=dtype
        )
        make_norm = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        self.norm: nn.Module = make_norm(embed_dim, device=device, dtype=dtype)
        self.pointwise_out = Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_input(x, key_mask, embed_dim=self.embed_dim)
        if x.shape[1] == 0:
            return x
        frames = F.glu(self.pointwise_in(x), dim=-1)
        if key_mask is not None:
            frames = frames.masked_fill(~key_mask[..., None], 0.0)
        around = self.kernel_size - 1
        before = around if self.is_causal else around // 2
        return self._convolve(F.pad(frames, (0, 0, before, around - before)), key_mask)

    def initial_state(self, batch_size: int) -> ConvolutionState:
        """The state before the first frame: zeros."""
        check_start(batch_size, is_causal=self.is_causal)
        return ConvolutionState(self.depthwise.weight.new_zeros(batch_size, self.kernel_size - 1, self.embed_dim))

    def stream(self, x: Tensor, state: ConvolutionState) -> tuple[Tensor, ConvolutionState]:
        """The next chunk, [B, n, C] -> [B, n, C], and the state after it."""
        check_input(x, embed_dim=self.embed_dim)
        check_same_batch(x, len(state.frames))
        if self.training and isinstance(self.norm, nn.BatchNorm1d):
            raise ArgumentError(
                "a module with norm='batch' must be in evaluation mode to stream: a chunk's statistics are not those "
                "of the sequence. Call eval() first, or pass norm='layer'."
            )
        if x.shape[1] == 0:
            return x, state
        window = torch.cat([state.frames, F.glu(self.pointwise_in(x), dim=-1)], dim=1)
        tail = window[:, x.shape[1] :].clone()  # a copy, or the state would hold the whole chunk
        return self._convolve(window, None), ConvolutionState(tail, state.num_seen + x.shape[1])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, is_causal={self.is_causal}"

    def _convolve(self, window: Tensor, key_mask: Tensor | None) -> Tensor:
        """All that follows the gate. window: [B, kernel_size - 1 + N, C]; output: [B, N, C]."""
        frames = self._normalize(self.depthwise(window.mT).mT, key_mask)
        y: Tensor = self.pointwise_out(F.silu(frames))
        return y

    def _normalize(self, frames: Tensor, key_mask: Tensor | None) -> Tensor:
        y: Tensor
        if not isinstance(self.norm, nn.BatchNorm1d):
            y = self.norm(frames)
            return y
        if not self.training:
            y = self.norm(frames.mT)
            return y.mT
        real = frames.flatten(0, 1) if key_mask is None else frames[key_mask]
        if len(real) < 2:
            raise ArgumentError(
                f"a batch must hold two real frames or more to train with norm='batch'; got {len(real)}. Use larger "
                "batches, or norm='layer'."
            )
        y = self.norm(real)
        if key_mask is None:
            return y.view(frames.shape)
        return torch.zeros_like(frames).masked_scatter(key_mask[..., None], y)
