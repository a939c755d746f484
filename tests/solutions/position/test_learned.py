"""LearnedPositions: the table, its gradient and its end."""

import pytest
import torch

from transformer_problems.core.errors import SequenceTooLongError, UnknownNameError
from transformer_problems.solutions.position.learned import LearnedPositions


def test_adds_the_row_of_each_position() -> None:
    encoding = LearnedPositions(10, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 9], [3, 3, 2]])
    y = encoding.embed(x, positions)
    for row in range(2):
        for n in range(3):
            assert torch.equal(y[row, n], x[row, n] + encoding.weight[positions[row, n]])


def test_gradcheck() -> None:
    encoding = LearnedPositions(5, 3, dtype=torch.float64)
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 4, 4, 1])

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Embed(encoding), {"encoding.weight": weight}, (x, positions))

    assert torch.autograd.gradcheck(run, (x, encoding.weight))


class _Embed(torch.nn.Module):
    def __init__(self, encoding: LearnedPositions) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.encoding.embed(x, positions)


@pytest.mark.parametrize("positions", [[0, 10], [-1, 3]])
def test_positions_outside_the_table_are_refused(positions: list[int]) -> None:
    message = rf"0 ... max_seq_len - 1 = 9; got {positions[0]} ... {positions[1]}\. .*beyond='clamp'"
    with pytest.raises(SequenceTooLongError, match=message):
        LearnedPositions(10, 4).embed(torch.zeros(2, 4), torch.tensor(positions))


def test_clamp_repeats_the_last_row() -> None:
    encoding = LearnedPositions(10, 4, beyond="clamp")
    y = encoding.embed(torch.zeros(3, 4), torch.tensor([9, 10, 5000]))
    assert torch.equal(y, encoding.weight[9].expand(3, 4))


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Nearest: clamp"):
        LearnedPositions(10, 4, beyond="clmp")  # type: ignore[arg-type]
