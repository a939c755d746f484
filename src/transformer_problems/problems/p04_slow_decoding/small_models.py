"""The small models that decode problem 4's text too: trained on labels, by a teacher, or to fill gaps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import BundledName, load_bundled
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.text import TextSplits, sample_windows
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN
from transformer_problems.lab.training import BatchLoss, TrainingPlan, train
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.decoding.generate import generate
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.distillation import IGNORED, distillation_loss, sequence_level_batch

CONTEXT = 256
"""Tokens that the bundled models, and these, are trained on at once."""

Lesson = Literal["labels", "teacher", "teacher's texts", "gaps"]
"""What a small model learns from; all see as many windows of as many tokens."""

_OPENING = 32  # real tokens before each text that the teacher writes


@dataclass(frozen=True, slots=True)
class Budget:
    """How long each small model is trained.

    Args:
        batch_size: Windows a step.
        num_texts: Texts that the teacher writes; students of its texts draw from these.
    """

    steps: int
    batch_size: int
    num_texts: int


def bundled_model(name: BundledName, device: torch.device) -> LlamaDecoder:
    """A bundled model; in float32, whose rounding hardly ever decides between two tokens."""
    return load_bundled(name, dtype=torch.float32, device=device)


def small_model(bench: Bench, lesson: Lesson, budget: Budget, text: TextSplits) -> nn.Module:
    """A model of the bundled draft's shape, trained here: a decoder, or an encoder for gaps."""
    seed, device = bench.cell.seed, bench.device
    config = bundled_model("draft", device).config
    recipe = {"problem": 4, "lesson": lesson, "seed": seed, "text": text.source, **asdict(budget)}

    def build() -> nn.Module:
        with seeded(seed, "model"):
            return (_encoder(config) if lesson == "gaps" else LlamaDecoder(config)).to(device)

    def train_small(model: nn.Module, checkpoint: Path) -> None:
        loss = _LOSSES[lesson](text.train, budget, seed, device)
        plan = TrainingPlan(steps=budget.steps)
        train(model, loss, plan, progress=lambda done: bench.progress(0.5 * done), checkpoint=checkpoint)

    return bench.models.get(recipe, build, train_small)


def _encoder(config: LlamaConfig) -> Encoder:
    """A masked model with the layers, width and heads of a decoder."""

    def mixer() -> SelfAttention:
        position = RotaryEmbedding(config.embed_dim // config.num_heads)
        return SelfAttention(config.embed_dim, config.num_heads, position=position, is_causal=False)

    return Encoder(config.vocab_size, config.embed_dim, config.num_layers, mixer)


def _windows(data: Tensor, budget: Budget, length: int, seed: int, step: int) -> tuple[Tensor, torch.Generator]:
    draws = generator(seed, "batch", step)
    return sample_windows(data, num=budget.batch_size, length=length, generator=draws), draws


def _label_loss(data: Tensor, budget: Budget, seed: int, device: torch.device) -> BatchLoss:
    def loss(model: nn.Module, step: int) -> Tensor:
        windows = _windows(data, budget, CONTEXT + 1, seed, step)[0].to(device)
        return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    return loss


def _distilled_loss(data: Tensor, budget: Budget, seed: int, device: torch.device) -> BatchLoss:
    teacher = bundled_model("base", device)

    def loss(model: nn.Module, step: int) -> Tensor:
        windows = _windows(data, budget, CONTEXT + 1, seed, step)[0].to(device)
        with torch.no_grad():
            taught = teacher(windows[:, :-1])
        return distillation_loss(model(windows[:, :-1]), taught, windows[:, 1:])

    return loss


def _sequence_loss(data: Tensor, budget: Budget, seed: int, device: torch.device) -> BatchLoss:
    """Texts drawn from the teacher: translations have one likely form, which a beam finds; open text has many."""
    teacher, draws = bundled_model("base", device), generator(seed, "teacher")
    openings = sample_windows(data, num=budget.num_texts, length=_OPENING, generator=draws).to(device)

    def continued(prompts: Tensor) -> Tensor:
        return generate(teacher, prompts, CONTEXT + 1 - _OPENING, temperature=1.0, generator=draws).tokens

    batches = [sequence_level_batch(continued, part) for part in openings.split(64)]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = torch.randint(len(inputs), (budget.batch_size,), generator=generator(seed, "batch", step)).to(device)
        return nn.functional.cross_entropy(
            model(inputs[chosen]).flatten(0, 1), targets[chosen].flatten(), ignore_index=IGNORED
        )

    return loss


def _masked_loss(data: Tensor, budget: Budget, seed: int, device: torch.device) -> BatchLoss:
    """The last 1 to N/2 tokens of a window are to be found, any share of them hidden, the last one always."""

    def loss(model: nn.Module, step: int) -> Tensor:
        windows, draws = _windows(data, budget, CONTEXT, seed, step)
        num_open = torch.randint(1, CONTEXT // 2 + 1, (budget.batch_size, 1), generator=draws)
        share = torch.rand(budget.batch_size, 1, generator=draws)
        hidden = torch.arange(CONTEXT) >= CONTEXT - num_open
        hidden &= torch.rand(windows.shape, generator=draws) < share
        hidden[:, -1] = True
        windows, hidden = windows.to(device), hidden.to(device)
        logits = model(windows.masked_fill(hidden, MASK_TOKEN))
        return nn.functional.cross_entropy(logits[hidden], windows[hidden])

    return loss


_LOSSES: dict[Lesson, Callable[[Tensor, Budget, int, torch.device], BatchLoss]] = {
    "labels": _label_loss,
    "teacher": _distilled_loss,
    "teacher's texts": _sequence_loss,
    "gaps": _masked_loss,
}
