"""Train short, test long: loss and recall at up to 16 times the training length, for each position encoding."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.passkey import VOCAB_SIZE, passkey_accuracy, plant_passkeys
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.learned import LearnedPositions
from transformer_problems.solutions.position.randomized import RandomizedPositions
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.rotary_scaling import ScaledRotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.t5 import T5RelativeBias
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.position.xpos import XPos

_TRAINED_LEN = 64
_MULTIPLES = (1, 2, 4, 8, 16)
_LONGEST = _TRAINED_LEN * _MULTIPLES[-1]
_HEADS = 4

ScalingMethod = Literal["linear", "ntk", "dynamic_ntk", "yarn"]
_SCALED: dict[str, ScalingMethod] = {
    "rope_linear": "linear",
    "rope_ntk": "ntk",
    "rope_dynamic_ntk": "dynamic_ntk",
    "rope_yarn": "yarn",
    "rope_linear_tuned": "linear",
    "rope_yarn_tuned": "yarn",
}


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    width: int
    layers: int
    steps: int
    batch_size: int
    tuning_steps: int
    num_windows: int  # held-out texts
    num_passkeys: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(64, 2, steps=160, batch_size=32, tuning_steps=10, num_windows=16, num_passkeys=32, seeds=1),
    "standard": _Size(64, 3, steps=400, batch_size=32, tuning_steps=40, num_windows=48, num_passkeys=96, seeds=3),
    "full": _Size(256, 6, steps=10_000, batch_size=64, tuning_steps=500, num_windows=512, num_passkeys=1024, seeds=5),
}


def build_model(arm: str, width: int, layers: int) -> Decoder:
    """The same small decoder with the arm's encoding, before any scaling."""
    head_dim = width // _HEADS
    in_embedding: dict[str, Callable[[], PositionEncoding]] = {
        "learned": lambda: LearnedPositions(_TRAINED_LEN, width, beyond="clamp"),
        "sinusoidal": lambda: SinusoidalEncoding(width),
        "randomized": lambda: SinusoidalEncoding(width),
    }
    in_attention: dict[str, Callable[[], PositionEncoding]] = {
        "t5": lambda: T5RelativeBias(_HEADS, max_distance=_TRAINED_LEN),
        "shaw": lambda: ShawRelative(head_dim, max_distance=_TRAINED_LEN // 2),
        "transformer_xl": lambda: TransformerXLRelative(width, _HEADS),
        "alibi": lambda: ALiBi(_HEADS),
        "xpos": lambda: XPos(head_dim),
        "rope": lambda: RotaryEmbedding(head_dim),
    }

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, position=in_attention[arm]() if arm in in_attention else None)

    return Decoder(
        VOCAB_SIZE,
        width,
        layers,
        mixer,
        position=in_embedding[arm]() if arm in in_embedding else None,
        sample_positions=RandomizedPositions(2 * _LONGEST) if arm == "randomized" else None,
    )


class LengthGeneralization:
    """A byte-level model trained on 64 tokens of real text with a passkey in each, tested on up to 1,024."""

    problem = 9
    arms = (
        Arm("learned", "Learned, clamped beyond 64"),
        Arm("sinusoidal", "Sinusoidal"),
        Arm("none", "no positions"),
        Arm("rope", "RoPE"),
        Arm("t5", "T5 buckets", "relative-pe", lead=True),
        Arm("shaw", "Shaw, clipped", "relative-pe"),
        Arm("transformer_xl", "Transformer-XL relative", "relative-pe"),
        Arm("rope_linear", "RoPE + interpolation", "rope-scaling", baseline="rope"),
        Arm("rope_ntk", "RoPE + NTK-aware", "rope-scaling", baseline="rope"),
        Arm("rope_dynamic_ntk", "RoPE + dynamic NTK", "rope-scaling", baseline="rope"),
        Arm("rope_yarn", "RoPE + YaRN", "rope-scaling", lead=True, baseline="rope"),
        Arm("rope_linear_tuned", "RoPE + interpolation, tuned", "rope-scaling", baseline="rope"),
        Arm("rope_yarn_tuned", "RoPE + YaRN, tuned", "rope-scaling", baseline="rope"),
        Arm("alibi", "ALiBi", "alibi", lead=True),
        Arm("xpos", "xPos", "length-extrapolation", lead=True, baseline="rope"),
        Arm("randomized", "Randomized sinusoidal", "length-extrapolation", baseline="sinusoidal"),
    )
    chart = Chart(
        metric="bits_per_byte",
        problem_title="Trained on 64 tokens, learned positions",
        solutions_title="The same with each encoding",
        x_label="length tested, in training lengths",
        y_label="bits per byte",
        better="lower",
        x_log=True,
        draws=("learned", "sinusoidal", "rope", "t5", "rope_yarn", "alibi", "xpos"),
    )
    columns = (
        Column("bits_per_byte", "bits/byte at 1x", at=1.0, better="lower"),
        Column("bits_per_byte", "bits/byte at 4x", at=4.0, better="lower"),
        Column("bits_per_byte", "bits/byte at 16x", at=16.0, better="lower"),
        Column("recall", "recall at 1x", at=1.0, better="higher", digits=2),
        Column("recall", "recall at 16x", at=16.0, better="higher", digits=2),
    )
    gains = (Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), "last", "at {x:.0f}x"),)
    costs = (
        Effect("recall", "difference", ("points less recall", "points more recall"), "last", "at {x:.0f}x", scale=100),
        Effect("bits_per_byte", "difference", ("bits/byte less", "bits/byte more"), 1.0, "at 1x"),
    )
    shared_examples = frozenset({"bits_per_byte"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        text = load_text()
        model = _trained(bench, size, text)
        if arm.endswith("_tuned"):
            _scale_rotary(model, _SCALED[arm], _MULTIPLES[-1])
            _train(model, size.tuning_steps, 4 * _TRAINED_LEN, size.batch_size // 4, 3e-4, text, bench)
        for i, multiple in enumerate(_MULTIPLES):
            if arm in _SCALED and not arm.endswith("_tuned"):
                _scale_rotary(model, _SCALED[arm], multiple)
            yield from _loss_at(model, multiple, size.num_windows, text, bench.device)
            yield from _recall_at(model, multiple, size.num_passkeys, text, bench.device)
            bench.progress(0.7 + 0.3 * (i + 1) / len(_MULTIPLES))

    def finding(self, results: Results) -> str:
        last = float(_MULTIPLES[-1])
        learned, rope = ([results.samples(arm, "bits_per_byte", x) for x in (1.0, last)] for arm in ("learned", "rope"))
        assert learned[0] is not None
        assert learned[1] is not None
        sentence = (
            f"Trained on {_TRAINED_LEN} tokens, learned positions do not exist beyond; clamped, they go from "
            f"{learned[0].mean():.2f} to {learned[1].mean():.2f} bits per byte at {last:.0f} times that length"
        )
        if rope[0] is None or rope[1] is None:
            return f"{sentence}."
        return f"{sentence}, and rotary ones from {rope[0].mean():.2f} to {rope[1].mean():.2f}."


def _trained(bench: Bench, size: _Size, text: TextSplits) -> nn.Module:
    """The arm's model trained at the short length; all arms on RoPE share one."""
    arm = "rope" if bench.cell.arm in _SCALED else bench.cell.arm
    recipe = {"problem": 9, "arm": arm, "seed": bench.cell.seed, "text": text.source, **asdict(size)}

    def build() -> nn.Module:
        with seeded(bench.cell.seed, "model"):
            return build_model(arm, size.width, size.layers).to(bench.device)

    def train_short(model: nn.Module, checkpoint: Path) -> None:
        _train(model, size.steps, _TRAINED_LEN, size.batch_size, 3e-3, text, bench, checkpoint)

    return bench.models.get(recipe, build, train_short)


def _train(
    model: nn.Module,
    steps: int,
    length: int,
    batch_size: int,
    learning_rate: float,
    text: TextSplits,
    bench: Bench,
    checkpoint: Path | None = None,
) -> None:
    """Next-byte prediction and passkey recall together, each with weight one."""

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(bench.cell.seed, "batch", length, step)
        windows = sample_windows(text.train, num=batch_size, length=length + 1, generator=draws)
        tokens = plant_passkeys(windows, draws).to(bench.device)
        losses = nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses[:, :-1].mean() + losses[:, -1].mean()

    plan = TrainingPlan(steps, plain_recipe(learning_rate))
    train(model, batch_loss, plan, progress=lambda done: bench.progress(0.7 * done), checkpoint=checkpoint)


def _scale_rotary(model: nn.Module, method: ScalingMethod, factor: float) -> None:
    """Put a scaled rotary embedding in the place of the plain one, in every layer."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.position = ScaledRotaryEmbedding(
                module.head_dim, method=method, factor=factor, trained_length=_TRAINED_LEN
            )


def _loss_at(
    model: nn.Module, multiple: int, num_windows: int, text: TextSplits, device: torch.device
) -> Iterator[Measurement]:
    """Bits per byte of the same last 64 bytes of every held-out text, given more and more of what came before."""
    windows = held_out_windows(text.test, num=num_windows, length=_LONGEST + 1)
    windows = windows[:, -(multiple * _TRAINED_LEN + 1) :]
    repeat = 0
    for part in torch.split(windows, 8):
        with torch.no_grad():
            logits = model(part[:, :-1].to(device))[:, -_TRAINED_LEN:]
        for bits in bits_per_byte(logits, part[:, -_TRAINED_LEN:].to(device)).tolist():
            yield Measurement("bits_per_byte", "bit", bits, x=multiple, x_unit="training lengths", repeat=repeat)
            repeat += 1


def _recall_at(
    model: nn.Module, multiple: int, num_passkeys: int, text: TextSplits, device: torch.device
) -> Iterator[Measurement]:
    """Share of passkeys found, each at a random place of a text of the given length."""
    draws = generator(0, "recall", multiple)
    windows = sample_windows(text.test, num=num_passkeys, length=multiple * _TRAINED_LEN + 1, generator=draws)
    repeat = 0
    for tokens in torch.split(plant_passkeys(windows, draws), 8):
        with torch.no_grad():
            logits = model(tokens[:, :-1].to(device))
        for found in passkey_accuracy(logits.cpu(), tokens).tolist():
            yield Measurement("recall", "1", found, x=multiple, x_unit="training lengths", repeat=repeat)
            repeat += 1


EXPERIMENT = LengthGeneralization()
