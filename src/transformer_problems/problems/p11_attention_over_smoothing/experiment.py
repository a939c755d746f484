"""Deep stacks and what is left of the difference between tokens in each layer, at the start and after training."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.slots import AttentionOp, LongSkips
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.digits import SIZE, Images, load_digit_images
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import BatchLoss, TrainingPlan, plain_recipe, train
from transformer_problems.models.block import ResidualFactory
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.problems.p11_attention_over_smoothing.depth import (
    gated_heads,
    head_importance,
    mean_cosine,
    rank_one_distance,
    states_by_depth,
)
from transformer_problems.problems.p11_attention_over_smoothing.without_skips import NoSkip, attention_only
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.learned_temperature import LearnedTemperature
from transformer_problems.solutions.attention.log_length_scale import LogLengthScale
from transformer_problems.solutions.attention.query_key_norm import QueryKeyNorm
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.residual.deep_norm import DeepNorm
from transformer_problems.solutions.residual.dense_skips import DenseSkips
from transformer_problems.solutions.residual.layer_scale import LayerScale
from transformer_problems.solutions.residual.re_zero import ReZero
from transformer_problems.solutions.residual.unet_skips import UNetSkips
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.drop_head import DropHead, DropHeadSchedule
from transformer_problems.solutions.training.recipe import TrainingRecipe

_HEADS = 4
_PATCH = 2
_NUM_DIGITS = 10
_DROP_HEAD_RATE = 0.2
_ROUNDED_AWAY = 1e-13  # a distance below which float64 leaves few digits of it
_FIT_LAYERS = 3  # the fewest that a power can be fitted to: two steps from one to the next


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    width: int
    layers: int
    steps: int
    batch_size: int
    num_images: int  # held-out images
    num_looked_at: int  # of them, layer by layer
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(32, 12, steps=36, batch_size=32, num_images=64, num_looked_at=32, seeds=1),
    "standard": _Size(32, 12, steps=300, batch_size=32, num_images=300, num_looked_at=50, seeds=3),
    "full": _Size(192, 48, steps=5_000, batch_size=64, num_images=300, num_looked_at=50, seeds=5),
}


def build_model(arm: str, width: int, layers: int) -> VisionTransformer:
    """The same deep Vision Transformer, but for what the arm changes: residual, long skips, or attention op."""
    residuals: dict[str, ResidualFactory] = {
        "no_skips": NoSkip,
        "deep_norm": partial(DeepNorm, num_layers=layers),
        "layer_scale": partial(LayerScale, initial=0.1),
        "re_zero": ReZero,
    }
    ops: dict[str, Callable[[], AttentionOp]] = {
        "learned_temperature": lambda: LearnedTemperature(_HEADS),
        "query_key_norm": lambda: QueryKeyNorm(_HEADS),
        "log_length": lambda: LogLengthScale(3),  # nearly log n itself, as in the paper: log 3 is 1.1
        "drop_head": DropHead,
    }
    skips: dict[str, Callable[[], LongSkips]] = {
        "unet_skips": lambda: UNetSkips(width, layers),
        "dense_skips": lambda: DenseSkips(layers),
    }

    def mixer() -> SelfAttention:
        return SelfAttention(width, _HEADS, op=ops.get(arm, DenseAttention)(), is_causal=False)

    return VisionTransformer(
        PatchEmbedding(width, _PATCH, in_channels=1),
        (SIZE, SIZE),
        layers,
        mixer,
        num_classes=_NUM_DIGITS,
        residual=residuals.get(arm, PreNorm),
        skips=skips[arm]() if arm in skips else None,
    )


class AttentionOverSmoothing:
    """A deep Vision Transformer that reads handwritten digits: how distinct its tokens stay from layer to layer."""

    problem = 11
    arms = (
        Arm("no_skips", "no skips"),
        Arm("residual", "Skip connections", "skip-connections", lead=True),
        Arm("unet_skips", "Skips + U-Net skips", "skip-connections"),
        Arm("dense_skips", "Skips + dense skips", "skip-connections"),
        Arm("deep_norm", "DeepNorm", "residual-scaling", lead=True, baseline="residual"),
        Arm("layer_scale", "LayerScale", "residual-scaling", baseline="residual"),
        Arm("re_zero", "ReZero", "residual-scaling", baseline="residual"),
        Arm("drop_head", "DropHead", "drophead", lead=True, baseline="residual"),
        Arm(
            "learned_temperature",
            "Learned temperature",
            "attention-temperature-control",
            lead=True,
            baseline="residual",
        ),
        Arm("query_key_norm", "Query-key norm", "attention-temperature-control", baseline="residual"),
        Arm("log_length", "Log-length scale", "attention-temperature-control", baseline="residual"),
    )
    chart = Chart(
        metric="rank_one_distance",
        problem_title="Without skips, after training",
        solutions_title="The same depth with each solution",
        x_label="layer",
        y_label="distance from all tokens alike",
        better="higher",
        y_log=True,
        draws=("no_skips", "residual", "deep_norm", "drop_head", "learned_temperature"),
    )
    columns = (
        Column("rank_one_distance", "distance in the last layer", at="last", better="higher", digits=2),
        Column("rank_one_distance_at_start", "the same before training", at="last", better="higher", digits=2),
        Column("cosine", "cosine between tokens, last layer", at="last", better="lower", digits=2),
        Column("collapse_power", "power by layer, attention alone", digits=2),
        Column("accuracy", "digits right", better="higher"),
        Column("head_dominance", "share of the largest head", better="lower", digits=2),
    )
    gains = (
        Effect(
            "rank_one_distance",
            "ratio",
            ("less distance between tokens", "more distance between tokens"),
            "last",
            "in layer {x:.0f}",
        ),
        Effect("head_dominance", "ratio", ("less weight on one head", "more weight on one head")),
    )
    costs = (
        Effect(
            "accuracy",
            "difference",
            ("points fewer digits right", "points more digits right"),
            scale=100,
        ),
        Effect("flops", "ratio", ("less arithmetic", "more arithmetic")),
    )
    shared_examples = frozenset({"accuracy"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm, seed = _SIZES[bench.cell.scale], bench.cell.arm, bench.cell.seed
        train_images, test_images = load_digit_images()
        test_images = test_images.take(torch.arange(size.num_images))
        tested = test_images.pixels.to(bench.device)
        looked_at = tested[: size.num_looked_at]
        with seeded(seed, "model"):
            model = build_model(arm, size.width, size.layers).to(bench.device)
        yield from _by_depth(model, looked_at, "_at_start")
        if arm == "no_skips":
            yield from collapse_of_pure_attention(model, seed, looked_at)
        yield Measurement("flops", "FLOP", count_flops(lambda: model(tested[:1]).sum().backward()))
        train(
            model,
            _digit_loss(train_images, size, seed, bench.device),
            TrainingPlan(size.steps, _recipe(arm), seed=seed),
            progress=lambda done: bench.progress(0.9 * done),
        )
        yield from _by_depth(model, looked_at, "")
        yield from _accuracy(model, tested, test_images.classes)
        yield Measurement("head_dominance", "1", dominance(model, tested, test_images.classes.to(bench.device)))

    def finding(self, results: Results) -> str:
        last = max(results.xs("no_skips", "rank_one_distance"))
        distance, power, accuracy = (
            results.samples("no_skips", *key)
            for key in (("rank_one_distance", last), ("collapse_power",), ("accuracy",))
        )
        assert distance is not None
        assert accuracy is not None
        sentence = (
            f"Without skips the tokens of an image differ by {distance.mean():.0e} of their size after {last:.0f} "
            f"layers (float32 rounds at {torch.finfo(torch.float32).eps:.0e}), and {accuracy.mean():.0%} of digits "
            f"are told rightly, where chance gives {1 / _NUM_DIGITS:.0%}"
        )
        if power is None:
            return f"{sentence}."
        return (
            f"{sentence}; in attention alone, each layer raises that distance to the power {power.mean():.1f}, which "
            "is doubly exponential in depth."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        told = [
            "Distances near 1e-07 are what float32 rounds to: how many times as distinct others keep tokens than a "
            "stack without skips is then a lower bound.",
            "A stack that changes its input little keeps tokens distinct whether it has learned or not, as ReZero does "
            "at the start: the digits told rightly are shown beside the distance.",
        ]
        if results.samples("no_skips", "collapse_power") is not None:
            told.append(
                "The power is that of attention alone, without feed-forward networks, norms and skips, before any "
                "training, in float64, with doubled queries so that the collapse takes some layers. It is fitted on "
                "the few layers whose distance float64 can tell from zero; in theory it is 3."
            )
        return tuple(told)


def _recipe(arm: str) -> TrainingRecipe:
    regulators = (DropHeadSchedule(_DROP_HEAD_RATE),) if arm == "drop_head" else ()
    return plain_recipe(3e-3, regulators=regulators)


def _digit_loss(images: Images, size: _Size, seed: int, device: torch.device) -> BatchLoss:
    def loss(model: nn.Module, step: int) -> Tensor:
        batch = images.take(torch.randint(len(images), (size.batch_size,), generator=generator(seed, "batch", step)))
        return nn.functional.cross_entropy(model(batch.pixels.to(device)), batch.classes.to(device))

    return loss


def _by_depth(model: VisionTransformer, images: Tensor, when: str) -> Iterator[Measurement]:
    """Distance and cosine of each image in every layer; layer 0 is the embedding."""
    for layer, x in enumerate(states_by_depth(model, images)):
        for metric, values in (("rank_one_distance", rank_one_distance(x)), ("cosine", mean_cosine(x))):
            for repeat, value in enumerate(values.tolist()):
                yield Measurement(f"{metric}{when}", "1", value, x=layer, x_unit="layers", repeat=repeat)


@torch.no_grad()
def collapse_of_pure_attention(model: VisionTransformer, seed: int, images: Tensor) -> Iterator[Measurement]:
    """In attention alone, with neither skips nor norms nor feed-forward networks, before training and in float64:
    the distance by depth, and the power p of r -> c r^p that each layer applies to it, fitted image by image.

    Repeated, r -> c r^p makes log r grow as p^L: doubly exponential in depth. Where that is so fast that rounding
    leaves fewer than three layers to fit it to, there is no power.

    Source:
        Dong et al. 2021, arXiv:2103.03404, theorem 2.2, where p is 3.
    """
    x = nn.functional.layer_norm(model.embed(images).double().cpu(), (model.embed_dim,))
    with seeded(seed, "attention only"):
        layers = attention_only(model.embed_dim, _HEADS, num_layers=4)
    distances = [rank_one_distance(x)]
    for layer in layers:
        x = layer(x)
        distances.append(rank_one_distance(x))
    for layer_index, distance in enumerate(distances):
        yield Measurement("pure_attention_distance", "1", float(distance.mean()), x=layer_index, x_unit="layers")
    # the power law is one of small distances, which the images' own is not
    fitted = [distance for distance in distances[1:] if float(distance.min()) > _ROUNDED_AWAY]
    if len(fitted) < _FIT_LAYERS:
        return
    logs = torch.stack(fitted).log()  # [layers, B]
    before, after = logs[:-1] - logs[:-1].mean(dim=0), logs[1:] - logs[1:].mean(dim=0)
    for repeat, power in enumerate(((before * after).sum(dim=0) / before.square().sum(dim=0)).tolist()):
        yield Measurement("collapse_power", "1", power, repeat=repeat)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> Iterator[Measurement]:
    """Whether each digit is told rightly."""
    for repeat, right in enumerate((model(images).argmax(dim=1).cpu() == classes).double().tolist()):
        yield Measurement("accuracy", "1", right, repeat=repeat)


def dominance(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Share of the largest head in its layer's summed importance, mean over layers."""
    total = torch.zeros(1)
    with ExitStack() as hooks:
        gates = gated_heads(model, hooks)
        for pixels, digit in zip(images.split(1), classes.split(1), strict=True):
            total = total + head_importance(nn.functional.cross_entropy(model(pixels), digit), gates).cpu()
    return float((total.amax(dim=1) / total.sum(dim=1)).mean())


EXPERIMENT = AttentionOverSmoothing()
