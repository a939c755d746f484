"""The alarms of a training monitor: each fires on the fault that was planted for it, none on a healthy training."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor, nn, optim

from transformer_problems.catalogue import load_catalogue
from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.monitor import TrainingMonitor
from transformer_problems.solutions.training.monitor_alarms import Alarm, AlarmThresholds, find_alarms
from transformer_problems.solutions.training.monitor_layers import LayerRecord
from transformer_problems.solutions.training.monitor_statistics import token_similarity

VOCAB, WIDTH, HEADS, LENGTH = 32, 32, 2, 24
RATE = 3e-3
EVERY, FAULTY_STEP, NUM_STEPS = 4, 16, 24


class WithoutSkip(nn.Module):
    """A sublayer whose output replaces its input."""

    def __init__(self, embed_dim: int, *, device: object = None, dtype: object = None) -> None:
        super().__init__()

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return sublayer(x)


def decoder(num_layers: int = 4, residual: type[nn.Module] = PreNorm) -> Decoder:
    torch.manual_seed(0)
    position = RotaryEmbedding(WIDTH // HEADS)
    return Decoder(VOCAB, WIDTH, num_layers, lambda: SelfAttention(WIDTH, HEADS, position=position), residual=residual)


def counting_loss(model: nn.Module, step: int) -> Tensor:
    """Texts that count upwards from a random number, next token to be told."""
    start = torch.randint(VOCAB, (8, 1), generator=torch.Generator().manual_seed(step))
    text = (start + torch.arange(LENGTH + 1)) % VOCAB
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def smoothing_loss(model: nn.Module, step: int) -> Tensor:
    """Vectors, each to be mapped to the mean of all."""
    x = torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.mean(dim=1, keepdim=True)).square().mean()


def watched(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor] = counting_loss,
    *,
    rate: float = RATE,
    fault: Callable[[nn.Module], float | None] = lambda model: None,
    every: int = EVERY,
) -> tuple[TrainingMonitor, list[float]]:
    """A short training and its losses; `fault` happens before one step, and may give a factor on that step's loss."""
    optimizer = optim.AdamW(model.parameters(), lr=rate)
    losses = []
    with TrainingMonitor(model, optimizer, every=every) as monitor:
        for step in range(NUM_STEPS):
            factor = fault(model) if step == FAULTY_STEP else None
            value = loss(model, step)
            optimizer.zero_grad()
            ((1.0 if factor is None else factor) * value).backward()
            optimizer.step()
            losses.append(value.item())
    return monitor, losses


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), 4)


@pytest.mark.parametrize(
    ("make", "loss"), [(decoder, counting_loss), (encoder, smoothing_loss), (lambda: decoder(12), counting_loss)]
)
def test_a_healthy_training_raises_no_alarm(make: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> None:
    monitor, losses = watched(make(), loss, every=1)
    assert monitor.alarms() == []
    assert losses[-1] < 0.9 * losses[0]  # it does learn
    assert str(monitor).endswith("\nno alarms")


def only(monitor: TrainingMonitor, kind: str) -> Alarm:
    (alarm,) = (alarm for alarm in monitor.alarms() if alarm.kind == kind)
    assert str(alarm) in monitor.report()
    return alarm


def test_a_gradient_ten_thousand_times_too_large_explodes() -> None:
    monitor, _ = watched(decoder(), fault=lambda model: 1e4)
    (alarm,) = monitor.alarms()
    assert alarm.kind == "exploding gradients"
    assert (alarm.step, alarm.num_samples, alarm.threshold) == (FAULTY_STEP, 1, 100.0)
    assert alarm.layers == tuple(f"body.blocks.{i}" for i in range(4))
    norms = ([r.gradient_norm for r in monitor.records if r.layer == layer] for layer in alarm.layers)
    assert alarm.measured == max(spike / median(earlier) for *earlier, spike, _ in norms)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_is_called_so(factor: float) -> None:
    monitor, _ = watched(decoder(), fault=lambda model: factor)
    alarm = only(monitor, "numbers that are not finite")
    assert (alarm.step, alarm.threshold) == (FAULTY_STEP, None)
    assert not math.isfinite(alarm.measured)
    assert "Look for them in the batch, and lower the learning rate." in str(alarm)
    assert f"Measured {alarm.measured:.3g}. Try learning-rate-warmup." in str(alarm)
    assert "exploding gradients" not in [alarm.kind for alarm in monitor.alarms()]


@pytest.mark.parametrize("kind", ["exploding gradients", "update too large"])
def test_the_first_advice_against_steps_that_are_too_long_is_a_lower_rate(kind: str) -> None:
    fault, rate = {"exploding gradients": (1e4, RATE), "update too large": (None, 100 * RATE)}[kind]
    alarm = only(watched(decoder(), rate=rate, fault=lambda model: fault)[0], kind)
    assert alarm.sentence.endswith("Lower the learning rate first.")


def test_gradients_vanish_in_a_stack_without_skips() -> None:
    alarm = only(watched(decoder(8, residual=WithoutSkip))[0], "vanishing gradients")
    assert alarm.step == 0 and alarm.layers[0] == "body.blocks.0" and "body.blocks.7" not in alarm.layers
    assert alarm.measured < alarm.threshold == 0.01


def test_tokens_become_one_in_a_stack_without_skips() -> None:
    alarm = only(watched(decoder(8, residual=WithoutSkip))[0], "rank collapse")
    assert alarm.step == 0 and alarm.layers == tuple(f"body.blocks.{i}" for i in range(4, 8))
    assert alarm.measured > alarm.threshold == 0.99


def sharpen(module: nn.Module) -> None:
    """Queries and keys of the second layer thirty times as large, the logits some thousand times."""
    with torch.no_grad():
        if isinstance(module, Decoder):
            mixer = module.body.blocks[1].mixer
            mixer.q_proj.weight *= 30
            mixer.k_proj.weight *= 30
        else:
            module.layers[1].self_attn.in_proj_weight[: 2 * WIDTH] *= 30


@pytest.mark.parametrize(
    ("make", "loss", "layer"),
    [(decoder, counting_loss, "body.blocks.1"), (encoder, smoothing_loss, "layers.1")],
)
def test_enlarged_queries_and_keys_collapse_entropy_and_grow_logits(
    make: Callable[[], nn.Module], loss: Callable[..., Tensor], layer: str
) -> None:
    monitor, _ = watched(make(), loss, fault=sharpen)
    collapse, growth = monitor.alarms()
    assert (collapse.kind, growth.kind) == ("entropy collapse", "logit growth")
    assert collapse.layers == growth.layers == (layer,)
    assert (collapse.step, collapse.num_samples) == (growth.step, growth.num_samples) == (FAULTY_STEP, 2)
    assert collapse.measured < collapse.threshold == 0.02 and growth.measured > growth.threshold == 100.0


def test_a_hundred_times_the_learning_rate_makes_updates_too_large() -> None:
    alarm = only(watched(decoder(), rate=100 * RATE)[0], "update too large")
    assert alarm.step == 0 and len(alarm.layers) == 4
    assert alarm.measured > 1 > alarm.threshold == 0.1


PLAIN = LayerRecord(0, "a", 1.0, 1e-3, 5.0, 2.0, 0.6, 0.3)


def kinds(records: list[LayerRecord], **thresholds: float) -> list[str]:
    return [alarm.kind for alarm in find_alarms(records, AlarmThresholds(**thresholds))]


@pytest.mark.parametrize(
    ("figure", "fine", "bad", "kind"),
    [
        ("attention_entropy_share", 0.02, 0.019, "entropy collapse"),
        ("token_similarity", 0.99, 0.991, "rank collapse"),
        ("update_ratio", 0.1, 0.101, "update too large"),
    ],
)
def test_alarms_begin_beyond_their_threshold(figure: str, fine: float, bad: float, kind: str) -> None:
    assert kinds([replace(PLAIN, **{figure: fine}), replace(PLAIN, step=1, **{figure: None})]) == []
    assert kinds([PLAIN, replace(PLAIN, step=1, **{figure: bad})]) == [kind]


def test_a_gradient_is_compared_with_the_median_of_three_earlier_ones_or_more() -> None:
    def series(*norms: float) -> list[LayerRecord]:
        return [replace(PLAIN, step=step, gradient_norm=norm) for step, norm in enumerate(norms)]

    assert kinds(series(1.0, 1.0, 101.0)) == []
    assert kinds(series(1.0, 1.0, 1.0, 100.0)) == []
    assert kinds(series(1.0, 1.0, 1.0, 101.0)) == ["exploding gradients"]
    assert kinds(series(5.0, 1.0, 9.0, 101.0)) == []
    assert kinds(series(0.0, 0.0, 0.0, 1.0)) == []  # a head that starts at zero lets no gradient through at first
    (alarm,) = find_alarms(series(1.0, 2.0, 1.0, 200.0, 1.0, 300.0), AlarmThresholds())
    assert (alarm.step, alarm.measured, alarm.num_samples) == (3, 200.0, 2)


def test_gradients_vanish_from_the_first_layer_on_only() -> None:
    def sample(*norms: float | None) -> list[LayerRecord]:
        return [replace(PLAIN, layer=str(i), gradient_norm=norm) for i, norm in enumerate(norms)]

    (alarm,) = find_alarms(sample(None, 0.002, 0.001, 0.5, 0.001, 1.0), AlarmThresholds())
    assert (alarm.layers, alarm.measured) == (("1", "2"), 0.001)
    assert kinds(sample(1.0, 0.001, 1.0)) == kinds(sample(0.01, 1.0)) == kinds(sample(0.0, 0.0)) == []
    assert kinds(sample(None, None)) == []
    assert kinds(sample(1.0, 1.0, math.inf)) == ["numbers that are not finite"]  # beside which nothing is small
    assert set(kinds(sample(0.001, 1.0, math.inf))) == {"numbers that are not finite", "vanishing gradients"}


def test_logits_are_an_alarm_when_large_and_grown() -> None:
    def series(*logits: float | None) -> list[LayerRecord]:
        return [replace(PLAIN, step=step, largest_logit=logit) for step, logit in enumerate(logits)]

    assert kinds(series(150.0, 150.0, 299.0)) == []  # a pretrained model may be like that
    assert kinds(series(150.0, 300.0)) == ["logit growth"]
    assert kinds(series(None, 1.0, 100.0)) == []
    assert kinds(series(1.0, 101.0)) == ["logit growth"]


def test_early_layers_may_hold_similar_tokens() -> None:
    similar = [replace(PLAIN, layer=str(i), token_similarity=0.999 if i < 2 else 0.5) for i in range(4)]
    assert kinds(similar) == []
    assert kinds(similar[:2]) == ["rank collapse"]


def test_thresholds_can_be_changed() -> None:
    assert kinds([PLAIN], update_ratio=1e-4, entropy_share=0.7) == ["entropy collapse", "update too large"]
    monitor, _ = watched(decoder())
    strict = AlarmThresholds(update_ratio=1e-6)
    assert [alarm.kind for alarm in monitor.alarms(strict)] == ["update too large"]
    assert "update too large at step 0 in body.blocks.0 and 3 more, seen in 6 samples: " in monitor.report(strict)
    for wrong in ({"gradient_growth": 0.0}, {"largest_logit": -1.0}, {"logit_growth": 0.0}, {"update_ratio": 0.0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} must be positive"):
            AlarmThresholds(**wrong)
    for share in ("gradient_decay", "entropy_share", "token_similarity"):
        with pytest.raises(ArgumentError, match=f"{share} must be a share from 0 to 1; got 2"):
            AlarmThresholds(**{share: 2})


def test_alarms_are_sorted_by_step_and_name_solutions_of_the_catalogue() -> None:
    bad = replace(PLAIN, attention_entropy_share=0.0, token_similarity=1.0, update_ratio=9.0, largest_logit=1e3)
    last = [replace(PLAIN, layer="b", step=step) for step in range(5)]
    records = []
    for step in range(5):
        first = replace(bad if step == 3 else PLAIN, step=step)
        norm = {3: 200.0, 4: math.nan}.get(step, 1.0 if step else 0.001)
        records += [replace(first, gradient_norm=norm), replace(last[step], token_similarity=first.token_similarity)]
    alarms = find_alarms(records, AlarmThresholds())
    assert [alarm.step for alarm in alarms] == [0, 3, 3, 3, 3, 3, 4]
    assert len({alarm.kind for alarm in alarms}) == 7
    known = {solution.slug for solution in load_catalogue().solutions}
    assert all(alarm.solutions and set(alarm.solutions) <= known for alarm in alarms)


def perceptron() -> nn.ModuleList:
    """Of one direction for all inputs, so that its outputs are as alike as tokens that have collapsed."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
    for layer in layers:
        nn.init.constant_(layer[0].bias, 10.0)
    return layers


def test_similar_examples_are_no_collapsed_tokens() -> None:
    model = perceptron()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    with TrainingMonitor(model, optimizer) as monitor:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
        for layer in model:
            x = layer(x)
        x.square().mean().backward()
        optimizer.step()
    assert token_similarity(x) > 0.99  # were they tokens
    assert [record.token_similarity for record in monitor.records] == [None] * 4
    assert "rank collapse" not in [alarm.kind for alarm in monitor.alarms()]


def test_training_biases_alone_is_no_update_too_large() -> None:
    """They start near zero, so that the first step is any number of times their own size."""
    model = encoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
        if parameter.requires_grad:
            nn.init.constant_(parameter, 1e-3 * RATE)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    with TrainingMonitor(model, optimizer) as monitor:
        smoothing_loss(model, 0).backward()
        optimizer.step()
    assert all(0 < record.update_ratio < 0.1 for record in monitor.records)
    assert "update too large" not in [alarm.kind for alarm in monitor.alarms()]
