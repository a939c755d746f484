"""What a model takes to store and to fine-tune for one more task, and what each solution leaves of it."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.core.treated_files import save_treated
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.lab.results import Results
from transformer_problems.problems.p13_large_model_size.transfer import (
    ADAPTERS,
    TransferPlan,
    build_model,
    fine_tuned,
    prepared,
    right_answers,
    training_step,
)

_MEASURED_BATCH = 8  # images in the step whose memory is measured


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here.

    Args:
        widths: Of the models whose memory and files are measured; nothing is trained for that.
    """

    widths: tuple[int, ...]
    plan: TransferPlan
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((64, 128), TransferPlan(48, 4, 80, 80, 32), seeds=1),
    "standard": _Size((64, 128, 256, 512), TransferPlan(128, 6, 400, 400, 32), seeds=3),
    "full": _Size((128, 256, 512, 1024), TransferPlan(256, 12, 2_000, 2_000, 64), seeds=5),
}


class LargeModelSize:
    """A Vision Transformer that knows five digits learns the other five: all of its weights, or fewer."""

    problem = 13
    arms = (
        Arm("full", "Full fine-tuning"),
        Arm("lora", "LoRA, rank 8", "lora", lead=True),
        Arm("qlora", "QLoRA, NF4, rank 8", "qlora", lead=True),
        Arm("shared", "One shared layer", "parameter-sharing", lead=True),
        Arm("pruned", "Half the heads and neurons", "pruning", lead=True),
        Arm("distilled", "Distilled, half the layers", "distillation", lead=True),
        Arm("small", "half the layers, no teacher"),
    )
    chart = Chart(
        metric="finetune_peak_bytes",
        problem_title="Fine-tuning all weights",
        solutions_title="The same task with each solution",
        x_label="model width",
        y_label="peak bytes while fine-tuning",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("full", "lora", "qlora", "shared", "pruned"),
    )
    columns = (
        Column("stored_bytes", "bytes on disk, widest model", at="last", better="lower"),
        Column("task_bytes", "for each further task", at="last", better="lower"),
        Column("finetune_peak_bytes", "peak bytes fine-tuning", at="last", better="lower"),
        Column("trainable_parameters", "weights trained", at="last", better="lower"),
        Column("accuracy", "right answers", better="higher"),
    )
    gains = (
        Effect(
            "finetune_peak_bytes",
            "ratio",
            ("less memory to fine-tune", "more memory to fine-tune"),
            "last",
            "at width {x:,.0f}",
        ),
        Effect("stored_bytes", "ratio", ("fewer bytes stored", "more bytes stored"), "last", "at width {x:,.0f}"),
    )
    costs = (
        Effect("accuracy", "difference", ("points fewer right answers", "points more right answers"), scale=100),
        Effect("stored_bytes", "ratio", ("fewer bytes stored", "more bytes stored"), "last"),
    )
    shared_examples = frozenset({"accuracy"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        for i, width in enumerate(size.widths):
            for metric, unit, value in _bill(arm, width, size.plan.num_layers, bench.device):
                yield Measurement(metric, unit, value, x=width, x_unit="channels")
            bench.progress(0.3 * (i + 1) / len(size.widths))
        model = fine_tuned(bench, size.plan)
        for repeat, right in enumerate(right_answers(model, bench.device)):
            yield Measurement("accuracy", "1", right, repeat=repeat)

    def finding(self, results: Results) -> str:
        widest = max(results.xs("full", "stored_bytes"))
        stored, peak, accuracy = (
            results.samples("full", *key)
            for key in (("stored_bytes", widest), ("finetune_peak_bytes", widest), ("accuracy",))
        )
        assert stored is not None
        assert peak is not None
        assert accuracy is not None
        return (
            f"A model of width {widest:.0f} takes {stored.mean() / 1e6:.1f} MB to store for every task, and "
            f"{peak.mean() / stored.mean():.1f} times that at once to fine-tune; trained on the smaller scale of this "
            f"experiment it tells {accuracy.mean():.0%} of the new digits rightly."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        plan = _SIZES[results.scale].plan
        return (
            f"Bytes are those of models of each width, {plan.num_layers} layers deep, that were not trained: weights "
            f"and what two steps of AdamW on {_MEASURED_BATCH} images allocate beside them. Accuracy is that of models "
            f"of width {plan.width}, trained for {plan.pretraining_steps} steps on the digits 0 to 4 and "
            f"{plan.steps} on 5 to 9, tested on 300 other images of 5 to 9.",
            "Adapters sit beside every matrix of the layers and the head learns with them, at five times the learning "
            "rate of whole models; both rates were fixed before any run. The shared layer is shared from the beginning "
            "of pretraining, at the same width, and is asked to do the work of all.",
            "What a student takes to fine-tune is without its teacher, a full model that runs beside it. Its size is "
            "that of half the layers, whoever taught it; what the teacher, fine-tuned before, adds shows against the "
            "same model without one.",
            "Bytes on disk are files. What each further task adds is the adapters and the head where the rest can be "
            "kept once, and the whole file elsewhere.",
        )


def _bill(arm: str, width: int, num_layers: int, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """Bytes and weights of an untrained model of a width."""
    with seeded(0, "bill"):
        model = prepared(arm, build_model(arm, width, num_layers)).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        on_disk = save_treated(model, Path(folder) / "model.safetensors")
    yield "stored_bytes", "B", on_disk
    yield "task_bytes", "B", sum(p.nbytes for p in trained) if arm in ADAPTERS else on_disk
    yield "trainable_parameters", "1", sum(p.numel() for p in trained)
    yield "finetune_peak_bytes", "B", _peak(model, device)


def _peak(model: nn.Module, device: torch.device) -> int:
    return stored_bytes(model) + peak_memory_bytes(training_step(model, _MEASURED_BATCH, device), device=device)


EXPERIMENT = LargeModelSize()
