"""A model that is lost beyond its declared length is found out; one that reads on is not."""

from copy import deepcopy

import pytest
import torch
from transformers import LlamaForCausalLM

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.problems.p09_length_generalization.beyond import losses_beyond, rotary_parts, stretched
from transformer_problems.problems.p09_length_generalization.checkup import CHECKUP
from transformer_problems.problems.p09_length_generalization.fault import FAULT

_DECLARED = 128


def _examined(subject: Subject, material: Material) -> Examination:
    found = CHECKUP.examine(Visit(subject, material))
    assert isinstance(found, Examination)
    return found


def test_a_causal_model_lost_beyond_its_length_is_found_out(causal: Subject, texts: Material) -> None:
    judge = load_checkups()[9].thresholds["beyond_loss"].severity
    healthy, ill = (_examined(one, texts).readings["beyond_loss"] for one in (causal, FAULT.plant(causal, 0)))
    assert judge(healthy.high) == "ok"
    assert judge(ill.low) == "severe"


def test_an_encoder_whose_table_ends_is_found_out(encoder: Subject, texts: Material) -> None:
    thresholds = load_checkups()[9].thresholds
    healthy, ill = (_examined(one, texts).readings for one in (encoder, FAULT.plant(encoder, 0)))
    assert healthy["length_headroom"].value == 2  # 256 rows, 128 of them declared
    assert all(
        thresholds[name].severity(found.high) == "ok" for name, found in healthy.items() if name == "beyond_loss"
    )
    assert ill["length_headroom"].value == 1
    assert thresholds["length_headroom"].severity(1.0) == "mild"
    with pytest.raises(CombinationError, match="no more than its declared length"):
        FAULT.plant(FAULT.plant(encoder, 0), 0)


@torch.no_grad()
def test_losses_are_those_of_plain_passes(causal: Subject, texts: Material) -> None:
    visit = Visit(causal, texts)
    inputs = visit.texts(1, 2 * _DECLARED)
    tokens = inputs["input_ids"][0]
    found = losses_beyond(causal, tokens, _DECLARED)
    whole = causal.losses(inputs)[0].double()
    assert found.places.tolist() == list(range(1, 2 * _DECLARED))
    torch.testing.assert_close(found.read_on, whole, rtol=1e-4, atol=1e-5)
    last = causal.losses({name: values[:, -_DECLARED:] for name, values in inputs.items()})[0].double()
    assert len(found.in_pieces) == _DECLARED
    torch.testing.assert_close(found.in_pieces[_DECLARED // 2 :], last[-_DECLARED // 2 :], rtol=1e-4, atol=1e-5)
    extra = (found.read_on[-_DECLARED:] - found.in_pieces).mean()
    assert found.extra == pytest.approx(float(extra))


@torch.no_grad()
def test_stretched_angles_are_those_of_transformers_and_go_back(causal: Subject, texts: Material) -> None:
    inputs = Visit(causal, texts).texts(1, 64)
    before = [part.clone() for part in rotary_parts(causal)]
    config = deepcopy(causal.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    peer = LlamaForCausalLM(config).eval()
    peer.load_state_dict(causal.model.state_dict())
    with stretched(causal, "linear", 2.0):
        torch.testing.assert_close(causal.run(inputs).output, peer(**inputs).logits)
    with stretched(causal, "ntk", 2.0):
        turned = rotary_parts(causal)[0] / before[0]
        assert float(turned[0]) == 1  # the fastest is kept
        assert float(turned[-1]) == pytest.approx(0.5)  # the slowest is interpolated
    assert all(torch.equal(part, was) for part, was in zip(rotary_parts(causal), before, strict=True))


def test_rope_scaling_is_promised_by_trying_it(causal: Subject, encoder: Subject, texts: Material) -> None:
    ill = _examined(FAULT.plant(causal, 0), texts)
    promises = {remedy.solution: remedy.promise for remedy in ill.remedies}
    assert set(promises) == {"rope-scaling", "alibi", "relative-pe", "length-extrapolation"}
    assert f"of the {ill.readings['beyond_loss'].value:.2f} nats a token" in promises["rope-scaling"]
    assert "rope-scaling" not in {remedy.solution for remedy in _examined(encoder, texts).remedies}


def test_a_bare_encoder_tells_its_end_and_one_without_an_end_nothing(encoder: Subject, texts: Material) -> None:
    assert set(_examined(encoder.body, texts).readings) == {"length_headroom"}
    endless = encoder.body.with_model(deepcopy(encoder.body.model))
    endless.model.embeddings.position_embeddings = torch.nn.Identity()
    found = CHECKUP.examine(Visit(endless, texts))
    assert isinstance(found, NotApplicable)
    assert "predicts no tokens" in found.reason


def test_the_model_is_left_as_it_was(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    FAULT.plant(causal, 0)
    found = _examined(causal, texts)
    assert _examined(causal, texts) == found
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())
