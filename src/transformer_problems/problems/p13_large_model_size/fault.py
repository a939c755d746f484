"""A model whose matrices are larger than what is in them."""

from copy import deepcopy

import torch

from transformer_problems.checkpoints.subject import Subject
from transformer_problems.problems.p13_large_model_size.matrices import matrices_of

_SHARE = 8  # an eighth of the full rank stays


class ThinMatrices:
    """Every matrix becomes the nearest one of an eighth of its rank."""

    problem = 13
    name = "every matrix keeps an eighth of its rank"

    def plant(self, subject: Subject, seed: int) -> Subject:
        model = deepcopy(subject.model)
        with torch.no_grad():
            for weight in matrices_of(model).values():
                u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
                rank = max(1, len(s) // _SHARE)
                weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
        return subject.with_model(model)


FAULT = ThinMatrices()
