"""Neurons and heads that give nothing are found and priced, and padding is counted as it is paid for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.lengths import arithmetic_by_length
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.ward import admit, patients
from transformer_problems.problems.p08_high_compute_cost.blocks import blocks_of, products_of
from transformer_problems.problems.p08_high_compute_cost.checkup import CHECKUP, fixed_padding
from transformer_problems.problems.p08_high_compute_cost.fault import FAULT


def idle_share(subject: Subject, material: Material) -> float:
    return CHECKUP.examine(Visit(subject, material)).readings["idle_share"].value


def test_half_a_model_that_is_idle_is_found_out(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    for subject, material in ((causal, texts), (encoder, texts), (vision, images)):
        assert idle_share(subject, material) < 0.01
        assert idle_share(FAULT.plant(subject, 0), material) > 0.3


def test_the_price_is_half_of_the_layers_weights(causal: Subject, texts: Material) -> None:
    config = causal.config
    layers = config.num_hidden_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    assert idle_share(FAULT.plant(causal, 0), texts) == pytest.approx(layers / 2 / (layers + head), rel=1e-12)


def test_layers_of_every_form_are_told_apart(ward_cache: Path, texts: Material, images: Material) -> None:
    for kind in ("causal", "encoder", "image"):
        for patient in patients(kind, 3):
            subject = admit(patient, ward_cache)
            visit = Visit(subject, images if kind == "image" else texts)
            blocks = blocks_of(subject, products_of(subject, visit.inputs(1, 16)))
            heads = [2, 2, 4, 4] if patient.form == "swin" else [4] * patient.num_layers
            assert [block.num_heads for block in blocks] == heads
            for block in blocks:
                width = block.attention[-1].matrix.shape[0]
                assert block.feed_forward[-1].matrix.shape[0] == block.feed_forward[0].matrix.shape[1] == width


def test_padding_is_what_the_longer_texts_of_a_batch_cost_the_shorter(encoder: Subject) -> None:
    own = Material("own", texts=("a" * 100, *["b" * 20] * 7) * 8, own=True)  # a token is a byte
    growth = arithmetic_by_length(Visit(encoder, own))
    found = CHECKUP.examine(Visit(encoder, own))
    needed, spent = growth.at(100) + 7 * growth.at(20), 8 * growth.at(100)
    assert found.readings["padding_share"].value == pytest.approx(1 - needed / spent, rel=1e-12)
    equal = Material("own", texts=("a" * 50,) * 32, own=True)
    assert CHECKUP.examine(Visit(encoder, equal)).readings["padding_share"].value == pytest.approx(0, abs=1e-12)


def test_texts_that_are_not_the_users_tell_nothing_of_padding(encoder: Subject, texts: Material) -> None:
    assert "padding_share" not in CHECKUP.examine(Visit(encoder, texts)).readings


def test_a_fixed_length_is_read_from_the_tokenizers_file(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(name_or_path=str(tmp_path))
    assert fixed_padding(tokenizer) is None
    for padding, told in (({"strategy": {"Fixed": 128}}, 128), ({"strategy": "BatchLongest"}, None), (None, None)):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"padding": padding}))
        assert fixed_padding(tokenizer) == told


def test_the_model_is_left_as_it_was(encoder: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in encoder.model.state_dict().items()}
    encoder.model.train()
    first, second = (CHECKUP.examine(Visit(encoder, texts)).readings for _ in range(2))
    FAULT.plant(encoder, 0)
    assert first == second and encoder.model.training
    encoder.model.eval()
    assert all(torch.equal(values, before[name]) for name, values in encoder.model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in encoder.model.modules())
