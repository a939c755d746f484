"""A model whose attention is uniform is found out; on a model made for it, what moves is known."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination
from transformer_problems.problems.p15_poor_interpretability import checkup
from transformer_problems.problems.p15_poor_interpretability.checkup import CHECKUP
from transformer_problems.problems.p15_poor_interpretability.fault import FAULT
from transformer_problems.problems.p15_poor_interpretability.mean_state import MeanState
from transformer_problems.solutions.interpretability.readable import Readable


def severity(found: Examination) -> str:
    value = found.readings["attention_faithfulness"].value
    return load_checkups()[15].thresholds["attention_faithfulness"].severity(value)


def test_uniform_attention_tells_no_more_than_chance(causal: Subject, encoder: Subject, texts: Material) -> None:
    for subject in (causal, encoder):
        assert severity(CHECKUP.examine(Visit(subject, texts))) == "ok"
        ill = CHECKUP.examine(Visit(FAULT.plant(subject, 0), texts))
        assert severity(ill) != "ok"
        assert ill.readings["attention_faithfulness"].low < 1 < ill.readings["attention_faithfulness"].high


def test_the_fault_makes_every_layer_uniform_and_leaves_its_argument(causal: Subject, encoder: Subject) -> None:
    tokens = torch.arange(40, 56)[None]
    for subject in (causal, encoder):
        before = {name: values.clone() for name, values in subject.model.state_dict().items()}
        ill = FAULT.plant(subject, 0)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        visible = torch.ones(16, 16).tril() if subject.kind == "causal" else torch.ones(16, 16)
        uniform = visible / visible.sum(dim=-1, keepdim=True)
        for weights in ill.run(inputs, attentions=True).attentions:
            torch.testing.assert_close(weights, uniform.expand_as(weights))
        assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())


def test_a_model_without_queries_cannot_have_the_fault(causal: Subject) -> None:
    class Other(nn.Module):
        config = causal.config

    with pytest.raises(CombinationError, match="queries of Other cannot be found"):
        FAULT.plant(causal.with_model(Other()), 0)


def test_an_encoder_without_a_head_is_examined_by_its_mean_state(encoder: Subject, texts: Material) -> None:
    bare = encoder.with_model(encoder.model.bert)
    tokens = torch.arange(40, 56)[None]
    state = bare.run({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).output.mean(dim=1)
    torch.testing.assert_close(MeanState(bare, tokens).logits(tokens)[:, 0], state.norm(dim=1))
    assert isinstance(MeanState(bare, tokens), Readable)
    well, ill = (CHECKUP.examine(Visit(subject, texts)) for subject in (bare, FAULT.plant(bare, 0)))
    assert well.readings["attention_faithfulness"].value > ill.readings["attention_faithfulness"].value
    assert all(moved > 0 for _, moved in well.curve.points)


class _Last:
    """Answers 1 if token 7 is there and 0 if not, of two classes, with probability 0.9."""

    vocab_size = 10

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        there = ((tokens == 7) & key_mask).any(dim=1)
        right = torch.where(there[:, None], torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1]))
        return right.log()


def test_the_answer_moves_by_the_probability_that_goes_elsewhere() -> None:
    """From 0.9 to 0.1 moves 0.8, as soon as the token it rests on is among those deleted, and not if it has to stay."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 7, 1, 2, 3, 4]])
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    whole = checkup._answers(_Last(), tokens, torch.ones_like(kept))
    scores = -(torch.arange(10.0)[None] - 6).abs()  # the token after it first, then itself and its other neighbour
    scores[0, 5] += 0.5
    moved = checkup._Trial(_Last(), tokens, kept, whole).moved(scores)
    torch.testing.assert_close(moved, torch.tensor([[0.0], [0.8], [0.8]], dtype=torch.float64), rtol=0, atol=1e-6)
    stays = checkup._Trial(_Last(), tokens, tokens == 7, whole).moved(scores)
    assert float(stays.abs().max()) < 1e-6


def test_random_deletions_come_to_one() -> None:
    moved = torch.rand(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert checkup._ratio(moved[:1], moved[0]).value == pytest.approx(1, rel=1e-12)
    assert checkup._ratio(moved[:1], 3 * moved[0]).value == pytest.approx(3, rel=1e-12)


def test_twice_the_same_and_the_model_as_it_was(causal: Subject, encoder: Subject, texts: Material) -> None:
    for subject in (causal, encoder):
        before = {name: values.clone() for name, values in subject.model.state_dict().items()}
        implementation = subject.config._attn_implementation
        first, second = (CHECKUP.examine(Visit(subject, texts)) for _ in range(2))
        assert first.readings == second.readings
        assert first.figures == second.figures
        assert subject.config._attn_implementation == implementation
        assert not subject.model.training
        assert all(weight.grad is None and weight.requires_grad for weight in subject.model.parameters())
        assert not subject.model.get_input_embeddings()._forward_hooks
        assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())
