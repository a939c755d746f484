"""Problem 13: every arm measures what is shown, bytes are those known on paper, and nothing tested was learned from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.records import Cell, Measurement
from transformer_problems.lab.data.digits import load_digit_tasks
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.model_cache import ModelCache
from transformer_problems.lab.results import Results
from transformer_problems.problems.p13_large_model_size import experiment as p13
from transformer_problems.problems.p13_large_model_size import transfer
from transformer_problems.problems.p13_large_model_size.transfer import TransferPlan, build_model, prepared
from transformer_problems.solutions.adaptation.lora_linear import LoRALinear
from transformer_problems.solutions.adaptation.qlora import NF4Linear

EXPERIMENT = p13.EXPERIMENT
ARMS = [arm.slug for arm in EXPERIMENT.arms]
PLAN = TransferPlan(16, 2, 2, 2, 4)
CPU = torch.device("cpu")


def bench(arm: str, folder: Path) -> Bench:
    return Bench(Cell(13, arm, "quick", 0), CPU, ModelCache(folder, "test"), lambda done: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(p13._SIZES, "quick", p13._Size((16, 64), PLAN, seeds=1))
        return {arm: list(EXPERIMENT.measure(bench(arm, folder))) for arm in ARMS}


def value(found: list[Measurement], metric: str, x: float | None = 64) -> float:
    (only,) = [m.value for m in found if (m.metric, m.x) == (metric, x)]
    return only


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_measures_all_that_is_shown(arm: str, measured: dict[str, list[Measurement]]) -> None:
    found = {m.metric for m in measured[arm]}
    shown = {column.metric for column in EXPERIMENT.columns} | {EXPERIMENT.chart.metric}
    assert shown <= found
    assert len([m for m in measured[arm] if m.metric == "accuracy"]) == len(load_digit_tasks().test)
    assert {m.x for m in measured[arm] if m.metric == "finetune_peak_bytes"} == {16, 64}


def test_bytes_are_those_known_on_paper(measured: dict[str, list[Measurement]]) -> None:
    parameters = sum(p.numel() for p in build_model("full", 64, 2).parameters())
    assert value(measured["full"], "trainable_parameters") == parameters
    # weights, gradients and two moments of AdamW, and activations on top
    assert 4 * 4 * parameters < value(measured["full"], "finetune_peak_bytes") < 2 * 4 * 4 * parameters
    for arm in ARMS:
        if arm not in ("lora", "qlora"):
            # a file is its weights and a header of some kilobytes
            stored = value(measured[arm], "stored_bytes")
            assert 0 <= stored - 4 * value(measured[arm], "trainable_parameters") < 8192
            assert value(measured[arm], "task_bytes") == stored
    layers = 64 * 64 * 4 + 2 * 64 * 256  # weights of a layer's matrices
    adapters = 2 * 8 * (4 * 128 + 2 * 320)
    head = 64 * 5 + 5
    assert value(measured["lora"], "trainable_parameters") == adapters + head
    assert value(measured["lora"], "task_bytes") == 4 * (adapters + head)
    saved = value(measured["lora"], "stored_bytes") - value(measured["qlora"], "stored_bytes")
    # 32 bits become 4.13, and headers differ by some names
    assert saved == pytest.approx(2 * layers * (32 - 4.13) / 8, rel=0.05)


def test_arms_are_what_they_say() -> None:
    full = build_model("full", 16, 4)
    assert len({id(block) for block in build_model("shared", 16, 4).blocks}) == 1
    assert [len(build_model(arm, 16, 4).blocks) for arm in ("full", "shared", "distilled", "small")] == [4, 4, 2, 2]
    lora, qlora, pruned = (prepared(arm, full) for arm in ("lora", "qlora", "pruned"))
    assert sum(isinstance(part, LoRALinear) for part in lora.modules()) == 4 * 6
    assert sum(isinstance(part, NF4Linear) for part in qlora.modules()) == 4 * 6
    assert pruned.blocks[0].mixer.num_heads == 2
    assert prepared("full", full) is full


def test_only_the_new_digits_training_images_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an arm trains on, no test image and, after pretraining, no digit of the old task is among it."""
    tasks = load_digit_tasks()
    rows = {
        name: {tuple(row) for row in getattr(tasks, name).pixels.flatten(1).tolist()}
        for name in ("source", "train", "test")
    }
    seen: list[set[tuple[float, ...]]] = []

    def look(model: nn.Module, batch_loss, plan, **keywords: object) -> None:
        batches: set[tuple[float, ...]] = set()
        hook = model.register_forward_pre_hook(
            lambda module, arguments: batches.update(tuple(row) for row in arguments[0].flatten(1).tolist())
        )
        for step in range(3):
            loss: Tensor = batch_loss(model, step)
            assert loss.isfinite()
        hook.remove()
        seen.append(batches)

    monkeypatch.setattr(transfer, "train", look)
    for arm in ARMS:
        seen.clear()
        transfer.fine_tuned(bench(arm, tmp_path / arm), PLAN)
        assert seen[0] <= rows["source"]
        assert all(batches <= rows["train"] for batches in seen[1:]) and len(seen) >= 2
        assert not any(batches & rows["test"] for batches in seen)


def test_the_student_starts_with_the_teachers_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "train", lambda *arguments, **keywords: None)
    student = transfer.fine_tuned(bench("distilled", tmp_path), TransferPlan(16, 4, 1, 1, 4))
    full = transfer.fine_tuned(bench("full", tmp_path), TransferPlan(16, 4, 1, 1, 4))
    for mine, theirs in zip(student.blocks, (full.blocks[0], full.blocks[2]), strict=True):
        assert torch.equal(mine.mixer.q_proj.weight, theirs.mixer.q_proj.weight)


def test_the_finding_and_the_notes_name_their_figures(measured: dict[str, list[Measurement]]) -> None:
    results = Results([(Cell(13, arm, "quick", 0), m) for arm, found in measured.items() for m in found])
    stored, peak = value(measured["full"], "stored_bytes"), value(measured["full"], "finetune_peak_bytes")
    finding = EXPERIMENT.finding(results)
    assert f"width 64 takes {stored / 1e6:.1f} MB" in finding and f"{peak / stored:.1f} times" in finding
    assert any(
        f"trained for {p13._SIZES['quick'].plan.pretraining_steps} steps" in note for note in EXPERIMENT.notes(results)
    )
