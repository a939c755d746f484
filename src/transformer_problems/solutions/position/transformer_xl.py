"""Transformer-XL's relative encoding: projected sinusoids of the distance, with two global query biases."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_multiple_of, require_positive
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.position.rotary import inverse_frequencies


class TransformerXLRelative(PositionEncoding):
    """Scores ((q_i + u) . k_j + (q_i + v) . W R_{i-j}) / sqrt(D) with R the sinusoid of the signed distance.

    The first term is a change of the query (`rotate`), the second a bias. sin and cos of a difference are products
    of sines and cosines of its ends, so the second is a product of two matrices of width C for any positions:
    nothing is tabulated and no [N, M, D] exists. It costs O(H * N * M * C), H times what the first term does.

    Args:
        embed_dim: C, the width of the sinusoid, even and a multiple of H.
        num_heads: H.
        base: Longest wavelength over 2 pi.

    Shape:
        q: [..., H, N, D]; k: [..., G, M, D]; positions: [..., N] and [..., M]; bias: [..., H, N, M].

    Source:
        Dai et al. 2019, arXiv:1901.02860, section 3.3. Differs from the paper: the position term is factored by
        angle addition instead of shifting a table (appendix B), which gives the same numbers and lets distances
        be negative, as an encoder needs.
    """

    attends = True
    biases = True
    keeps_norms = False  # u is added to the query

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        base: float = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        require_multiple_of("embed_dim", embed_dim, 2, "a pair of features")
        require_positive(base=base)
        self.embed_dim, self.num_heads, self.base = embed_dim, num_heads, base
        self.head_dim = embed_dim // num_heads
        self.content_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, device=device, dtype=dtype))  # u
        self.position_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, device=device, dtype=dtype))  # v
        self.r_proj = nn.Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)  # W
        nn.init.normal_(self.content_bias, std=0.02)
        nn.init.normal_(self.position_bias, std=0.02)

    def rotate(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        return q + self.content_bias[:, None, :], k

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        projection = self.r_proj.weight.view(self.num_heads, head_dim, self.embed_dim)
        waves = (q + self.position_bias[:, None, :]) * head_dim**-0.5 @ projection  # [..., H, N, C]
        origin = q_positions[..., :1]  # only differences matter, and small angles lose fewer digits
        q_sin, q_cos = self._waves(q_positions - origin, q.dtype)
        k_sin, k_cos = self._waves(k_positions - origin, q.dtype)
        of_sin, of_cos = waves.chunk(2, dim=-1)
        with_cos = of_sin * q_sin + of_cos * q_cos  # the part of the query that meets cos of the key
        with_sin = of_cos * q_sin - of_sin * q_cos
        return torch.cat([with_cos, with_sin], -1) @ torch.cat([k_cos, k_sin], -1).transpose(-2, -1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, base={self.base:g}"

    def _waves(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """sin and cos of the positions' angles, each [..., 1, N, C/2]."""
        inverse_frequency = inverse_frequencies(self.embed_dim, self.base, positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = (positions[..., None].to(wide) * inverse_frequency).unsqueeze(-3)
        return angles.sin().to(dtype), angles.cos().to(dtype)
