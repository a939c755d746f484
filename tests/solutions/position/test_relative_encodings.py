"""What every relative encoding owes its users: only differences matter, and any layout of positions will do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.position.xpos import XPos

HEADS, DIM = 3, 8
ENCODINGS: dict[str, Callable[[], PositionEncoding]] = {
    "rotary": lambda: RotaryEmbedding(DIM),
    "linear": lambda: ScaledRotaryEmbedding(DIM, method="linear", factor=4, trained_length=16),
    "ntk": lambda: ScaledRotaryEmbedding(DIM, method="ntk", factor=4, trained_length=16),
    "yarn": lambda: ScaledRotaryEmbedding(DIM, method="yarn", factor=4, trained_length=16),
    "xpos": lambda: XPos(DIM),
    "shaw": lambda: ShawRelative(DIM, max_distance=6),
    "t5 causal": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=20),
    "t5": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=20, is_causal=False),
    "transformer_xl": lambda: TransformerXLRelative(HEADS * DIM, HEADS),
    "alibi": lambda: ALiBi(HEADS),
}
BIASES = [name for name, build in ENCODINGS.items() if build().biases]


def scores(encoding: PositionEncoding, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    rotated_q, rotated_k = encoding.rotate(q, k, q_positions, k_positions)
    content = rotated_q @ rotated_k.mT * DIM**-0.5
    bias = encoding.bias(q, q_positions, k_positions)
    return content if bias is None else content + bias


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_shift_of_all_positions_changes_nothing(name: str) -> None:
    encoding = ENCODINGS[name]().double()
    q, k = torch.randn(2, 2, HEADS, 20, DIM, dtype=torch.float64)
    positions = torch.arange(20)
    shifted = scores(encoding, q, k, positions + 500, positions + 500)
    # float32 angles reach 520 rad, where a step is 2^-14; a score sums 8 products of size 5 or less, over sqrt(8)
    torch.testing.assert_close(shifted, scores(encoding, q, k, positions, positions), atol=5 * 2**-14, rtol=0)


@pytest.mark.parametrize("name", ENCODINGS)
def test_blocks_of_positions_equal_slices_of_the_whole(name: str) -> None:
    encoding = ENCODINGS[name]().double()
    q, k = torch.randn(2, 2, HEADS, 20, DIM, dtype=torch.float64)
    positions = torch.arange(20)
    rows, columns = torch.tensor([[4, 5, 6], [17, 18, 19]]), torch.tensor([[1, 2, 3, 4, 5], [0, 7, 12, 18, 19]])
    whole = scores(encoding, q, k, positions, positions)
    block_q, block_k = q[:, :, rows].movedim(2, 1), k[:, :, columns].movedim(2, 1)  # [B, T, H, n, D]
    blocks = scores(encoding, block_q, block_k, rows, columns)
    for t in range(2):
        # the same numbers up to the order of float64 sums and float32 bucket or slope values that do not differ
        torch.testing.assert_close(blocks[:, t], whole[:, :, rows[t]][..., columns[t]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BIASES)
def test_position_bias_serves_tiles_and_blocks(name: str) -> None:
    encoding = ENCODINGS[name]().double()
    q = torch.randn(2, HEADS, 20, DIM, dtype=torch.float64)
    positions = torch.stack([torch.arange(20), torch.arange(20) * 3 + 7])  # rows with positions of their own
    bias = PositionBias(encoding, q, positions, positions)
    dense = bias.dense()
    assert dense.shape == (2, HEADS, 20, 20)
    torch.testing.assert_close(bias.tile(slice(2, 9), slice(5, 20)), dense[:, :, 2:9, 5:20], atol=1e-6, rtol=0)
    rows, columns = torch.tensor([[0, 1], [18, 19]]), torch.tensor([[3, 4, 5], [0, 1, 19]])
    blocks = bias.blocks(rows, columns)
    for t in range(2):
        torch.testing.assert_close(blocks[:, t], dense[:, :, rows[t]][..., columns[t]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("length", [1, 63, 64, 100])
def test_half_precision_stays_half(name: str, length: int) -> None:
    encoding = ENCODINGS[name]().bfloat16()
    q = torch.randn(1, HEADS, length, DIM, dtype=torch.bfloat16)
    result = scores(encoding, q, q, torch.arange(length), torch.arange(length))
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
