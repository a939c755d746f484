"""A model that takes padding for text is found out; one that is given a mask and heeds it is not moved."""

from dataclasses import replace

import pytest
import torch

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.attention_bias import with_attention_bias
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.problems.p14_noise_sensitivity.checkup import CHECKUP
from transformer_problems.problems.p14_noise_sensitivity.fault import FAULT
from transformer_problems.problems.p14_noise_sensitivity.surroundings import excerpts


def _examined(subject: Subject, material: Material) -> Examination:
    found = CHECKUP.examine(Visit(subject, material))
    assert isinstance(found, Examination)
    return found


@pytest.fixture(params=["causal", "encoder"])
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(request.param)
    return found


def test_a_model_that_ignores_its_mask_is_found_out(subject: Subject, texts: Material) -> None:
    thresholds = load_checkups()[14].thresholds
    healthy, ill = (_examined(one, texts).readings for one in (subject, FAULT.plant(subject, 0)))
    assert healthy["padding_change"].high < 1e-5  # float32, 2 layers
    assert all(thresholds[name].severity(found.value) == "ok" for name, found in healthy.items())
    assert thresholds["padding_change"].severity(ill["padding_change"].low) != "ok"
    assert ill["distractor_share"] == healthy["distractor_share"]  # where nothing is padded, the fault does nothing


def test_tokens_that_see_only_themselves_are_moved_by_nothing(subject: Subject, texts: Material) -> None:
    alone = [lambda before: torch.zeros(before.shape).masked_fill(before != 0, -torch.inf)]
    found = _examined(with_attention_bias(subject, alone), texts)
    assert found.readings["distractor_share"].high < 1e-5
    assert found.figures["attention_on_noise_percent"] == 0


def test_texts_stand_where_they_are_said_to(subject: Subject, texts: Material) -> None:
    drawn = excerpts(Visit(subject, texts), 4, 16)
    noise = drawn.bodies.roll(1, dims=0)
    for given in (drawn.alone(), drawn.padded(5), drawn.among(noise)):
        own = slice(given.first, given.first + 16)
        assert torch.equal(given.inputs["input_ids"][:, own], drawn.bodies)
        assert bool(given.inputs["attention_mask"][:, own].all())
    padded = drawn.padded(5).inputs
    assert int((padded["attention_mask"] == 0).sum()) == 4 * 5
    if subject.kind == "causal":  # which counts places from the text's first token on
        assert padded["position_ids"][0, 5:].tolist() == list(range(16))


def test_excerpts_are_of_other_places(subject: Subject, texts: Material) -> None:
    own, other = excerpts(Visit(subject, texts), 16, 32).bodies.chunk(2)
    for shift in range(4):  # neither the same text nor the same one begun a little later
        same = (own[:, shift:] == other[:, : 32 - shift]).double().mean(dim=1)
        assert float(same.max()) < 0.6


def test_padding_of_the_users_texts_is_counted(encoder: Subject, texts: Material) -> None:
    pages = [page.encode("ascii", "ignore").decode() for page in texts.texts[:16]]
    own = replace(texts, texts=tuple(page[: 120 if number % 2 else 40] for number, page in enumerate(pages)), own=True)
    found = _examined(encoder, own)
    assert found.figures["padding_in_a_batch_percent"] == pytest.approx(100 * (1 - 80 / 120), rel=1e-5)
    assert "padding_in_a_batch_percent" not in _examined(encoder, texts).figures


def test_all_solutions_are_named_and_one_text_again_and_again_tells_nothing(subject: Subject, texts: Material) -> None:
    named = {remedy.solution for remedy in _examined(subject, texts).remedies}
    assert named == {"attention-masking", "token-pruning", "sparse-attention", "gating-mechanisms"}
    assert isinstance(CHECKUP.examine(Visit(subject, Material("a", texts=("a" * 9_000,)))), NotApplicable)


def test_images_have_no_padding(vision: Subject) -> None:
    with pytest.raises(CombinationError, match="no mask of padding"):
        FAULT.plant(vision, 0)


def test_the_model_is_left_as_it_was(subject: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in subject.model.state_dict().items()}
    found, attention = _examined(subject, texts), subject.config._attn_implementation
    FAULT.plant(subject, 0)
    assert _examined(subject, texts) == found
    assert subject.config._attn_implementation == attention
    assert all(torch.equal(values, before[name]) for name, values in subject.model.state_dict().items())
