"""What every explainer checks before it explains, and what an explanation may be."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.attribution import Attribution, Explainer
from transformer_problems.solutions.interpretability.flow import AttentionFlow
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.integrated_gradients import IntegratedGradients
from transformer_problems.solutions.interpretability.last_attention import LastAttention
from transformer_problems.solutions.interpretability.random_scores import RandomScores
from transformer_problems.solutions.interpretability.rollout import AttentionRollout
from transformer_problems.solutions.interpretability.smooth_grad import SmoothGrad
from transformer_problems.solutions.training.drop_head import DropHead

METHODS = [
    LastAttention(),
    AttentionRollout(),
    AttentionFlow(),
    GradientXInput(),
    IntegratedGradients(steps=2),
    SmoothGrad(samples=2),
    RandomScores(),
]
LABEL = torch.zeros(1, dtype=torch.long)
TOKENS = torch.tensor([[3, 1, 4, 1], [2, 7, 1, 8]])


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(10, 16, 1, lambda: SelfAttention(16, 2, is_causal=False), num_outputs=3)


every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@every_method
def test_every_explainer_gives_one_finite_score_a_token_and_says_what_it_means(method: Explainer) -> None:
    mask = torch.tensor([[True] * 4, [False, True, True, False]])
    found = method.explain(encoder(), TOKENS, key_mask=mask, target=torch.tensor([2, 0]))
    assert found.scores.shape == TOKENS.shape and found.scores.dtype == torch.float32
    assert not found.scores[~mask].any() and not found.scores.requires_grad
    assert torch.equal(found.target, torch.tensor([2, 0]))
    assert found.meaning.endswith(".") and found.method
    one = method.explain(encoder(), TOKENS[:1, :1])
    assert one.scores.shape == (1, 1)


@every_method
@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS + 7, {}, "tokens must be from 0 to 9; got 15"),
        (TOKENS - 2, {}, "tokens must be from 0 to 9; got -1"),
        (TOKENS[0], {}, r"tokens must be whole numbers \[B, N\]; got torch.int64 \[4\]. Give one sequence as tokens"),
        (TOKENS.float(), {}, r"tokens must be whole numbers \[B, N\]; got torch.float32 \[2, 4\]"),
        ([[3, 1]], {}, r"tokens must be whole numbers \[B, N\]; got \[\[3, 1\]\]"),
        (TOKENS[:, :0], {}, r"tokens must hold a token at least; got \[2, 0\]"),
        (TOKENS, {"key_mask": torch.ones(2, 4)}, r"key_mask must be bool \[2, 4\]"),
        (
            TOKENS,
            {"key_mask": torch.tensor([[True] * 4, [False] * 4])},
            "key_mask must leave each sequence a real token; sequence 1 has none",
        ),
        (TOKENS, {"target": 3}, "target must be from 0 to 2; got 3"),
        (TOKENS, {"target": torch.tensor([0, -1])}, "target must be from 0 to 2; got -1"),
        (TOKENS, {"target": torch.tensor([0, 1, 2])}, r"target must be a whole number or \[B\] of them, B = 2; got"),
        (TOKENS, {"target": "a"}, r"target must be a whole number or \[B\] of them, B = 2; got 'a'"),
        (TOKENS, {"target": 2**70}, r"target must be a whole number or \[B\] of them, B = 2; got 118"),
        (TOKENS, {"target": True}, r"target must be a whole number or \[B\] of them, B = 2; got True"),
        (TOKENS, {"target": 0.5}, r"target must be a whole number or \[B\] of them"),
    ],
)
def test_input_that_does_not_fit_is_refused(
    method: Explainer, tokens: Tensor, options: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        method.explain(encoder(), tokens, **options)


@every_method
def test_an_answer_that_is_no_number_is_refused(method: Explainer) -> None:
    model = encoder()
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(ArgumentError, match="the model's logits must be finite; got NaN or infinity"):
        method.explain(model, TOKENS)


@every_method
def test_dropout_frozen_weights_and_training_change_nothing(method: Explainer) -> None:
    torch.manual_seed(0)
    model = Encoder(
        10, 16, 2, lambda: SelfAttention(16, 2, op=DropHead(rate=0.5), is_causal=False), num_outputs=3
    ).eval()
    expected = method.explain(model, TOKENS).scores
    for found in (
        method.explain(model.train(), TOKENS).scores,
        method.explain(model.requires_grad_(False), TOKENS).scores,
    ):
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(method.explain(model, TOKENS).scores, expected)
    assert model.training and all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_give_scores_in_single(dtype: torch.dtype, method: Explainer) -> None:
    model = encoder().to(dtype)
    found = method.explain(model, TOKENS)
    expected = method.explain(model.float(), TOKENS, target=found.target)  # noise is drawn in single precision alike
    assert found.scores.dtype == torch.float32
    # some tens of roundings between a token and its score
    bound = 32 * torch.finfo(dtype).eps * float(expected.scores.abs().max())
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=bound)


def test_a_gradient_that_is_no_number_is_refused() -> None:
    model = encoder()
    model.body.blocks[0].register_forward_hook(lambda *inputs: (inputs[-1] * 0).abs().sqrt())  # slope 1/0
    with pytest.raises(ArgumentError, match="scores must be finite; gradient x input gave NaN or infinity"):
        GradientXInput().explain(model, TOKENS)


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (torch.ones(3), LABEL, r"scores must be floats \[B, N\]; got torch.float32 \[3\]"),
        (torch.ones(1, 3, dtype=torch.long), LABEL, r"scores must be floats \[B, N\]; got torch.int64"),
        (torch.ones(2, 3), LABEL, r"target must have one entry, a whole number, for each of 2 .*; got .* \[1\]"),
        ([[1.0, 2.0]], LABEL, r"scores must be floats \[B, N\]; got \[\[1.0, 2.0\]\]"),
        (torch.ones(1, 3), 0, "target must have one entry, a whole number, for each of 1 sequences; got 0"),
        (torch.ones(1, 3), torch.zeros(1), "target must have one entry, a whole number, .*; got torch.float32"),
        (torch.ones(1, 3), torch.ones(1) > 0, "target must have one entry, a whole number, .*; got torch.bool"),
        (torch.tensor([[1.0, torch.inf]]), LABEL, "scores must be finite; mine gave NaN or infinity"),
    ],
)
def test_an_attribution_of_another_form_is_refused(scores: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Attribution(scores, "Nothing.", target, "mine")


def test_random_scores_are_even_and_follow_their_seed() -> None:
    tokens = torch.zeros(100, 100, dtype=torch.long)
    first, again, other = (RandomScores(seed=seed).explain(encoder(), tokens).scores for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # of 10,000 even draws the mean errs by 0.0029, the share below a quarter by 0.0043
    assert abs(first.mean() - 0.5) < 0.015 and abs((first < 0.25).float().mean() - 0.25) < 0.022
