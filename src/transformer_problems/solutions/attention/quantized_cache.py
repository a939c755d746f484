"""A key/value cache in 8 or 4 bits, but for its newest tokens."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_not_negative, require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.slots import token_positions
from transformer_problems.solutions.attention.cache_rules import check_appended, require_held

Bits = Literal[8, 4]


@dataclass(frozen=True, slots=True)
class RoundedTensor:
    """Numbers stored as codes * scale + low, with one scale and low for each slice along a dimension.

    Each is restored to within half of its slice's scale, (highest - lowest) / (2^bits - 1), and the rounding of scale,
    low and result to the dtype.

    Args:
        codes: uint8; two codes a byte along the last dimension where bits = 4.
        scale: Step between codes, of the input's dtype, 1 along the dimension.
        low: What code 0 stands for, as scale.
        bits: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: Bits

    @classmethod
    def of(cls, x: Tensor, *, bits: Bits, dim: int) -> Self:
        """x rounded, each slice along `dim` with a range of its own."""
        levels = 2**bits - 1
        wide = torch.promote_types(x.dtype, torch.float32)  # a range may be twice the largest float16
        low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)
        scale = ((high.to(wide) - low.to(wide)) / levels).to(x.dtype)
        steps = (x.to(wide) - low.to(wide)) / torch.where(scale > 0, scale, 1).to(wide)
        codes = steps.round().clamp(0, levels).to(torch.uint8)
        return cls(codes if bits == 8 else pack_int4(codes), scale, low, bits)

    def restored(self) -> Tensor:
        """The numbers, in the dtype that they came in."""
        codes = self.codes if self.bits == 8 else unpack_int4(self.codes)
        dtype, limits = self.scale.dtype, torch.finfo(self.scale.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        x = codes.to(wide) * self.scale.to(wide) + self.low.to(wide)
        return x.clamp(limits.min, limits.max).to(dtype)  # a scale that was rounded up may lead beyond the largest

    def followed_by(self, other: Self) -> Self:
        """Both, one after the other in dimension 2."""
        return replace(
            self,
            codes=torch.cat([self.codes, other.codes], dim=2),
            scale=torch.cat([self.scale, other.scale], dim=2),
            low=torch.cat([self.low, other.low], dim=2),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "low": self.low}


@dataclass(frozen=True, slots=True)
class QuantizedKVCache:
    """A cache whose older tokens are rounded to 8 or 4 bits, in whole groups, while the newest stay as they are.

    Keys are rounded for each channel over a group of tokens, since some channels are large in all tokens; values for
    each token over its channels. A head of D channels then takes per token D * bits / 4 bits of codes for both, plus
    2 D / group_size + 2 numbers of the model's dtype for the ranges. A chunk is attended to as it came and rounded
    afterwards, so the error of a stream depends on its chunks.

    What is saved is memory between passes: a layer that attends gets its keys and values restored, for that moment.
    For decoding under torch.no_grad(); rounding has no gradient.

    Args:
        bits: 8 or 4.
        group_size: Tokens that share the ranges of their key channels.
        num_recent: Newest tokens that are never rounded; up to group_size - 1 more wait for their group to fill.

    Shape:
        keys, values: [B, G, M, D], D even where bits = 4; positions: [M].

    Raises:
        ArgumentError: If bits is neither, a number is out of range, D is odd with 4 bits, or keys and values differ in
            shape, do not continue those held, or need gradients.

    Source:
        Liu et al. 2024, arXiv:2402.02750, section 3.3 (KIVI).
        Differs from the paper: 8 and 4 bits, not 2; keys and values are rounded at the same token; a value's range is
        that of its whole head; no fused kernel multiplies codes.

    Example:
        >>> from transformer_problems import QuantizedKVCache, SelfAttention
        >>> layer = SelfAttention(64, num_heads=4, cache=lambda batch_size: QuantizedKVCache.empty(batch_size, bits=4))
    """

    batch_size: int
    bits: Bits = 8
    group_size: int = 32
    num_recent: int = 32
    num_seen: int = 0
    _rounded: tuple[RoundedTensor, RoundedTensor] | None = field(default=None, repr=False)
    _recent: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ArgumentError(f"bits must be 8 or 4; got {self.bits}. Choose 8 for nearly exact attention.")
        require_positive_int(group_size=self.group_size)
        require_not_negative(batch_size=self.batch_size, num_recent=self.num_recent)

    @classmethod
    def empty(cls, batch_size: int, *, bits: Bits = 8, group_size: int = 32, num_recent: int = 32) -> Self:
        return cls(batch_size, bits, group_size, num_recent)

    def __len__(self) -> int:
        return self.num_seen

    @property
    def keys(self) -> Tensor:
        recent = self._held[0]
        if self._rounded is None:
            return recent
        return torch.cat([self._rounded[0].restored().flatten(2, 3), recent], dim=2)

    @property
    def values(self) -> Tensor:
        recent = self._held[1]
        return recent if self._rounded is None else torch.cat([self._rounded[1].restored(), recent], dim=2)

    @property
    def positions(self) -> Tensor:
        return token_positions(self.num_seen, self._held[0].device)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, ranges and the newest tokens."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        if self._rounded is not None:
            for name, part in zip(("key", "value"), self._rounded, strict=True):
                held |= {f"{name}_{what}": tensor for what, tensor in part.tensors().items()}
        return held if self._recent is None else held | dict(zip(("keys", "values"), self._recent, strict=True))

    def detach(self) -> Self:
        """The same cache, which never has a gradient history."""
        return self

    def append(self, k: Tensor, v: Tensor) -> Self:
        """The cache with n more tokens, not rounded yet. k, v: [B, G, n, D]."""
        check_appended(k, v, self.batch_size, None if self._recent is None else self._recent[0])
        if k.requires_grad or v.requires_grad:
            raise ArgumentError("k and v must not need gradients, which rounding cuts. Use torch.no_grad().")
        if self.bits == 4 and k.shape[-1] % 2:
            raise ArgumentError(f"head_dim must be even for bits=4; got {k.shape[-1]}. Choose bits=8.")
        recent = (k, v)
        if self._recent is not None:
            recent = torch.cat([self._recent[0], k], dim=2), torch.cat([self._recent[1], v], dim=2)
        return replace(self, num_seen=self.num_seen + k.shape[2], _recent=recent)

    def trimmed(self) -> Self:
        """The cache with every full group before the newest `num_recent` tokens rounded."""
        if self._recent is None:
            return self
        num = max(0, self._recent[0].shape[2] - self.num_recent) // self.group_size * self.group_size
        if num == 0:
            return self
        k, v = (x[:, :, :num] for x in self._recent)
        keys = RoundedTensor.of(k.unflatten(2, (-1, self.group_size)), bits=self.bits, dim=-2)
        values = RoundedTensor.of(v, bits=self.bits, dim=-1)
        if self._rounded is not None:
            keys, values = self._rounded[0].followed_by(keys), self._rounded[1].followed_by(values)
        recent = self._recent[0][:, :, num:].clone(), self._recent[1][:, :, num:].clone()  # lets the rest go
        return replace(self, _rounded=(keys, values), _recent=recent)

    @property
    def _held(self) -> tuple[Tensor, Tensor]:
        return require_held(self._recent)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, [..., D] uint8 with D even, two a byte: [..., D / 2]; the first in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """What `pack_int4` packed, [..., D / 2] -> [..., D]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
