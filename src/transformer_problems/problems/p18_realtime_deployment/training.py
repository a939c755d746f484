"""How the contestants are trained, on real digits drawn larger."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer_problems.core.seeding import seeded
from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.data.digits import Images, load_digit_images
from transformer_problems.lab.data.upscaled_digits import upscaled
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.training import BatchLoss, TrainingPlan, plain_recipe, train
from transformer_problems.problems.p18_realtime_deployment.forms import SIDE, ImagePlan, build_model, treatment
from transformer_problems.solutions.training.distillation import distillation_loss
from transformer_problems.solutions.training.layer_initialisation import initialise_from_layers

_CALIBRATION = 64  # images


def served_model(bench: Bench, plan: ImagePlan) -> nn.Module:
    """The arm's model, trained and treated, as PyTorch runs it; of the exported arms what is exported."""
    arm = bench.cell.arm
    if arm == "pruned":
        return _pruned(bench, plan)
    makers = {"distilled": _distilled, "edge": _mobile}
    model = makers.get(arm, finished)(bench, plan)
    done = treatment(arm, [_calibration_images().to(bench.device)])
    return model if done is None else done(model).eval()


def finished(bench: Bench, plan: ImagePlan) -> nn.Module:
    """The model whose forms are compared, with all of its training."""

    def finish(model: nn.Module, checkpoint: Path) -> None:
        model.load_state_dict(_started(bench, plan).state_dict())
        _learn(bench, model, _labelled_loss(bench, plan, "finishing"), plan.finishing_steps, checkpoint)

    return bench.models.get(
        _recipe(bench, "finished", plan), lambda: build_model("eager", plan).to(bench.device), finish
    )


def asked_images() -> Images:
    """What every arm is asked."""
    return upscaled(load_digit_images()[1], SIDE)


def _calibration_images() -> Tensor:
    """Training images, [n, 1, 32, 32]."""
    return upscaled(load_digit_images()[0].take(torch.arange(_CALIBRATION)), SIDE).pixels


def _started(bench: Bench, plan: ImagePlan) -> nn.Module:
    """The model before its finishing steps."""

    def build() -> nn.Module:
        with seeded(bench.cell.seed, "model"):
            return build_model("eager", plan).to(bench.device)

    def learn(model: nn.Module, checkpoint: Path) -> None:
        _learn(bench, model, _labelled_loss(bench, plan, "learning"), plan.steps, checkpoint)

    return bench.models.get(_recipe(bench, "started", plan), build, learn)


def _pruned(bench: Bench, plan: ImagePlan) -> nn.Module:
    """The model, pruned before its finishing steps."""
    pruning = treatment("pruned")
    assert pruning is not None

    def build() -> nn.Module:
        return pruning(build_model("pruned", plan).to(bench.device))

    def finish(model: nn.Module, checkpoint: Path) -> None:
        model.load_state_dict(pruning(_started(bench, plan)).state_dict())
        _learn(bench, model, _labelled_loss(bench, plan, "finishing"), plan.finishing_steps, checkpoint)

    return bench.models.get(_recipe(bench, "pruned", plan), build, finish)


def _distilled(bench: Bench, plan: ImagePlan) -> nn.Module:
    """A student of half the depth that starts with layers of its teacher and learns from its answers."""
    known = _known(bench)

    def teach(student: nn.Module, checkpoint: Path) -> None:
        teacher = finished(bench, plan)
        initialise_from_layers(student, teacher)

        def loss(model: nn.Module, step: int) -> Tensor:
            pixels, classes = _batch(bench, plan, known, "finishing", step)
            with torch.no_grad():
                answers = teacher(pixels)
            return distillation_loss(model(pixels), answers, classes)

        _learn(bench, student, loss, plan.finishing_steps, checkpoint)

    return bench.models.get(
        _recipe(bench, "distilled", plan), lambda: build_model("distilled", plan).to(bench.device), teach
    )


def _mobile(bench: Bench, plan: ImagePlan) -> nn.Module:
    """Another architecture, trained from its start for as many steps as all training of the baseline."""

    def build() -> nn.Module:
        with seeded(bench.cell.seed, "model"):
            return build_model("edge", plan).to(bench.device)

    def learn(model: nn.Module, checkpoint: Path) -> None:
        steps = plan.steps + plan.finishing_steps
        _learn(bench, model, _labelled_loss(bench, plan, "learning"), steps, checkpoint)

    return bench.models.get(_recipe(bench, "edge", plan), build, learn)


def _recipe(bench: Bench, stage: str, plan: ImagePlan) -> dict[str, object]:
    return {"problem": 18, "stage": stage, "seed": bench.cell.seed, **asdict(plan)}


def _known(bench: Bench) -> Images:
    images = upscaled(load_digit_images()[0], SIDE)
    return Images(images.pixels.to(bench.device), images.classes.to(bench.device))


def _batch(bench: Bench, plan: ImagePlan, known: Images, stage: str, step: int) -> tuple[Tensor, Tensor]:
    offset = plan.steps if stage == "finishing" else 0
    chosen = draw_batch(len(known), plan.batch_size, bench.cell.seed, offset + step).to(bench.device)
    return known.pixels[chosen], known.classes[chosen]


def _labelled_loss(bench: Bench, plan: ImagePlan, stage: str) -> BatchLoss:
    known = _known(bench)

    def loss(model: nn.Module, step: int) -> Tensor:
        pixels, classes = _batch(bench, plan, known, stage, step)
        return nn.functional.cross_entropy(model(pixels), classes)

    return loss


def _learn(bench: Bench, model: nn.Module, loss: BatchLoss, steps: int, checkpoint: Path | None = None) -> None:
    train(model.train(), loss, TrainingPlan(steps, plain_recipe(1e-3), seed=bench.cell.seed), checkpoint=checkpoint)
