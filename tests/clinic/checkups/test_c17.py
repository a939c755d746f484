"""A model whose products are computed in pieces is found out by the kernels it launches, counted exactly."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from transformer_problems.catalogue.checkups import load_checkups
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Examination
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.latency import LatencySample
from transformer_problems.lab.meters.roofline import Roofline
from transformer_problems.problems.p17_hardware_inefficiency import checkup
from transformer_problems.problems.p17_hardware_inefficiency.checkup import CHECKUP
from transformer_problems.problems.p17_hardware_inefficiency.fault import FAULT, InPieces


def examined(subject: Subject, material: Material, machine: Roofline | None = None) -> Examination:
    visit = Visit(subject, material)
    visit.__dict__["roofline"] = machine or Roofline(1e10, 1e10)  # measuring one takes seconds, and changes no count
    return CHECKUP.examine(visit)


def kernels(found: Examination) -> float:
    return found.readings["kernels_per_layer"].value


def test_sixteen_pieces_and_joining_them_are_sixteen_kernels_more_a_product(
    causal: Subject, encoder: Subject, vision: Subject, texts: Material, images: Material
) -> None:
    threshold = load_checkups()[17].thresholds["kernels_per_layer"]
    for subject, material in ((causal, texts), (encoder, texts), (vision, images)):
        wide = [m for m in subject.model.modules() if isinstance(m, nn.Linear) and m.out_features >= 16]
        well, ill = examined(subject, material), examined(FAULT.plant(subject, 0), material)
        assert kernels(ill) - kernels(well) == 16 * len(wide) / subject.num_layers
        assert threshold.severity(kernels(well)) == "ok"
        assert threshold.severity(kernels(ill)) != "ok"


def test_pieces_give_the_same_numbers(causal: Subject, texts: Material) -> None:
    """To the rounding of float32 sums in another order."""
    inputs = Visit(causal, texts).texts(2, 16)
    ill = FAULT.plant(causal, 0)
    assert any(isinstance(part, InPieces) for part in ill.model.modules())
    assert not any(isinstance(part, InPieces) for part in causal.model.modules())
    torch.testing.assert_close(ill.run(inputs).output, causal.run(inputs).output, rtol=1e-4, atol=1e-5)


def test_pieces_of_a_layer_whose_weights_lie_the_other_way() -> None:
    x, whole = torch.randn(3, 20), Conv1D(40, 20)  # 40 outputs in pieces of 3, and a last one of 1
    torch.testing.assert_close(InPieces(whole)(x), whole(x), rtol=1e-5, atol=1e-6)


def test_the_share_is_arithmetic_over_time_over_peak(
    causal: Subject, texts: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So fast a machine is given as many inputs as there may be, 64; each pass takes 10 ms on the test's clock."""
    monkeypatch.setattr(checkup, "measure_latency", lambda function, **_: LatencySample((0.01, 0.01)))
    one = Visit(causal, texts).texts(1, 64)
    flops = count_flops(lambda: causal.run(one))
    found = examined(causal, texts, Roofline(1e13, 1e15))
    assert found.readings["roofline_share"].value == pytest.approx(64 * flops / 1e13 / 0.01)
    assert [size for size, _ in found.curve.points] == [8, 16, 32, 64]
    slower = examined(causal, texts, Roofline(flops / 0.02 * 10, 1e15))  # ten inputs keep it busy for 20 ms
    assert [size for size, _ in slower.curve.points] == [1, 2, 5, 10]


def test_attention_that_is_eager_is_told_what_a_fused_one_would_save(causal: Subject, texts: Material) -> None:
    fused = {remedy.solution for remedy in examined(causal, texts).remedies}
    before = causal.config._attn_implementation
    causal.model.set_attn_implementation("eager")
    try:
        eager = {remedy.solution: remedy for remedy in examined(causal, texts).remedies}
    finally:
        causal.model.set_attn_implementation(before)
    assert set(eager) - fused == {"flash-attention", "xformers"}
    assert eager["flash-attention"].factor > 1


def test_a_model_without_linear_layers_cannot_have_the_fault(causal: Subject) -> None:
    with pytest.raises(CombinationError, match="no linear layers"):
        FAULT.plant(causal.with_model(nn.Embedding(8, 32)), 0)


def test_twice_the_same_count_and_the_model_as_it_was(causal: Subject, texts: Material) -> None:
    before = {name: values.clone() for name, values in causal.model.state_dict().items()}
    first, second = examined(causal, texts), examined(causal, texts)
    assert first.readings["kernels_per_layer"] == second.readings["kernels_per_layer"]
    assert all(torch.equal(values, before[name]) for name, values in causal.model.state_dict().items())
    assert not causal.model.training
    assert all(weight.grad is None and weight.requires_grad for weight in causal.model.parameters())
