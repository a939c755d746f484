"""The contestants: encoders that fill in masked bytes of text, as they are, made cheaper, or cheap from the start."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.transforms import Chain, ModelTransform
from transformer_problems.lab.data.text import held_out_windows, load_text, sample_windows
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN, mask_bytes, masked_bits_per_byte
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.block import FeedForward, TransformerBlock
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.stack import TransformerLayers
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.gptq import GPTQ
from transformer_problems.solutions.compression.int4 import QuantizeInt4
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.movement_pruning import MovementPruning
from transformer_problems.solutions.compression.smooth_quant import SmoothQuant
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.compression.wanda import Wanda
from transformer_problems.solutions.deployment.compiled import CompileGraph
from transformer_problems.solutions.deployment.fused_feed_forward import FuseFeedForward
from transformer_problems.solutions.deployment.fused_projections import FuseProjections
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.tokens.bottleneck import BottleneckBlock
from transformer_problems.solutions.tokens.long_short import LongShortAttention
from transformer_problems.solutions.tokens.trigram_embedding import TrigramEmbedding
from transformer_problems.solutions.training.recipe import Regulator

WINDOW = 125  # bytes, so that eight windows are the 1,000 tokens that costs are told for
_HEAD_DIM = 32
_VOCAB = MASK_TOKEN + 1
_PRUNED = 0.5  # share of the weights, or of the heads and neurons
_GROUP = 32  # weights that share a scale at four bits
_CALIBRATION = 16  # windows of training text

CHEAP_FROM_THE_START = ("mobilebert", "lite")


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How deep the models are and how long they train; pruned ones are pruned before the finishing steps."""

    num_layers: int
    steps: int
    finishing_steps: int
    batch_size: int  # windows a step
    num_tested: int  # windows


def build_model(arm: str, width: int, num_layers: int) -> Encoder:
    """The arm's untrained model: a plain encoder, or one of the two that are cheap from the start."""

    def mixer(embed_dim: int = width) -> SelfAttention:
        position = RotaryEmbedding(_HEAD_DIM)
        return SelfAttention(embed_dim, embed_dim // _HEAD_DIM, op=FlashAttention(), is_causal=False, position=position)

    if arm == "mobilebert":
        model = Encoder(
            _VOCAB, width, num_layers, mixer, position=SinusoidalEncoding(width)
        )  # its blocks rotate nothing
        cast("Any", model.body).embedding = TrigramEmbedding(_VOCAB, width, width // 4)
        narrow = partial(BottleneckBlock, width, width // 4, num_heads=4, op=FlashAttention(), norm=nn.LayerNorm)
        model.body.blocks = TransformerLayers(narrow() for _ in range(num_layers))
        return model
    model = Encoder(_VOCAB, width, num_layers, mixer)
    if arm == "lite":
        flat = partial(FeedForward, expansion=1)
        halves = (LongShortAttention(width, mixer(width // 2), kernel_size=15) for _ in range(num_layers))
        model.body.blocks = TransformerLayers(TransformerBlock(width, half, feed_forward=flat) for half in halves)
    return model


def cheap_model(bench: Bench, width: int, plan: TextPlan) -> nn.Module:
    """The arm's model as it is asked, trained and treated."""
    arm = bench.cell.arm
    if arm in CHEAP_FROM_THE_START:
        return _trained(bench, arm, width, plan)
    if arm in ("structured", "magnitude", "movement"):
        return _pruned(bench, width, plan)
    model = _trained(bench, "plain", width, plan)
    return model if arm == "float32" else _treatment(arm, bench)(model).eval()


@torch.no_grad()
def masked_bits(model: nn.Module, num: int, device: torch.device) -> list[float]:
    """Bits per masked byte of held-out text, one figure a window."""
    windows, draws = held_out_windows(load_text().test, num=num, length=WINDOW), generator(0, "held out")
    found: list[float] = []
    for some in windows.split(8):  # as many as costs are measured with, so that nothing is compiled twice
        hidden, chosen = mask_bytes(some, draws)
        found += masked_bits_per_byte(model(hidden.to(device)).cpu(), some, chosen).tolist()
    return found


def thousand_tokens(device: torch.device) -> Tensor:
    """Eight windows of held-out text, [8, 125]."""
    return held_out_windows(load_text().test, num=8, length=WINDOW).to(device)


def _treatment(arm: str, bench: Bench) -> ModelTransform:
    texts = sample_windows(load_text().train, num=_CALIBRATION, length=WINDOW, generator=generator(0, "calibration"))
    inputs = [texts.to(bench.device)]
    makers: dict[str, Callable[[], ModelTransform]] = {
        "int8": QuantizeInt8,
        "smooth_int8": lambda: Chain(SmoothQuant(inputs), QuantizeInt8()),
        "int4": lambda: QuantizeInt4(group_size=_GROUP),
        "gptq": lambda: GPTQ(inputs, group_size=_GROUP),
        "wanda": lambda: Wanda(inputs, _PRUNED),
        "fused": lambda: Chain(FuseProjections(), FuseFeedForward()),
        "compiled": lambda: CompileGraph(dynamic=False),
    }
    return makers[arm]()


def _started(bench: Bench, kind: str, width: int, plan: TextPlan) -> nn.Module:
    """The model before its finishing steps; arms of one kind share it."""

    def build() -> nn.Module:
        with seeded(bench.cell.seed, "model", kind):
            return build_model(kind, width, plan.num_layers).to(bench.device)

    def learn(model: nn.Module, checkpoint: Path) -> None:
        _learn(bench, model, plan, plan.steps, "learning", checkpoint=checkpoint)

    return bench.models.get(_recipe(bench, "started", kind, width, plan), build, learn)


def _trained(bench: Bench, kind: str, width: int, plan: TextPlan) -> nn.Module:
    """The model after its finishing steps."""

    def finish(model: nn.Module, checkpoint: Path) -> None:
        model.load_state_dict(_started(bench, kind, width, plan).state_dict())
        _learn(bench, model, plan, plan.finishing_steps, "finishing", checkpoint=checkpoint)

    def build() -> nn.Module:
        return build_model(kind, width, plan.num_layers).to(bench.device)

    return bench.models.get(_recipe(bench, "finished", kind, width, plan), build, finish)


def _pruned(bench: Bench, width: int, plan: TextPlan) -> nn.Module:
    """The plain model, pruned before its finishing steps, or by movement within them."""
    arm, movement = bench.cell.arm, MovementPruning(_PRUNED)
    prunings: dict[str, ModelTransform] = {
        "structured": StructuredPruning(heads=_PRUNED, neurons=_PRUNED),
        "magnitude": MagnitudePruning(_PRUNED),
        "movement": movement,
    }
    regulators = (movement.regulate,) if arm == "movement" else ()

    def build() -> nn.Module:
        return prunings[arm](build_model("plain", width, plan.num_layers).to(bench.device))

    def finish(model: nn.Module, checkpoint: Path) -> None:
        model.load_state_dict(prunings[arm](_started(bench, "plain", width, plan)).state_dict())
        _learn(bench, model, plan, plan.finishing_steps, "finishing", regulators, checkpoint=checkpoint)

    pruned = bench.models.get(_recipe(bench, "finished", arm, width, plan), build, finish)
    return movement.finish(pruned).eval() if arm == "movement" else pruned


def _recipe(bench: Bench, stage: str, kind: str, width: int, plan: TextPlan) -> dict[str, object]:
    return {"problem": 8, "stage": stage, "kind": kind, "width": width, "seed": bench.cell.seed, **asdict(plan)}


def _learn(
    bench: Bench,
    model: nn.Module,
    plan: TextPlan,
    steps: int,
    stage: str,
    regulators: tuple[Regulator, ...] = (),
    *,
    checkpoint: Path | None = None,
) -> None:
    """Train in place to fill in masked bytes; all models see the same text."""
    seed, text = bench.cell.seed, load_text().train

    def loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, stage, step)
        windows = sample_windows(text, num=plan.batch_size, length=WINDOW, generator=draws)
        hidden, chosen = mask_bytes(windows, draws)
        logits = model(hidden.to(bench.device))
        return masked_bits_per_byte(logits, windows.to(bench.device), chosen.to(bench.device)).mean()

    recipe = plain_recipe(2e-3, regulators=regulators)
    train(model, loss, TrainingPlan(steps, recipe, seed=seed), checkpoint=checkpoint)
