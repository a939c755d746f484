"""SinusoidalEncoding against the formula."""

import math

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding


@pytest.mark.parametrize("amplitude", [1.0, 0.02])
def test_equals_the_formula(amplitude: float) -> None:
    positions = torch.tensor([[0, 1, 2], [7, 100, 3]])
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    added = SinusoidalEncoding(8, amplitude=amplitude).embed(x, positions) - x
    for row in range(2):
        for n in range(3):
            for i in range(4):
                angle = int(positions[row, n]) * 10_000 ** (-2 * i / 8)
                expected = [amplitude * math.sin(angle), amplitude * math.cos(angle)]
                # angles up to 100 rad in float32
                assert added[row, n, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=100 * 2**-23)


def test_gradient_passes_unchanged() -> None:
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: SinusoidalEncoding(6).embed(x, torch.arange(4)), (x,))


def test_far_positions_have_codes_too() -> None:
    x = torch.zeros(1, 2, 8)
    codes = SinusoidalEncoding(8).embed(x, torch.tensor([10**6, 10**6 + 1]))
    assert codes.isfinite().all() and not torch.equal(codes[:, 0], codes[:, 1])


def test_odd_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of 2, .* got 9. Choose 8 or 10"):
        SinusoidalEncoding(9)
