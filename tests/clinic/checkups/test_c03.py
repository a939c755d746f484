"""A model that sees only what is near is found out, and by as much as its window allows; a healthy one is not."""

import copy

import pytest
import torch

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.problems.p03_fixed_context_window.checkup import CHECKUP
from transformer_problems.problems.p03_fixed_context_window.fault import FAULT, with_window


def _examined(subject: Subject, material: Material) -> Examination:
    found = CHECKUP.examine(Visit(subject, material))
    assert isinstance(found, Examination)
    return found


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_what_a_window_hides_is_not_felt(kind: str, request: pytest.FixtureRequest, texts: Material) -> None:
    subject = request.getfixturevalue(kind)
    judge = load_checkups()[3].thresholds["reach_share"].severity
    assert judge(_examined(subject, texts).readings["reach_share"].low) == "ok"
    ill = _examined(FAULT.plant(subject, 0), texts)
    # 128 / 16 = 8 tokens in each of 2 layers reach 2 * 7 = 14 back: within the first of 8 blocks of 15 tokens.
    assert ill.readings["reach_share"].value == 1 / 8
    assert ill.curve is not None
    assert all(share < 1e-5 for _, share in ill.curve.points[1:])
    # A window of 32 reaches 2 * 31 = 62 back, which is into the fifth block.
    wider = _examined(with_window(subject, 32), texts).readings["reach_share"]
    assert wider.value <= 5 / 8
    assert judge(wider.value) != "ok"


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_window_as_wide_as_the_text_changes_nothing(
    kind: str, request: pytest.FixtureRequest, texts: Material
) -> None:
    subject = request.getfixturevalue(kind)
    inputs = Visit(subject, texts).texts(2, 64)
    with torch.no_grad():
        before, after = (one.run(inputs).output for one in (subject, with_window(subject, 64)))
    torch.testing.assert_close(after, before)


def test_what_stands_beyond_the_window_is_counted(encoder: Subject, texts: Material) -> None:
    pages = [page.encode("ascii", "ignore").decode()[:192] for page in texts.texts[:16]]
    cut = tuple(page[:64] if number % 2 else page for number, page in enumerate(pages))
    found = _examined(encoder, Material("own", texts=cut, own=True))  # bytes are tokens: 64 of 256 stand beyond 128
    assert found.readings["unread_share"].value == pytest.approx(0.25)
    assert found.figures["longest_text_tokens"] == 192
    assert "25% of the texts" in found.meaning


def test_remedies_suit_the_kind(causal: Subject, encoder: Subject, texts: Material) -> None:
    assert [remedy.solution for remedy in _examined(encoder, texts).remedies] == ["rag"]
    found = {remedy.solution: remedy for remedy in _examined(causal, texts).remedies}
    assert set(found) == {"rag", "transformer-xl", "external-memory", "mamba"}
    assert found["transformer-xl"].factor == pytest.approx(3)  # 2 layers and the window itself
    assert "384 tokens" in found["transformer-xl"].promise


def test_the_model_is_left_as_it_was(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    found, hooks = _examined(causal, texts), _num_hooks(causal)
    FAULT.plant(causal, 0)
    assert _examined(causal, texts) == found
    assert _num_hooks(causal) == hooks
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())


def _num_hooks(subject: Subject) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in subject.model.modules())


def test_the_distance_told_is_one_that_was_tried(causal: Subject, texts: Material) -> None:
    found = _examined(causal, texts)  # of 128 tokens the last is read, and 8 blocks of 15 before it are changed
    assert "a change 120 tokens away is felt (of 120 tried)" in found.meaning
    assert found.figures["tested_tokens"] == 120


def test_a_window_too_short_to_be_divided_is_no_finding(causal: Subject, texts: Material) -> None:
    short = Subject("short", "causal", copy.deepcopy(causal.model), causal.tokenizer)
    short.config.max_position_embeddings = 8
    found = CHECKUP.examine(Visit(short, texts))
    assert isinstance(found, NotApplicable)
    assert "8 tokens are too few" in found.reason
