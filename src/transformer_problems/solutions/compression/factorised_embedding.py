"""A factorised embedding: a narrow table and one matrix that widens its rows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import (
    TransformKind,
    as_patterns,
    check_skip,
    matches,
    replace_modules,
    treated_copy,
)


class FactorisedEmbedding(nn.Module):
    """Rows of a table [V, R], widened to C by one matrix: V R + R C weights in place of V C.

    Args:
        num_embeddings: V.
        embed_dim: C.
        rank: R, below C to be of use.

    Shape:
        tokens: [...] int; output: [..., C].

    Source:
        Lan et al. 2019, arXiv:1909.11942, section 3.1.
    """

    made_by: TransformKind = "share"

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_int(num_embeddings=num_embeddings, embed_dim=embed_dim, rank=rank)
        self.num_embeddings, self.embedding_dim = num_embeddings, embed_dim
        self.table = nn.Embedding(num_embeddings, rank, device=device, dtype=dtype)
        self.widen = nn.Linear(rank, embed_dim, bias=False, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The whole table, [V, C], for output layers that multiply by it."""
        return nn.functional.linear(self.table.weight, self.widen.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.widen(self.table(tokens))
        return y


class FactoriseEmbedding:
    """Replaces token embeddings by the nearest factorised ones of a rank, by singular value decomposition.

    Embeddings of positions (a path that holds "position") stay. A model whose output layer multiplies by the table, as
    Decoder's does, goes on doing so with the product of both factors.

    Args:
        rank: R.
        skip: Patterns, as in fnmatch, of the paths of embeddings to leave alone.

    Raises:
        ArgumentError: If a rank does not save anything, there is nothing to factorise, or another layer holds the same
            table as its parameter.

    Source:
        Lan et al. 2019, arXiv:1909.11942, section 3.1. Differs from the paper: the factors start from a table, if it
        is trained, and not at random.
    """

    kind: TransformKind = "share"

    def __init__(self, rank: int, *, skip: Sequence[str] = ()) -> None:
        require_positive_int(rank=rank)
        self.rank, self.skip = rank, as_patterns("skip", skip)

    def __call__(self, model: nn.Module) -> nn.Module:
        factorised = treated_copy(model, self)
        check_skip(factorised, self.skip, nn.Embedding)

        def wanted(path: str, part: nn.Module) -> bool:
            of_tokens = isinstance(part, nn.Embedding) and "position" not in path.lower()
            return of_tokens and not matches(path, self.skip)

        def made(path: str, part: nn.Module) -> nn.Module:
            assert isinstance(part, nn.Embedding)
            self._check(path, part, factorised)
            return self._factors(part)

        if not replace_modules(factorised, wanted, made):
            raise ArgumentError(f"model must hold an embedding of tokens; this {type(model).__name__} has none.")
        return factorised

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def __repr__(self) -> str:
        return f"FactoriseEmbedding(rank={self.rank})"

    def _check(self, path: str, table: nn.Embedding, model: nn.Module) -> None:
        num, width = table.weight.shape
        if table.max_norm is not None:
            raise ArgumentError(
                f"an embedding must leave its rows as they are; {path} has max_norm={table.max_norm}, which factors "
                f"cannot keep. Pass skip=({path!r},)."
            )
        if self.rank * (num + width) >= num * width:
            raise ArgumentError(
                f"rank must be below {num * width / (num + width):.0f} to save anything on {path} of {num} x {width}; "
                f"got {self.rank}."
            )
        for other, part in model.named_modules():
            if part is not table and any(p is table.weight for p in part.parameters(recurse=False)):
                raise ArgumentError(
                    f"an embedding must be the only holder of its table; {path} and {other} share theirs. Untie them, "
                    f"or pass skip=({path!r},)."
                )

    @torch.no_grad()
    def _factors(self, table: nn.Embedding) -> FactorisedEmbedding:
        weight = table.weight
        num, width = weight.shape
        made = FactorisedEmbedding(num, width, self.rank, device=weight.device, dtype=weight.dtype)
        made.table.padding_idx = table.padding_idx  # its row gets no gradient
        left, values, right = torch.linalg.svd(
            weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
        )
        root = values[: self.rank].sqrt()
        made.table.weight.copy_(left[:, : self.rank] * root)
        made.widen.weight.copy_((root[:, None] * right[: self.rank]).T)
        return made
