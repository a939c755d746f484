"""What one training step of a small decoder takes, for each way to attend and to keep activations."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from transformer_problems.core.seeding import seeded
from transformer_problems.core.slots import AttentionOp
from transformer_problems.lab.data.text import TextSplits, held_out_windows
from transformer_problems.lab.footprint import AttentionKind, DecoderSize, predict_training_bytes
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.models.decoder import Decoder
from transformer_problems.problems.p07_high_memory_footprint.bill import Bill
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

NUM_HEADS = 4
VOCAB_SIZE = 257
"""The bytes, and 256, which begins a text."""

_COMPARED_LEN = 256  # tokens that gradients are compared on


@dataclass(frozen=True, slots=True)
class Treatment:
    """How an arm trains: the attention op, and the layers in a segment of checkpoints."""

    attention: AttentionKind
    every: int | Literal["sqrt"] | None = None

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self.every is None else checkpoint_layers(model, every=self.every)


TRAINING = {
    "dense": Treatment("dense"),
    "flash": Treatment("flash"),
    "flash_tiled": Treatment("flash_tiled"),
    "checkpoint_sqrt": Treatment("dense", "sqrt"),
    "checkpoint_each": Treatment("dense", 1),
    "memory_efficient": Treatment("memory_efficient"),
}
"""The arms that treat training."""

_OPS: dict[AttentionKind, Callable[[], AttentionOp]] = {
    "dense": DenseAttention,
    "flash": FlashAttention,
    "flash_tiled": lambda: FlashAttention(backend="tiled"),
    "memory_efficient": MemoryEfficientAttention,
}


def training_bill(arm: str, width: int, layers: int, length: int, text: TextSplits, device: torch.device) -> Bill:
    """Bytes of a step on one sequence; the gradients stay between steps, as they do when several add up."""
    model = _model(arm, width, layers, 0, device)
    optimizer = torch.optim.AdamW(model.parameters())
    step = _step(arm, model, optimizer, _tokens(text, length, device))
    step()  # makes the gradients and the optimizer's state
    size = DecoderSize(layers, width, NUM_HEADS, VOCAB_SIZE, rotary=True)
    treatment = TRAINING[arm]
    footprint = predict_training_bytes(
        size, batch_size=1, seq_len=length, attention=treatment.attention, checkpoint_every=treatment.every
    )
    parameters = list(model.parameters())
    return Bill(
        measured={
            "weight": sum(p.nbytes for p in parameters),
            "gradient": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer": sum(x.nbytes for kept in optimizer.state.values() for x in kept.values()),
            "activation": peak_memory_bytes(step, device=device),
        },
        predicted={
            "weight": footprint.weights,
            "gradient": footprint.gradients,
            "optimizer": footprint.optimizer,
            "activation": footprint.activations + footprint.scratch,
        },
    )


def step_seconds(
    arm: str, width: int, layers: int, length: int, text: TextSplits, device: torch.device, repeats: int
) -> tuple[float, ...]:
    """Seconds of a step, one figure a repeat."""
    model = _model(arm, width, layers, 0, device)
    step = _step(arm, model, torch.optim.AdamW(model.parameters()), _tokens(text, length, device))
    return measure_latency(step, device=device, repeats=repeats, warmup=1).times_s


def gradient_difference(arm: str, width: int, layers: int, text: TextSplits, seed: int, device: torch.device) -> float:
    """The largest relative difference of any parameter's gradient from the untreated model's: |g - g0| / |g0|."""
    tokens, gradients = _tokens(text, _COMPARED_LEN, device), []
    for name in (arm, "dense"):
        model = _model(name, width, layers, seed, device)
        with TRAINING[name].applied(model):
            _loss(model, tokens).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    ours, plain = gradients
    return max(float((g - g0).norm() / g0.norm()) for g, g0 in zip(ours, plain, strict=True))


def _model(arm: str, width: int, layers: int, seed: int, device: torch.device) -> Decoder:
    op = _OPS[TRAINING[arm].attention]

    def mixer() -> SelfAttention:
        return SelfAttention(width, NUM_HEADS, op=op(), position=RotaryEmbedding(width // NUM_HEADS))

    with seeded(seed, "model"):
        return Decoder(VOCAB_SIZE, width, layers, mixer).to(device)


def _tokens(text: TextSplits, length: int, device: torch.device) -> Tensor:
    """Real text, and the token after it, [1, length + 1]."""
    return held_out_windows(text.test, num=1, length=length + 1).to(device)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])


def _step(arm: str, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with TRAINING[arm].applied(model):
            _loss(model, tokens).backward()
        optimizer.step()

    return step
