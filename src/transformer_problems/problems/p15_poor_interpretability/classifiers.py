"""The models to be explained: small encoders of several depths that tell the class that most planted tokens tell."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.text import TextSplits, sample_windows
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.training import TrainingPlan, train
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p15_poor_interpretability.planted import (
    NUM_CLASSES,
    VOCAB_SIZE,
    Planted,
    blanked,
    plant,
)
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding

NUM_HEADS = 4


@dataclass(frozen=True, slots=True)
class ClassifierPlan:
    """How large the models are and how long they train.

    Args:
        length: Tokens of text in an example, planted ones among them.
    """

    width: int
    length: int
    steps: int
    batch_size: int


def build_classifier(plan: ClassifierPlan, num_layers: int) -> Encoder:
    """An untrained encoder, read at its first token.

    Positions as large as the embeddings are added to them: with none there, norms would hide from gradients times input
    what the first layer reads of other tokens.
    """
    return Encoder(
        VOCAB_SIZE,
        plan.width,
        num_layers,
        lambda: SelfAttention(plan.width, NUM_HEADS, is_causal=False),
        num_outputs=NUM_CLASSES,
        position=SinusoidalEncoding(plan.width),
    )


def examples(text: Tensor, num: int, plan: ClassifierPlan, *names: str | int) -> Planted:
    """Examples of unbroken text, the same for the same names."""
    windows = sample_windows(text, num=num, length=plan.length, generator=generator(0, "text", *names))
    return plant(windows, generator(0, "evidence", *names))


def trained_classifier(
    bench: Bench, plan: ClassifierPlan, num_layers: int, text: TextSplits, progress: Callable[[float], None]
) -> Encoder:
    """The model of a depth and seed, which all arms explain."""
    seed = bench.cell.seed
    recipe = {"problem": 15, "layers": num_layers, "seed": seed, "text": text.source, **asdict(plan)}

    def build() -> nn.Module:
        with seeded(seed, "model", num_layers):
            return build_classifier(plan, num_layers).to(bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "batch", step)
        windows = sample_windows(text.train, num=plan.batch_size, length=plan.length, generator=draws)
        planted = plant(blanked(windows, draws), draws).to(bench.device)
        return nn.functional.cross_entropy(model(planted.tokens)[:, 0], planted.answers)

    def train_all(model: nn.Module, checkpoint: Path) -> None:
        train(model, batch_loss, TrainingPlan(plan.steps, seed=seed), progress=progress, checkpoint=checkpoint)

    return cast("Encoder", bench.models.get(recipe, build, train_all))


def right_answers(model: nn.Module, planted: Planted) -> Tensor:
    """Whether each class is told rightly, 1 or 0, [B]."""
    with torch.no_grad():
        answers: Tensor = model(planted.tokens)[:, 0].argmax(dim=1)
    return (answers == planted.answers).double()
