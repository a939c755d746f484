"""A bias reaches the scores of every layer, whatever form the model's mask has, and can be taken out again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.attention_bias import with_attention_bias, without_attention_bias
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import machines_texts
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.core.errors import CombinationError


def _slope(before: Tensor) -> Tensor:
    return torch.tensor([0.5, 0.1, 0.0, -0.1])[:, None, None] * -before.abs()


@pytest.fixture(scope="module", params=[("causal", 0), ("causal", 1), ("causal", 2), ("encoder", 0), ("encoder", 1)])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    kind: Kind
    kind, number = request.param
    return admit(patients(kind, 3)[number], tmp_path_factory.getbasetemp() / "ward")


@torch.no_grad()
def test_the_first_layers_weights_are_those_of_biased_scores(subject: Subject) -> None:
    visit = Visit(subject, machines_texts())
    inputs = visit.padded([visit.texts(1, length)["input_ids"][0] for length in (32, 20)])
    plain, biased = (
        one.run(inputs, attentions=True).attentions[0].double()
        for one in (subject, with_attention_bias(subject, [_slope]))
    )
    places = torch.arange(32)
    expected = plain * _slope(places[:, None] - places).double().exp()
    expected /= expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(biased[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        biased[1, :, :20], expected[1, :, :20], rtol=1e-4, atol=1e-6
    )  # what is padded is not read


@torch.no_grad()
def test_the_fast_path_agrees_and_all_of_it_comes_out_again(subject: Subject) -> None:
    inputs = Visit(subject, machines_texts()).texts(2, 32)
    biased = with_attention_bias(subject, [_slope])
    fast, eager = biased.run(inputs).output, biased.run(inputs, attentions=True).output
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)
    assert not torch.equal(fast, subject.run(inputs).output)
    assert torch.equal(without_attention_bias(biased).run(inputs).output, subject.run(inputs).output)


def test_a_model_without_masks_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CombinationError, match="takes no mask"):
        with_attention_bias(Subject("plain", "encoder", model), [_slope])
