"""The weight matrices of a model: how many directions they use, and which repeat each other."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_COLUMNS = 512  # of a matrix whose singular values are computed
_NUM_COMPARED = 4_096  # weights of a matrix by which repeats are looked for
_ALIKE = 0.999  # cosine from which two matrices count as one


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of two dimensions or more as a matrix, by name; tied ones once.

    Shape:
        each: [outputs, everything else]; GPT-2's are [inputs, outputs].
    """
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    return {name: weight.flatten(1) for name, weight in found.items() if min(weight.flatten(1).shape) > 1}


def rank_share(weight: Tensor, energy: float = 0.99) -> float:
    """The rank that holds this share of the squared singular values, over the full rank.

    Of a matrix wider and higher than 512 the first 512 columns are looked at, whose share is, if anything, larger.
    """
    weight = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    squares = torch.linalg.svdvals(weight[:, :MOST_COLUMNS].float()).square()
    held = squares.cumsum(dim=0) / squares.sum().clamp(min=1e-30)
    return (int((held < energy).sum()) + 1) / len(squares)


def repeats(matrices: dict[str, Tensor]) -> list[str]:
    """Names of matrices that are, nearly, another one before them."""
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, weight in matrices.items():
        by_shape[tuple(weight.shape)].append(name)
    return [name for names in by_shape.values() for name in _repeats_within(names, matrices)]


def _repeats_within(names: Sequence[str], matrices: dict[str, Tensor]) -> list[str]:
    if len(names) < 2:
        return []
    step = max(1, matrices[names[0]].numel() // _NUM_COMPARED)
    few = torch.stack([matrices[name].flatten()[::step].float() for name in names])
    cosines = nn.functional.normalize(few, dim=-1) @ nn.functional.normalize(few, dim=-1).mT
    pairs = (cosines.tril(diagonal=-1) > _ALIKE).nonzero().tolist()
    found = []
    for later, earlier in pairs:  # only those that the few weights do not tell apart are compared whole
        one, other = matrices[names[later]].flatten().float(), matrices[names[earlier]].flatten().float()
        if names[later] not in found and float(nn.functional.cosine_similarity(one, other, dim=0)) > _ALIKE:
            found.append(names[later])
    return found
