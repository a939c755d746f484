"""An embedding of three neighbours: narrow rows of a table, each widened together with those beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError


class TrigramEmbedding(nn.Module):
    """widen([row before, own row, row after]): a table [V, E] and 3 E C weights in place of a table [V, C].

    A token sees the next one, so it is for encoders: `encoder.body.embedding = TrigramEmbedding(V, C, E)`. Beyond both
    ends are zeros, and the same for padding where `padding_idx` says which token that is.

    Args:
        num_embeddings: V.
        embed_dim: C.
        table_dim: E, below C to be of use; 128 for a C of 512 in the paper.
        padding_idx: The token whose row is zero and stays so.

    Shape:
        tokens: [..., N] int; output: [..., N, C].

    Raises:
        ArgumentError: If a size is not positive, or the padding no token.

    Source:
        Sun et al. 2020, arXiv:2004.02984, section 3.1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        table_dim: int,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_embeddings=num_embeddings, embed_dim=embed_dim, table_dim=table_dim)
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ArgumentError(f"padding_idx must be a token from 0 to {num_embeddings - 1}; got {padding_idx}.")
        self.embedding_dim = embed_dim
        self.table = nn.Embedding(num_embeddings, table_dim, padding_idx, device=device, dtype=dtype)
        self.widen = nn.Linear(3 * table_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.pad(self.table(tokens), (0, 0, 1, 1))  # [..., N + 2, E]
        y: Tensor = self.widen(torch.cat([rows[..., :-2, :], rows[..., 1:-1, :], rows[..., 2:, :]], dim=-1))
        return y
