"""Linformer: attention over keys and values that are projected to a fixed, short length."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, SequenceTooLongError
from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.scores import check_shapes, key_mask_of


class Linformer(nn.Module):
    """softmax(q (E k)^T / sqrt(D)) F v with learned E, F of shape [projected_len, max_seq_len].

    Time and memory grow as N * projected_len. Every projected key mixes the whole sequence, so the op is for
    encoders only, and column j of a projection belongs to the token at place j, so a sequence cannot be longer than
    `max_seq_len`; a shorter one uses the first columns. Masked keys and values count as zeros.

    What is shared, from most to fewest parameters: one E and one F for each head (`num_heads` given,
    `share_key_value=False`), one pair for all heads ("headwise"), one matrix for keys and values of all heads (the
    default, "key-value"), and one matrix for the whole model ("layerwise"): give one instance to every layer.

    Args:
        max_seq_len: Longest sequence, in tokens.
        projected_len: Length that keys and values are projected to.
        num_heads: Key/value heads G with projections of their own. Default: all heads share.
        share_key_value: Keys and values are projected by the same matrix.

    Shape:
        q: [..., H, N, D]; k, v: [..., G, M, D]; mask: [..., 1, 1, M]; output: [..., H, N, D].

    Raises:
        SequenceTooLongError: If M exceeds `max_seq_len`.
        ArgumentError: If a size is not positive, causality or a bias is asked for, the mask is not a key mask, k
            does not have the `num_heads` heads the op was built for, or q, k, v and mask do not fit each other.

    Example:
        >>> from transformer_problems import Encoder, Linformer, SelfAttention
        >>> op = Linformer(max_seq_len=512, projected_len=64)  # one matrix, shared by all layers
        >>> def mixer():
        ...     return SelfAttention(64, num_heads=4, op=op, is_causal=False)
        >>> model = Encoder(vocab_size=256, embed_dim=64, num_layers=2, mixer=mixer)

    Source:
        Wang et al. 2020, arXiv:2006.04768, section 4. Differs from the paper: projections start as
        N(0, 1 / max_seq_len), so that projected keys and values keep their variance; the paper's theorem uses
        N(0, 1 / projected_len). One `projected_len` serves all layers that share an instance.
    """

    accepts_causal = False
    accepts_bias = False

    def __init__(
        self,
        max_seq_len: int,
        projected_len: int,
        *,
        num_heads: int | None = None,
        share_key_value: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(max_seq_len=max_seq_len, projected_len=projected_len)
        if num_heads is not None:
            require_positive_int(num_heads=num_heads)
        self.max_seq_len, self.projected_len, self.num_heads = max_seq_len, projected_len, num_heads
        shape = (projected_len, max_seq_len) if num_heads is None else (num_heads, projected_len, max_seq_len)

        def projection() -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * max_seq_len**-0.5)

        self.key_projection = projection()
        self.value_projection = self.key_projection if share_key_value else projection()
        self.attention = DenseAttention()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: PositionBias | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        check_shapes(q, k, v, mask, bias)
        self._check(k, bias, is_causal)
        if mask is not None:
            absent = ~key_mask_of(mask, "Linformer")[..., None, :, None]  # [..., 1, M, 1]
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        return self.attention(q, _project(self.key_projection, k), _project(self.value_projection, v))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        share_key_value = self.value_projection is self.key_projection
        return (
            f"max_seq_len={self.max_seq_len}, projected_len={self.projected_len}{heads}, "
            f"share_key_value={share_key_value}"
        )

    def _check(self, k: Tensor, bias: PositionBias | None, is_causal: bool) -> None:
        if is_causal:
            raise ArgumentError(
                "is_causal must be False for Linformer, whose projected keys mix the whole sequence; got True. "
                "Use it in an encoder, or Performer or SlidingWindow for causal attention of linear cost."
            )
        if bias is not None:
            raise ArgumentError(
                "bias must be None for Linformer, whose projected keys have no positions; "
                f"got one from {type(bias.encoding).__name__}. Use an encoding that is added to the embeddings."
            )
        num_kv_heads, num_keys = k.shape[-3:-1]
        if num_keys > self.max_seq_len:
            raise SequenceTooLongError(
                f"the number of keys must not exceed max_seq_len={self.max_seq_len}; got {num_keys}. "
                f"Shorten the sequence or build Linformer with max_seq_len={num_keys} or more."
            )
        if self.num_heads not in (None, num_kv_heads):
            raise ArgumentError(
                f"num_heads must equal the number of key/value heads; got {self.num_heads} and {num_kv_heads}. "
                f"Build Linformer with num_heads={num_kv_heads}, or with None to share among heads."
            )


def _project(projection: Tensor, x: Tensor) -> Tensor:
    """The first M columns of [G or none, K, N_max] applied to [..., G, M, D]; output [..., G, K, D]."""
    return projection[..., : x.shape[-2]].to(x.dtype) @ x
