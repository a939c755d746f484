"""Token pruning against one-row-at-a-time references; tokens truly leave."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.token_slots import Attended, Tokens
from transformer_problems.solutions.tokens.pruning import LearnedTokenPruning, TokenPruning, pruning_penalty


def sample(length: int, key_mask: Tensor | None = None, *, batch_size: int = 3) -> tuple[Tokens, Attended]:
    generator = torch.Generator().manual_seed(length)
    x, keys = (torch.randn(batch_size, length, d, dtype=torch.float64, generator=generator) for d in (6, 4))
    received = torch.rand(batch_size, length, dtype=torch.float64, generator=generator)
    if key_mask is not None:
        received = received * key_mask
    received = received / received.sum(-1, keepdim=True).clamp(min=1e-9)
    return Tokens.whole(x, key_mask=key_mask), Attended(received, keys)


def random_mask(length: int, batch_size: int = 3) -> Tensor:
    return torch.rand(batch_size, length, generator=torch.Generator().manual_seed(length)) < 0.7


@pytest.mark.parametrize("length", [1, 8, 63, 101])
@pytest.mark.parametrize("keep", [0.3, 1.0, 1, 5, 200])
@pytest.mark.parametrize("num_protected", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_keeps_the_most_attended_real_tokens_in_order(
    length: int, keep: float, num_protected: int, masked: bool
) -> None:
    tokens, attended = sample(length, random_mask(length) if masked else None)
    reduced = TokenPruning(keep, num_protected=num_protected)(tokens, attended)
    longest = 1
    for b in range(3):
        real = tokens.real[b].nonzero().flatten().tolist()
        first, rest = real[:num_protected], real[num_protected:]
        wanted = keep if isinstance(keep, int) else max(1, round(keep * len(real)))
        best = sorted(rest, key=lambda i: -attended.received[b, i])[: max(0, int(wanted) - len(first))]
        expected = sorted(first[: int(wanted)] + best)
        assert reduced.positions[b][reduced.real[b]].tolist() == expected
        assert torch.equal(reduced.x[b][reduced.real[b]], tokens.x[b, expected])
        longest = max(longest, len(expected))
    assert reduced.x.shape[1] == longest


@given(st.integers(1, 30), st.floats(0.05, 1.0), st.integers(0, 12))
def test_padding_changes_nothing(length: int, keep: float, num_padding: int) -> None:
    tokens, attended = sample(length, batch_size=1)
    alone = TokenPruning(keep)(tokens, attended)
    pad = torch.zeros(1, num_padding, 6, dtype=torch.float64)
    key_mask = torch.arange(length + num_padding)[None] < length
    padded = Tokens.whole(torch.cat([tokens.x, pad], dim=1), key_mask=key_mask)
    received = torch.nn.functional.pad(attended.received, (0, num_padding))
    reduced = TokenPruning(keep)(padded, Attended(received, attended.keys))
    assert torch.equal(reduced.x, alone.x)
    assert reduced.key_mask is None


def test_restore_puts_tokens_back_and_zeros_where_they_left() -> None:
    tokens, attended = sample(20, random_mask(20))
    once = TokenPruning(0.6)(tokens, attended)
    scores = torch.rand(once.x.shape[:2], dtype=torch.float64)
    twice = TokenPruning(4)(once, Attended(scores, once.x))
    back = twice.restore(twice.x)
    assert back.shape == tokens.x.shape
    for b in range(3):
        kept = twice.positions[b][twice.real[b]]
        assert len(kept) == 4
        assert torch.equal(back[b, kept], tokens.x[b, kept])
        assert back[b].abs().sum(-1).count_nonzero() == 4


def test_kept_tokens_pass_their_gradient_and_others_none() -> None:
    tokens, attended = sample(12)
    tokens.x.requires_grad_()
    reduced = TokenPruning(5)(tokens, attended)
    (gradient,) = torch.autograd.grad(reduced.x.sum(), tokens.x)
    assert gradient.sum() == 3 * 5 * 6
    assert torch.equal(gradient.sum(-1) > 0, reduced.restore(torch.ones_like(reduced.x)).sum(-1) > 0)


def test_learned_weights_in_training_equal_the_formula() -> None:
    tokens, attended = sample(9, random_mask(9))
    reducer = LearnedTokenPruning(0.1, temperature=0.05, dtype=torch.float64)
    once = reducer(tokens, attended)
    twice = reducer(once, attended)
    weight = torch.sigmoid((attended.received - 0.1) / 0.05)
    for b in range(3):
        weight[b, tokens.real[b].nonzero()[0]] = 1.0  # the first real token is protected
    assert twice.x is tokens.x
    torch.testing.assert_close(once.sizes, weight)
    torch.testing.assert_close(twice.sizes, weight.square())
    real = tokens.real
    expected = (weight[real].sum() + weight[real].square().sum()) / (2 * real.sum())
    torch.testing.assert_close(pruning_penalty([once, twice]), expected)


def test_learned_gradcheck() -> None:
    tokens, attended = sample(6)
    received = attended.received.requires_grad_()
    reducer = LearnedTokenPruning(0.1, temperature=0.05, dtype=torch.float64)

    def run(received: Tensor, threshold: Tensor) -> Tensor:
        call = (tokens, Attended(received, attended.keys))
        return torch.func.functional_call(reducer, {"threshold": threshold}, call).sizes

    assert torch.autograd.gradcheck(run, (received, reducer.threshold.detach().requires_grad_()))


def test_the_penalty_raises_the_threshold() -> None:
    tokens, attended = sample(20)
    reducer = LearnedTokenPruning(0.03, temperature=0.01, dtype=torch.float64)
    pruning_penalty([reducer(tokens, attended)]).backward()
    assert reducer.threshold.grad is not None
    assert reducer.threshold.grad < 0


@pytest.mark.parametrize("by", ["eval", "harden"])
def test_learned_pruning_is_hard_in_evaluation_and_when_hardened(by: str) -> None:
    tokens, attended = sample(30, random_mask(30))
    reducer = LearnedTokenPruning(1 / 30, dtype=torch.float64)
    if by == "eval":
        reducer.eval()
    else:
        reducer.harden()
        assert not reducer.threshold.requires_grad
    reduced = reducer(tokens, attended)
    chosen = tokens.real & (attended.received >= 1 / 30)
    for b in range(3):
        chosen[b, tokens.real[b].nonzero()[0]] = True
        assert reduced.positions[b][reduced.real[b]].tolist() == chosen[b].nonzero().flatten().tolist()
    assert reduced.x.shape[1] == chosen.sum(-1).max() < 30
    assert reduced.sizes is None


def test_a_resumed_module_is_as_hard_as_the_saved_one(tmp_path: Path) -> None:
    saved, resumed = LearnedTokenPruning(0.05), LearnedTokenPruning()
    for harden in (False, True):
        if harden:
            saved.harden()
        save_model(saved, str(tmp_path / "weights"))
        load_model(resumed, str(tmp_path / "weights"))
        assert resumed.is_hard == harden == (not resumed.threshold.requires_grad)
        assert torch.equal(resumed.threshold, saved.threshold)
    resumed.load_state_dict(LearnedTokenPruning().state_dict())
    assert not resumed.is_hard and resumed.threshold.requires_grad


def test_a_row_without_tokens_stays_empty() -> None:
    key_mask = torch.ones(3, 8, dtype=torch.bool)
    key_mask[1] = False
    tokens, attended = sample(8, key_mask)
    for reducer in (TokenPruning(3), LearnedTokenPruning(0.0).eval()):
        reduced = reducer(tokens, attended)
        assert not reduced.real[1].any()
        assert (reduced.restore(reduced.x)[1] == 0).all()


def test_arguments_out_of_range_are_refused() -> None:
    for keep in (0, 0.0, 1.5, -3, True):
        with pytest.raises(ArgumentError, match=f"keep must be a share in .* got {keep}"):
            TokenPruning(keep)
    with pytest.raises(ArgumentError, match="num_protected must not be negative; got -1"):
        TokenPruning(0.5, num_protected=-1)
    with pytest.raises(ArgumentError, match="num_protected must be a whole number; got '1'"):
        LearnedTokenPruning(num_protected="1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature must be positive; got 0"):
        LearnedTokenPruning(temperature=0)
    for threshold in (float("nan"), "0", None, True):
        with pytest.raises(ArgumentError, match=f"threshold must be a finite number; got .*{threshold}"):
            LearnedTokenPruning(threshold)  # type: ignore[arg-type]
    assert LearnedTokenPruning(0).threshold.is_floating_point()
    with pytest.raises(ArgumentError, match="trace must hold one layer or more; got none"):
        pruning_penalty(())
