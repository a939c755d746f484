"""The transfer task: a small Vision Transformer that knows the digits 0 to 4 learns 5 to 9, in each arm's way."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer_problems.core.seeding import seeded
from transformer_problems.core.transforms import ModelTransform
from transformer_problems.lab.data.choice import draw_batch
from transformer_problems.lab.data.digits import NUM_CLASSES, SIZE, DigitTasks, Images, load_digit_tasks
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.training import BatchLoss, TrainingPlan, plain_recipe, train
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.adaptation.qlora import QLoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.parameter_sharing import ShareLayers
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.distillation import distillation_loss
from transformer_problems.solutions.training.layer_initialisation import initialise_from_layers
from transformer_problems.solutions.training.transfer import transfer_weights

ADAPTERS: Mapping[str, ModelTransform] = {
    "lora": LoRA(rank=8, alpha=16, targets=("blocks.*",), train=("head.*",)),
    "qlora": QLoRA(rank=8, alpha=16, targets=("blocks.*",), train=("head.*",)),
}
"""The arms that leave the pretrained weights as they are."""

STUDENTS = ("distilled", "small")
"""The arms with half of the layers."""

_PATCH = 2
_HEADS = 4
_OF_ALL, _OF_ADAPTERS = 1e-3, 5e-3  # peak learning rates: of whole models, of the few weights of adapters


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """How large the models are and how long they train."""

    width: int
    num_layers: int
    pretraining_steps: int
    steps: int
    batch_size: int


def build_model(arm: str, width: int, num_layers: int, num_classes: int = NUM_CLASSES) -> VisionTransformer:
    """The arm's untrained model, before adapters or pruning: students are half as deep, shared layers one."""
    model = VisionTransformer(
        PatchEmbedding(width, _PATCH, in_channels=1),
        (SIZE, SIZE),
        max(1, num_layers // 2) if arm in STUDENTS else num_layers,
        lambda: SelfAttention(width, _HEADS, is_causal=False),
        num_classes,
    )
    if arm == "shared":
        shared = ShareLayers()(model)
        assert isinstance(shared, VisionTransformer)
        return shared
    return model


def prepared(arm: str, model: nn.Module) -> nn.Module:
    """A pretrained model as its fine-tuning begins: with adapters, or pruned to half of its heads and neurons."""
    if arm in ADAPTERS:
        return ADAPTERS[arm](model)
    if arm == "pruned":
        return StructuredPruning(heads=0.5, neurons=0.5)(model)
    return model


def fine_tuned(bench: Bench, plan: TransferPlan) -> nn.Module:
    """The arm's model of the digits 5 to 9."""
    arm, tasks = bench.cell.arm, load_digit_tasks()
    if arm == "distilled":
        return _distilled(bench, plan, tasks)
    model = prepared(arm, _started(bench, arm, plan, tasks)).to(bench.device)
    _learn(bench, arm, model, _labelled_loss(bench, tasks.train, plan), plan)
    return model.eval()


@torch.no_grad()
def right_answers(model: nn.Module, device: torch.device) -> list[float]:
    """Whether each test image is told rightly, 1 or 0."""
    tested = load_digit_tasks().test
    right: list[float] = (model(tested.pixels.to(device)).argmax(dim=1).cpu() == tested.classes).double().tolist()
    return right


def _started(bench: Bench, arm: str, plan: TransferPlan, tasks: DigitTasks) -> VisionTransformer:
    """The arm's model with what pretraining on the digits 0 to 4 left, and a new head; arms of one build share it."""
    kind = arm if arm in ("shared", "small") else "full"
    recipe = {"problem": 13, "kind": kind, "seed": bench.cell.seed, **asdict(plan)}

    def build() -> nn.Module:
        with seeded(bench.cell.seed, "pretraining", kind):
            return build_model(kind, plan.width, plan.num_layers).to(bench.device)

    def pretrain(model: nn.Module, checkpoint: Path) -> None:
        loss = _labelled_loss(bench, tasks.source, plan)
        training = TrainingPlan(plan.pretraining_steps, plain_recipe(_OF_ALL), seed=bench.cell.seed)
        train(model, loss, training, checkpoint=checkpoint)

    pretrained = bench.models.get(recipe, build, pretrain)
    with seeded(bench.cell.seed, "head"):
        model = build_model(kind, plan.width, plan.num_layers).to(bench.device)
    transfer_weights(pretrained, model, skip=["head"])
    return model


def _distilled(bench: Bench, plan: TransferPlan, tasks: DigitTasks) -> nn.Module:
    """A student of half the depth that starts with layers of the fine-tuned teacher and learns from its answers."""
    recipe = {"problem": 13, "kind": "teacher", "seed": bench.cell.seed, **asdict(plan)}

    def teach(model: nn.Module, checkpoint: Path) -> None:
        transfer_weights(_started(bench, "full", plan, tasks), model)
        _learn(bench, "full", model, _labelled_loss(bench, tasks.train, plan), plan)

    def build() -> nn.Module:
        return build_model("full", plan.width, plan.num_layers).to(bench.device)

    teacher = bench.models.get(recipe, build, teach)
    student = build_model("distilled", plan.width, plan.num_layers).to(bench.device)
    initialise_from_layers(student, teacher)
    pixels, classes = tasks.train.pixels.to(bench.device), tasks.train.classes.to(bench.device)

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = draw_batch(len(classes), plan.batch_size, bench.cell.seed, step).to(bench.device)
        with torch.no_grad():
            answers = teacher(pixels[chosen])
        return distillation_loss(model(pixels[chosen]), answers, classes[chosen])

    _learn(bench, "distilled", student, loss, plan)
    return student.eval()


def _learn(bench: Bench, arm: str, model: nn.Module, loss: BatchLoss, plan: TransferPlan) -> None:
    rate = _OF_ADAPTERS if arm in ADAPTERS else _OF_ALL
    train(model.train(), loss, TrainingPlan(plan.steps, plain_recipe(rate), seed=bench.cell.seed))


def _labelled_loss(bench: Bench, images: Images, plan: TransferPlan) -> BatchLoss:
    pixels, classes = images.pixels.to(bench.device), images.classes.to(bench.device)

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = draw_batch(len(images), plan.batch_size, bench.cell.seed, step).to(bench.device)
        return nn.functional.cross_entropy(model(pixels[chosen]), classes[chosen])

    return loss


def training_step(model: nn.Module, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Two steps of fine-tuning with AdamW, the first of which makes the optimizer's state; inputs are random."""
    pixels = torch.rand(batch_size, 1, SIZE, SIZE, device=device)
    classes = torch.zeros(batch_size, dtype=torch.long, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def steps() -> None:
        optimizer = torch.optim.AdamW(trained)
        for _ in range(2):
            nn.functional.cross_entropy(model(pixels), classes).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps
