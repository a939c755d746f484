"""Randomized positions: short sequences trained at the positions of long ones."""

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import SequenceTooLongError
from transformer_problems.core.seeding import generator


class RandomizedPositions(nn.Module):
    """Draws N of the positions 0 ... max_position - 1 without replacement, in order, for any position encoding.

    The model meets every position up to `max_position` while training on short sequences only, so a longer
    sequence brings none it has not seen. Costs O(max_position) a call, on the CPU.

    Training calls draw afresh from a generator of its own, whose state is part of `state_dict`; the global
    generator is neither read nor moved. Evaluation draws depend on the seed and N alone.

    Args:
        max_position: L, no less than the longest sequence ever to be read.
        seed: Fixes all draws.

    Shape:
        output: [N] int64, increasing.

    Raises:
        SequenceTooLongError: If N exceeds `max_position`.

    Source:
        Ruoss et al. 2023, arXiv:2305.16843, section 3; one draw for a whole batch, as in the authors' code.
        Differs from the paper: positions start at 0; at test time, where the paper draws afresh as in training,
        each length has one fixed draw, so that evaluation repeats.
    """

    def __init__(self, max_position: int, *, seed: int = 0) -> None:
        super().__init__()
        require_positive_int(max_position=max_position)
        self.max_position, self.seed = max_position, seed
        self._generator = generator(seed, "randomized positions")

    def forward(self, num_tokens: int, device: torch.device, *, training: bool) -> Tensor:
        if num_tokens > self.max_position:
            raise SequenceTooLongError(
                f"num_tokens must be at most max_position={self.max_position}; got {num_tokens}. Build "
                "RandomizedPositions with a larger max_position, before training, or shorten the sequence."
            )
        source = self._generator if training else generator(self.seed, "evaluation positions", num_tokens)
        drawn = torch.randperm(self.max_position, generator=source, device=source.device)[:num_tokens]
        return drawn.sort().values.to(device)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return f"max_position={self.max_position}, seed={self.seed}"
