"""Deletion metrics on models whose losses are known on paper."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.attribution import Attribution
from transformer_problems.solutions.interpretability.faithfulness import faithfulness
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.readable import readable

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


class Counting:
    """Class 1's probability is the share of its evidence that is there: token 7s seen, of `num` in all."""

    vocab_size = 10

    def __init__(self, num: int) -> None:
        self.num = num
        self.seen: list[tuple[Tensor, Tensor]] = []

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].double()

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        assert key_mask is not None
        self.seen.append((tokens, key_mask))
        probability = ((tokens == 7) & key_mask).sum(1).double() / self.num
        return torch.stack([(1 - probability).clamp(min=1e-300).log(), probability.clamp(min=1e-300).log()], dim=1)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        return []

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return torch.ones_like(tokens, dtype=torch.float64) / tokens.shape[1]


def attribution(scores: Tensor, target: int = 1) -> Attribution:
    return Attribution(scores, "Planted.", torch.full((len(scores),), target), "planted")


def one_in(num_tokens: int) -> Tensor:
    """Two sequences with one token 7 each, at other places."""
    tokens = torch.zeros(2, num_tokens, dtype=torch.long)
    tokens[0, 3] = tokens[1, num_tokens - 1] = 7
    return tokens


@pytest.mark.parametrize("mask_token", [None, 9])
@pytest.mark.parametrize("num_tokens", [10, 23, 100])
def test_one_needed_token_on_top_costs_everything_and_is_enough(num_tokens: int, mask_token: int | None) -> None:
    tokens = one_in(num_tokens)
    found = faithfulness(Counting(1), tokens, attribution((tokens == 7).double()), mask_token=mask_token)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(found.comprehensiveness, ones)
    torch.testing.assert_close(found.sufficiency, 0 * ones)
    worst = faithfulness(Counting(1), tokens, attribution(-(tokens == 7).double()), mask_token=mask_token)
    torch.testing.assert_close(worst.comprehensiveness, 0 * ones)
    torch.testing.assert_close(worst.sufficiency, ones)


def test_random_scores_lose_what_chance_says() -> None:
    num_tokens = 20
    tokens = one_in(num_tokens)
    found = faithfulness(Counting(1), tokens, attribution((tokens == 7).double()), num_controls=400)
    chances = torch.tensor([math.ceil(share * num_tokens) / num_tokens for share in SHARES])
    expected = float(chances.mean())
    # one draw loses the share of curves that its rank is named in, at most 1: a standard deviation of half or less
    margin = 5 * 0.5 / 400**0.5
    assert (found.random_comprehensiveness - expected).abs().max() < margin < expected
    assert (found.random_sufficiency - (1 - expected)).abs().max() < margin
    again = faithfulness(Counting(1), tokens, attribution((tokens == 7).double()), num_controls=400)
    other = faithfulness(Counting(1), tokens, attribution((tokens == 7).double()), num_controls=400, seed=1)
    assert torch.equal(found.random_sufficiency, again.random_sufficiency)
    assert not torch.equal(found.random_sufficiency, other.random_sufficiency)


def test_shares_are_rounded_up_of_each_sequence_s_own_length() -> None:
    tokens = torch.full((2, 30), 7)
    key_mask = torch.arange(30) < torch.tensor([[30], [11]])
    model = Counting(30)
    found = faithfulness(
        model, tokens, attribution(torch.rand(2, 30)), key_mask=key_mask, shares=SHARES, num_controls=3
    )
    counts = torch.tensor([[1, 2, 3, 6, 15], [1, 1, 2, 3, 6]], dtype=torch.float64)
    torch.testing.assert_close(found.comprehensiveness, counts.mean(1) / 30)
    lengths = torch.tensor([30.0, 11.0], dtype=torch.float64)
    torch.testing.assert_close(found.sufficiency, (lengths - counts.mean(1)) / 30)
    # all tokens are alike, so that any ranking loses as much
    torch.testing.assert_close(found.random_comprehensiveness, found.comprehensiveness)
    torch.testing.assert_close(found.random_sufficiency, found.sufficiency)
    # every sequence keeps a token, padding never comes back, and tokens stay what they were
    assert all(mask.any(1).all() and not mask[1, 11:].any() and torch.equal(seen, tokens) for seen, mask in model.seen)


@pytest.mark.parametrize(("share", "num_tokens", "count"), [(0.28, 25, 7), (0.9, 5, 4), (0.99, 2, 1)])
def test_products_above_a_whole_number_by_rounding_alone_stay_and_one_token_is_left(
    share: float, num_tokens: int, count: int
) -> None:
    tokens = torch.full((1, num_tokens), 7)
    scores = attribution(torch.rand(1, num_tokens))
    found = faithfulness(Counting(num_tokens), tokens, scores, shares=(share,), num_controls=1)
    assert float(found.comprehensiveness) == pytest.approx(count / num_tokens)


def test_tokens_to_keep_are_neither_deleted_nor_ranked_and_ties_go_from_left_to_right() -> None:
    tokens, model = torch.full((1, 6), 7), Counting(6)
    keep = torch.tensor([[True, False, False, False, False, True]])
    scores = torch.tensor([[9.0, 1.0, 2.0, 2.0, 0.0, 9.0]])
    faithfulness(model, tokens, attribution(scores), keep=keep, shares=(0.25, 0.5), num_controls=1)
    masks = [mask[0].tolist() for _, mask in model.seen[:5]]
    assert masks == [
        [True] * 6,
        [True, True, False, True, True, True],
        [True, False, True, False, False, True],
        [True, True, False, False, True, True],
        [True, False, True, True, False, True],
    ]
    assert all(mask[0, 0] and mask[0, 5] for _, mask in model.seen)


def test_a_mask_token_stands_where_tokens_were_deleted() -> None:
    tokens, model = torch.full((1, 4), 7), Counting(4)
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    faithfulness(model, tokens, attribution(scores), mask_token=0, shares=(0.5,), num_controls=1)
    assert [seen[0].tolist() for seen, _ in model.seen[1:3]] == [[7, 0, 7, 0], [0, 7, 0, 7]]
    assert all(mask.all() for _, mask in model.seen)


def test_losses_of_a_transformer_equal_those_counted_by_hand() -> None:
    torch.manual_seed(0)
    model = Encoder(10, 16, 2, lambda: SelfAttention(16, 2, is_causal=False), num_outputs=3).double().eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
    explained = GradientXInput().explain(model, tokens)
    found = faithfulness(readable(model, read_at=0), tokens, explained, shares=(0.2, 0.5), num_controls=2)

    def probability(row: int, places: list[int]) -> float:
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, places] = True
        with torch.no_grad():
            return float(model(tokens[row : row + 1], key_mask=mask)[0, 0].softmax(0)[explained.target[row]])

    for row in range(2):
        order = sorted(range(8), key=lambda place: -float(explained.scores[row, place]))
        whole = probability(row, list(range(8)))
        without = [whole - probability(row, order[count:]) for count in (2, 4)]
        alone = [whole - probability(row, order[:count]) for count in (2, 4)]
        assert float(found.comprehensiveness[row]) == pytest.approx(sum(without) / 2, abs=1e-12)
        assert float(found.sufficiency[row]) == pytest.approx(sum(alone) / 2, abs=1e-12)


def test_the_number_of_passes_is_as_stated() -> None:
    model = Counting(1)
    faithfulness(model, one_in(10), attribution(torch.rand(2, 10)), shares=(0.1, 0.2, 0.5), num_controls=4)
    assert len(model.seen) == 2 * 3 * (4 + 1) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, "shares must hold numbers between 0 and 1; got ()"),
        ({"shares": (0.5, 1.0)}, r"shares must hold numbers between 0 and 1; got \(0.5, 1.0\)"),
        ({"mask_token": 10}, "mask_token must be from 0 to 9; got 10"),
        ({"mask_token": -1}, "mask_token must be from 0 to 9; got -1"),
        ({"mask_token": 1.5}, "mask_token must be from 0 to 9; got 1.5"),
        ({"mask_token": True}, "mask_token must be from 0 to 9; got True"),
        ({"shares": 0.5}, "shares must hold numbers between 0 and 1; got 0.5"),
        ({"shares": ("a",)}, r"shares must hold numbers between 0 and 1; got \('a',\)"),
        ({"keep": [True]}, r"keep must be bool \[2, 10\], .*; got \[True\]"),
        ({"num_controls": 0}, "num_controls must be positive; got 0"),
        ({"seed": -1}, "seed must not be negative; got -1"),
        ({"keep": torch.ones(2, 10)}, r"keep must be bool \[2, 10\]"),
        ({"keep": torch.ones(10, dtype=torch.bool)}, r"keep must be bool \[2, 10\]"),
        ({"keep": torch.arange(10).expand(2, -1) > 0}, "two tokens to delete at least; sequence 0 has 1"),
        ({"key_mask": torch.zeros(2, 10, dtype=torch.bool)}, "key_mask must leave each sequence a real token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        faithfulness(Counting(1), one_in(10), attribution(torch.rand(2, 10)), **options)


@pytest.mark.parametrize("make", [lambda: torch.rand(2, 9), lambda: torch.rand(1, 10)])
def test_scores_of_other_tokens_are_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(ArgumentError, match=r"attribution must have a score for each token, \[2, 10\]; got"):
        faithfulness(Counting(1), one_in(10), attribution(make()))


def test_bare_scores_and_targets_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match="attribution must be an Attribution; got torch.float32 .*Pass what an expl"
    ):
        faithfulness(Counting(1), one_in(10), torch.rand(2, 10))
    of_another = Attribution(torch.rand(2, 10), "", torch.tensor([1, 2]), "of another model")
    with pytest.raises(ArgumentError, match=r"one of the 2 answers of this model; its targets are \[1, 2\]"):
        faithfulness(Counting(1), one_in(10), of_another)
    elsewhere = Attribution(torch.rand(2, 10), "", torch.tensor([1, 0], device="meta"), "of a model elsewhere")
    with pytest.raises(ArgumentError, match="attribution must be on cpu, as the tokens; got cpu and, .* target, meta"):
        faithfulness(Counting(1), one_in(10), elsewhere)


def test_an_answer_that_is_no_number_without_some_tokens_is_refused() -> None:
    class Fragile(Counting):
        def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
            assert key_mask is not None
            return torch.where(key_mask.all(1, keepdim=True), 0.0, torch.nan).expand(-1, 2)

    with pytest.raises(ArgumentError, match=r"logits must be finite; got NaN or infinity without some tokens"):
        faithfulness(Fragile(1), one_in(10), attribution(torch.rand(2, 10)))
