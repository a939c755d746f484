"""Fixed sine and cosine positions, the encoding of the first Transformer."""

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_multiple_of, require_positive
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.position.rotary import inverse_frequencies


class SinusoidalEncoding(PositionEncoding):
    """Adds sin(p * base^(-2i/C)) to feature 2i and the cosine of the same angle to feature 2i + 1.

    Nothing is learned and any position has a code, but codes of positions never trained on are new to the model.
    Costs O(N * C); angles are computed in float32 whatever the input's dtype.

    Args:
        embed_dim: C, even.
        base: Longest wavelength over 2 pi, 10,000 in the paper.
        amplitude: Height of the waves; 1 in the paper, whose embeddings have unit variance. Match it to yours.

    Shape:
        x: [..., N, C]; positions: [..., N]; output: as x.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5. Differs from the paper: the embeddings are not
        multiplied by sqrt(C) first (their section 3.4); set `amplitude` instead.
    """

    embeds = True

    def __init__(self, embed_dim: int, *, base: float = 10_000.0, amplitude: float = 1.0) -> None:
        super().__init__()
        require_multiple_of("embed_dim", embed_dim, 2, "a pair of features")
        require_positive(base=base, amplitude=amplitude)
        self.embed_dim, self.base, self.amplitude = embed_dim, base, amplitude

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        inverse_frequency = inverse_frequencies(self.embed_dim, self.base, x.device)
        angles = positions[..., None].to(inverse_frequency.dtype) * inverse_frequency  # [..., N, C/2]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return x + (self.amplitude * waves).to(x.dtype)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, base={self.base:g}, amplitude={self.amplitude:g}"
