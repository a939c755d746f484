"""Probes find what is planted, are not selective where nothing is, and give what a naive fit gives."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.solutions.interpretability.probing import probe

DRAWS = torch.Generator().manual_seed(0)
TOKENS = torch.randint(20, (200, 12), generator=DRAWS)
CONTEXT = torch.randint(3, (200, 12), generator=DRAWS)  # a property that the token's type says nothing about
NOISE = torch.randn(200, 12, 24, generator=DRAWS)
CHANCE = 5 * (0.25 / 600) ** 0.5  # five standard deviations of a share of the 600 held-out tokens


def planted(labels: Tensor) -> Tensor:
    """A direction for each class, under noise."""
    directions = torch.randn(int(labels.max()) + 1, 24, generator=torch.Generator().manual_seed(1))
    return 3 * directions[labels] + NOISE


def rows_held_out(number: int, *, seed: int) -> Tensor:
    """[S] bool."""
    rows = torch.randperm(200, generator=generator(seed, "split"))[:number]
    return torch.zeros(200, dtype=torch.bool).index_fill(0, rows, True)


def test_a_property_of_the_context_is_found_selectively() -> None:
    scores = probe({"layer": planted(CONTEXT)}, CONTEXT, TOKENS)["layer"]
    assert scores.accuracy > 0.99
    assert abs(scores.majority_accuracy - 1 / 3) < CHANCE
    # A probe that knows nothing of a type gives its most common label: more than a third, as labels are few.
    assert scores.selectivity > 0.4
    assert scores.selectivity == scores.accuracy - scores.control_accuracy


def test_random_activations_hold_nothing() -> None:
    scores = probe({"layer": NOISE}, CONTEXT, TOKENS)["layer"]
    assert abs(scores.accuracy - 1 / 3) < CHANCE
    assert scores.selectivity < CHANCE


def test_activations_that_spell_out_the_type_are_not_selective() -> None:
    types = nn.functional.one_hot(TOKENS, 20).float()
    scores = probe({"layer": types}, TOKENS % 3, TOKENS)["layer"]
    assert (
        scores.accuracy == scores.control_accuracy == 1
    )  # any labels of the types can be read, consistent as they are
    assert scores.selectivity == 0


def test_a_heavier_penalty_memorises_less() -> None:
    types = nn.functional.one_hot(TOKENS, 20).float()
    light, heavy = (
        probe({"layer": types}, TOKENS % 3, TOKENS, penalty=penalty)["layer"].control_accuracy for penalty in (1.0, 1e5)
    )
    assert heavy < light


def test_the_probe_is_the_minimum_of_its_loss_in_float64() -> None:
    x, labels = NOISE[..., :4], (NOISE[..., 0] + NOISE[..., 5] > 0.3).long()
    scores = probe({"layer": x}, labels, TOKENS, held_out=0.5, penalty=10.0, seed=3)["layer"]
    held_out = rows_held_out(100, seed=3)
    seen, unseen = x[~held_out].flatten(0, 1).double(), x[held_out].flatten(0, 1).double()
    mean, std = seen.mean(dim=0), seen.std(dim=0, correction=0)
    seen, unseen = (seen - mean) / std, (unseen - mean) / std
    weight, bias = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (4, 1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = seen @ weight + bias
        data = nn.functional.binary_cross_entropy_with_logits(
            logits, labels[~held_out].flatten().double(), reduction="sum"
        )
        total = data + 10.0 / 2 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    logits = (unseen @ weight + bias).detach()
    right = ((logits > 0) == (labels[held_out].flatten() == 1)).double().mean()
    # At most one of the 1,200 may lie closer to the boundary than the two optima lie to each other.
    assert scores.accuracy == pytest.approx(float(right), abs=1.5 / 1200)


def test_tokens_without_labels_do_not_count() -> None:
    labels, x = CONTEXT.clone(), planted(CONTEXT)
    labels[:, 6:] = -100
    whole = probe({"layer": x[:, :6]}, labels[:, :6], TOKENS[:, :6], seed=2)
    x[:, 6:] = torch.nan
    assert probe({"layer": x}, labels, TOKENS, seed=2)["layer"].accuracy == whole["layer"].accuracy


def test_the_same_seed_gives_the_same_scores_and_another_others() -> None:
    x = {"layer": planted(CONTEXT) + 3 * NOISE.flip(0)}
    assert probe(x, CONTEXT, TOKENS, seed=1) == probe(x, CONTEXT, TOKENS, seed=1)
    assert probe(x, CONTEXT, TOKENS, seed=1) != probe(x, CONTEXT, TOKENS, seed=2)


def test_one_label_a_sequence_and_brain_floats_are_taken() -> None:
    labels, types = CONTEXT[:, :1], TOKENS[:, :1]
    scores = probe({"layer": planted(CONTEXT)[:, :1].bfloat16()}, labels, types)
    assert scores["layer"].accuracy > 0.9


def test_bad_input_is_refused() -> None:
    x = {"layer": NOISE}
    with pytest.raises(ArgumentError, match="labels must hold two classes at least .*; got 1"):
        probe(x, torch.zeros_like(CONTEXT), TOKENS)
    with pytest.raises(ArgumentError, match="labels must hold two classes at least .*; got 0"):
        probe(x, torch.full_like(CONTEXT, -100), TOKENS)
    few = torch.full_like(CONTEXT, -100)
    few[(~rows_held_out(50, seed=0)).nonzero()[0], :2] = torch.tensor([0, 1])
    with pytest.raises(ArgumentError, match="labels must reach the held-out sequences; got none there"):
        probe(x, few, TOKENS)
    with pytest.raises(ArgumentError, match="tokens must be of two types at least"):
        probe(x, CONTEXT, torch.zeros_like(TOKENS))
    with pytest.raises(ArgumentError, match="labels must be whole numbers \\[S, N\\]; got torch.float32"):
        probe(x, CONTEXT.float(), TOKENS)
    with pytest.raises(ArgumentError, match="labels must be whole numbers .* \\[200\\]. Give one of a sequence as"):
        probe(x, CONTEXT[:, 0], TOKENS)
    with pytest.raises(
        ArgumentError, match="tokens must be whole numbers \\[200, 12\\], as labels are; got .* \\[200, 11\\]"
    ):
        probe(x, CONTEXT, TOKENS[:, 1:])
    with pytest.raises(ArgumentError, match="tokens must be whole numbers .*; got torch.float32"):
        probe(x, CONTEXT, TOKENS.float())
    with pytest.raises(ArgumentError, match="labels must be whole numbers .*; got "):
        probe(x, CONTEXT.tolist(), TOKENS)
    with pytest.raises(ArgumentError, match="labels must be of two sequences at least"):
        probe({"layer": NOISE[:1]}, CONTEXT[:1], TOKENS[:1])
    with pytest.raises(ArgumentError, match="activations must map names of layers to tensors; got none"):
        probe({}, CONTEXT, TOKENS)
    with pytest.raises(
        ArgumentError, match="activations must be real numbers \\[200, 12, C\\], .*; layer is .* \\[200, 24\\]"
    ):
        probe({"layer": NOISE[:, 0]}, CONTEXT, TOKENS)
    for unfit in (NOISE.numpy(), NOISE[..., :0], NOISE * 1j):
        with pytest.raises(ArgumentError, match="activations must be real numbers \\[200, 12, C\\], .*; layer is "):
            probe({"layer": unfit}, CONTEXT, TOKENS)
    with pytest.raises(ArgumentError, match="activations must be finite; layer holds NaN"):
        probe({"layer": NOISE / 0}, CONTEXT, TOKENS)
    with pytest.raises(ArgumentError, match="held_out must be a share between 0 and 1; got 1.0"):
        probe(x, CONTEXT, TOKENS, held_out=1.0)
    with pytest.raises(ArgumentError, match="held_out must be a share between 0 and 1; got a quarter"):
        probe(x, CONTEXT, TOKENS, held_out="a quarter")
    with pytest.raises(ArgumentError, match="penalty must be a finite number; got inf"):
        probe(x, CONTEXT, TOKENS, penalty=float("inf"))
    with pytest.raises(ArgumentError, match="penalty must be positive; got 0"):
        probe(x, CONTEXT, TOKENS, penalty=0)
    with pytest.raises(ArgumentError, match="num_controls must be positive; got 0"):
        probe(x, CONTEXT, TOKENS, num_controls=0)
