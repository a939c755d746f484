"""TokenMerging against a reference that merges one pair at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.token_slots import Attended, Tokens
from transformer_problems.solutions.tokens.merging import TokenMerging


def sample(length: int, key_mask: Tensor | None = None, *, batch_size: int = 3) -> tuple[Tokens, Attended]:
    generator = torch.Generator().manual_seed(length)
    x, keys = (torch.randn(batch_size, length, d, dtype=torch.float64, generator=generator) for d in (6, 4))
    received = torch.full((batch_size, length), 1 / length, dtype=torch.float64)
    return Tokens.whole(x, key_mask=key_mask), Attended(received, keys)


def random_mask(length: int, batch_size: int = 3) -> Tensor:
    return torch.rand(batch_size, length, generator=torch.Generator().manual_seed(length)) < 0.7


def naive(keys: Tensor, real: list[int], merge: float, num_protected: int) -> dict[int, list[int]]:
    """The groups of one row: survivor -> its members."""
    wanted = merge if isinstance(merge, int) else round(merge * len(real))
    first, second = real[::2], real[1::2]
    protected = set(real[:num_protected])
    edges = []
    for a in first:
        partners = [b for b in second if b not in protected]
        if a in protected or not partners:
            continue
        similarity = {b: float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in partners}
        best = max(partners, key=lambda b: similarity[b])
        edges.append((similarity[best], a, best))
    groups = {i: [i] for i in real}
    for _, a, b in sorted(edges, reverse=True)[: int(wanted)]:
        groups[b] += groups.pop(a)
    return groups


@pytest.mark.parametrize("length", [1, 2, 8, 63, 101])
@pytest.mark.parametrize("merge", [0.25, 0.5, 1, 300])
@pytest.mark.parametrize("num_protected", [0, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_merging_pair_by_pair(length: int, merge: float, num_protected: int, masked: bool) -> None:
    tokens, attended = sample(length, random_mask(length) if masked else None)
    reduced = TokenMerging(merge, num_protected=num_protected)(tokens, attended)
    assert reduced.sizes is not None
    longest = 1
    for b in range(3):
        real = tokens.real[b].nonzero().flatten().tolist()
        groups = naive(attended.keys[b], real, merge, num_protected)
        survivors = sorted(groups)
        longest = max(longest, len(survivors))
        kept = reduced.real[b]
        assert reduced.positions[b][kept].tolist() == survivors
        assert reduced.sizes[b][kept].tolist() == [len(groups[i]) for i in survivors]
        for i, x in zip(survivors, reduced.x[b][kept], strict=True):
            torch.testing.assert_close(x, tokens.x[b, groups[i]].mean(0))
        for place, i in enumerate(survivors):
            assert all(reduced.sources[b, member] == place for member in groups[i])
    assert reduced.x.shape[1] == longest


@given(st.integers(2, 40), st.floats(0.05, 0.5), st.integers(1, 5))
def test_the_size_weighted_mean_never_changes(length: int, merge: float, rounds: int) -> None:
    tokens, attended = sample(length)
    mean = tokens.x.mean(1)
    for _ in range(rounds):
        tokens = TokenMerging(merge)(tokens, attended)
        attended = Attended(torch.ones_like(tokens.sizes), tokens.x)
        weights = (tokens.sizes * tokens.real)[..., None]
        assert (weights.sum((1, 2)) == length).all()
        # float64: a mean of at most 40 values of order one, rounded once a round
        torch.testing.assert_close((tokens.x * weights).sum(1) / length, mean, atol=1e-14, rtol=0)


@given(st.integers(1, 30), st.floats(0.05, 0.5), st.integers(0, 12))
def test_padding_changes_nothing(length: int, merge: float, num_padding: int) -> None:
    tokens, attended = sample(length, batch_size=1)
    alone = TokenMerging(merge)(tokens, attended)

    def padded(x: Tensor) -> Tensor:  # noise on the left
        return torch.cat([torch.full((1, num_padding, *x.shape[2:]), 7.0, dtype=x.dtype), x], dim=1)

    key_mask = torch.arange(length + num_padding)[None] >= num_padding
    noisy = Tokens.whole(padded(tokens.x), key_mask=key_mask)
    reduced = TokenMerging(merge)(noisy, Attended(padded(attended.received), padded(attended.keys)))
    torch.testing.assert_close(reduced.x, alone.x)
    assert torch.equal(reduced.sizes, alone.sizes)
    assert reduced.key_mask is None


def test_restore_gives_every_member_what_its_group_has() -> None:
    tokens, attended = sample(12, random_mask(12))
    reduced = TokenMerging(4)(tokens, attended)
    back = reduced.restore(reduced.x)
    for b in range(3):
        for i in range(12):
            if not tokens.real[b, i]:
                assert (back[b, i] == 0).all()
            else:
                assert torch.equal(back[b, i], reduced.x[b, reduced.sources[b, i]])
    assert reduced.restore(torch.ones(3, reduced.x.shape[1])).sum() == tokens.real.sum()


def test_gradcheck() -> None:
    tokens, attended = sample(7)

    def run(x: Tensor) -> Tensor:
        return TokenMerging(3)(Tokens.whole(x), attended).x

    assert torch.autograd.gradcheck(run, (tokens.x.requires_grad_(),))


def test_identical_tokens_merge_first() -> None:
    tokens, attended = sample(10, batch_size=1)
    attended.keys[0, 7] = 3 * attended.keys[0, 4]  # the same direction
    reduced = TokenMerging(1)(tokens, attended)
    assert reduced.positions.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 9]]


def test_arguments_out_of_range_are_refused() -> None:
    for merge in (0, 0.0, 0.6, -3, True):
        with pytest.raises(ArgumentError, match=f"merge must be a share in .* got {merge}"):
            TokenMerging(merge)
    with pytest.raises(ArgumentError, match="num_protected must be a whole number; got 1.5"):
        TokenMerging(0.5, num_protected=1.5)  # type: ignore[arg-type]
