"""The contract of the PositionEncoding slot."""

import torch
from torch import Tensor

from transformer_problems.core.slots import PositionBias, PositionEncoding
from transformer_problems.testing.contract import (
    ContractReport,
    NotApplicable,
    assert_close,
    run_checks,
    stray_tensors_on_meta,
)

_LENGTH = 23
_TOLERANCE = 1e-6  # angles and bucket logarithms are computed in float32 by the encodings' own contract


def check_position(
    encoding: PositionEncoding, *, embed_dim: int, num_heads: int, max_seq_len: int | None = None, seed: int = 0
) -> ContractReport:
    """Check a position encoding: that its hooks depend on positions alone, in any layout, dtype and device.

    Args:
        encoding: The module under test; see `core.slots.PositionEncoding`.
        embed_dim: C; the head dim is C / H.
        num_heads: H.
        max_seq_len: Largest position it takes plus one, for encodings of fixed length.

    Raises:
        ContractError: With the report, if any check is broken.
    """
    subject = _PositionSubject(encoding, embed_dim, num_heads, max_seq_len or 10**6, seed)
    checks = {
        "tells places apart": subject.check_distinguishes,
        "declares its hooks": subject.check_declarations,
        "part equals whole": subject.check_parts,
        "blocks equal dense": subject.check_blocks,
        "rows with their own positions": subject.check_batched_positions,
        "half precision": subject.check_half_precision,
        "device": subject.check_device,
    }
    return run_checks(f"{type(encoding).__name__} as PositionEncoding", checks)


class _PositionSubject:
    def __init__(self, encoding: PositionEncoding, embed_dim: int, num_heads: int, max_len: int, seed: int) -> None:
        self.encoding, self.embed_dim, self.num_heads = encoding.double(), embed_dim, num_heads
        self.generator = torch.Generator().manual_seed(seed)
        self.length = min(_LENGTH, max_len)
        self.x = self._draw(2, self.length, embed_dim)
        self.q = self._draw(2, num_heads, self.length, embed_dim // num_heads)
        self.k = self._draw(2, num_heads, self.length, embed_dim // num_heads)
        self.positions = torch.arange(self.length)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def scores(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """What the encoding makes of the scaled scores, [..., H, N, M]."""
        rotated_q, rotated_k = self.encoding.rotate(q, k, q_positions, k_positions)
        scores: Tensor = rotated_q @ rotated_k.transpose(-2, -1) * q.shape[-1] ** -0.5
        bias = self.encoding.bias(q, q_positions, k_positions)
        return scores if bias is None else scores + bias

    def check_distinguishes(self) -> None:
        if self.encoding.embeds:
            same = self.encoding.embed(self.x[:, :1].expand_as(self.x), self.positions)
            assert (same[:, 0] - same[:, -1]).abs().max() > _TOLERANCE, "first and last position look the same"
        if self.encoding.attends:
            k = self.k[..., :1, :].expand_as(self.k)
            scores = self.scores(self.q, k, self.positions, self.positions)
            assert (scores[..., -1, 0] - scores[..., -1, -1]).abs().max() > _TOLERANCE, "near and far look the same"

    def check_declarations(self) -> None:
        encoding = self.encoding
        assert encoding.embeds or encoding.attends, "neither `embeds` nor `attends` is True"
        if not encoding.embeds:
            assert encoding.embed(self.x, self.positions) is self.x, "`embeds` is False but embed changes its input"
        bias = encoding.bias(self.q, self.positions, self.positions)
        assert (bias is not None) == encoding.biases, f"`biases` is {encoding.biases}, bias returns {type(bias)}"
        if encoding.keeps_norms:
            rotated = encoding.rotate(self.q, self.k, self.positions, self.positions)
            for name, before, after in zip("qk", (self.q, self.k), rotated, strict=True):
                assert_close(after.norm(dim=-1), before.norm(dim=-1), f"norms of rotated {name}", tolerance=_TOLERANCE)

    def check_parts(self) -> None:
        half = self.length // 2
        late = self.positions[half:]
        if self.encoding.embeds:
            whole = self.encoding.embed(self.x, self.positions)
            part = self.encoding.embed(self.x[:, half:], late)
            assert_close(part, whole[:, half:], "embed of the second half", tolerance=_TOLERANCE)
        if self.encoding.attends and self.encoding.streams:
            whole = self.scores(self.q, self.k, self.positions, self.positions)
            part = self.scores(self.q[..., half:, :], self.k, late, self.positions)
            assert_close(part, whole[..., half:, :], "scores of the second half", tolerance=_TOLERANCE)

    def check_blocks(self) -> None:
        if not self.encoding.biases:
            raise NotApplicable("the encoding has no bias")
        bias = PositionBias(self.encoding, self.q, self.positions, self.positions)
        dense = bias.dense().expand(2, self.num_heads, self.length, self.length)
        tile = bias.tile(slice(3, 9), slice(2, 20))
        expected = dense[..., 3:9, 2:20]
        assert_close(tile.expand_as(expected), expected, "a tile", tolerance=_TOLERANCE)
        rows, columns = torch.tensor([[0, 1, 2], [7, 8, 9]]), torch.tensor([[0, 1], [4, 12]])
        blocks = bias.blocks(rows, columns)
        for i in range(2):
            expected = dense[:, :, rows[i]][..., columns[i]]
            assert_close(blocks[..., i, :, :, :].expand_as(expected), expected, f"block {i}", tolerance=_TOLERANCE)

    def check_batched_positions(self) -> None:
        positions = torch.stack([self.positions, self.positions.flip(0)])
        for row in range(2):
            if self.encoding.embeds:
                together = self.encoding.embed(self.x, positions)[row]
                alone = self.encoding.embed(self.x[row], positions[row])
                assert_close(together, alone, "embed, one row alone", tolerance=_TOLERANCE)
            if self.encoding.attends:
                together = self.scores(self.q, self.k, positions, positions)[row]
                alone = self.scores(self.q[row], self.k[row], positions[row], positions[row])
                assert_close(together, alone, "scores, one row alone", tolerance=_TOLERANCE)

    def check_half_precision(self) -> None:
        half = self.encoding.to(torch.bfloat16)
        x, q, k = self.x.bfloat16(), self.q.bfloat16(), self.k.bfloat16()
        embedded = half.embed(x, self.positions)
        rotated_q, rotated_k = half.rotate(q, k, self.positions, self.positions)
        self.encoding.double()
        for name, tensor in {"embed": embedded, "rotated q": rotated_q, "rotated k": rotated_k}.items():
            assert tensor.dtype == torch.bfloat16, f"{name} is {tensor.dtype} for bfloat16 input"

    def check_device(self) -> None:
        with stray_tensors_on_meta():
            self.encoding.embed(self.x, self.positions)
            self.scores(self.q, self.k, self.positions, self.positions)
