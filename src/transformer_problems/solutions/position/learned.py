"""One learned vector for each position, as in BERT and GPT-2."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import SequenceTooLongError, UnknownNameError
from transformer_problems.core.slots import PositionEncoding

Beyond = Literal["raise", "clamp"]


class LearnedPositions(PositionEncoding):
    """Adds row p of a learned [max_seq_len, C] table to the token at position p.

    There is no row for a position beyond the table: by default such a sequence is refused.

    Args:
        max_seq_len: Number of positions with a vector of their own.
        embed_dim: C.
        beyond: "raise" refuses positions outside the table; "clamp" gives them its nearest row, so that all
            later tokens stand at the same place.

    Shape:
        x: [..., N, C]; positions: [..., N] int; output: as x.

    Raises:
        SequenceTooLongError: If a position lies outside the table and `beyond` is "raise".

    Source:
        Gehring et al. 2017, arXiv:1705.03122, section 3.1; Devlin et al. 2018, arXiv:1810.04805.
    """

    embeds = True

    def __init__(
        self,
        max_seq_len: int,
        embed_dim: int,
        *,
        beyond: Beyond = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(max_seq_len=max_seq_len, embed_dim=embed_dim)
        if beyond not in get_args(Beyond):
            raise UnknownNameError("rule beyond max_seq_len", beyond, get_args(Beyond))
        self.max_seq_len, self.embed_dim, self.beyond = max_seq_len, embed_dim, beyond
        self.weight = nn.Parameter(torch.empty(max_seq_len, embed_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.beyond == "clamp":
            positions = positions.clamp(0, self.max_seq_len - 1)
        elif positions.numel():
            self._check(positions)
        return x + nn.functional.embedding(positions, self.weight)

    def extra_repr(self) -> str:
        return f"max_seq_len={self.max_seq_len}, embed_dim={self.embed_dim}, beyond={self.beyond!r}"

    def _check(self, positions: Tensor) -> None:
        first, last = (int(end) for end in positions.aminmax())
        if first < 0 or last >= self.max_seq_len:
            raise SequenceTooLongError(
                f"positions must lie in 0 ... max_seq_len - 1 = {self.max_seq_len - 1}; got {first} ... {last}. "
                "Shorten the sequence, build LearnedPositions with a larger max_seq_len, or pass beyond='clamp'."
            )
