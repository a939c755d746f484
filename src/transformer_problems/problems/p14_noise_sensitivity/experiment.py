"""Evidence among more and more noise: who still finds it, where attention goes, what the noise costs."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.core.token_slots import TokenReducer
from transformer_problems.lab.data.needles import (
    NUM_CLASSES,
    NUM_NEEDLES,
    VOCAB_SIZE,
    Needles,
    length_at,
    plant_needles,
)
from transformer_problems.lab.data.text import TextSplits, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, train
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.reducing_encoder import ReducingEncoder
from transformer_problems.solutions.attention.differential import DifferentialAttention
from transformer_problems.solutions.attention.entmax import EntmaxAttention
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.packing import PackedAttention, run_packed
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.topk import TopKAttention
from transformer_problems.solutions.attention.watched import WatchedAttention
from transformer_problems.solutions.tokens.merging import TokenMerging
from transformer_problems.solutions.tokens.pruning import LearnedTokenPruning, TokenPruning, pruning_penalty

_HEADS = 4
_TRAINED_SHARES = (0.0, 0.25, 0.5)  # of noise
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
_KEPT = 12  # tokens that pruning keeps: the reading token, the evidence, and a little room
_PENALTY = 0.05  # weight of what pushes learned thresholds up
_MASKED = {"masked", "packed"}
_TRAINED_AS = {"packed": "masked", "merging": "dense"}  # packing computes what the mask does; merging needs no training
_WITHOUT_MASS = {"merging", "differential"}  # merged tokens are part evidence; differential weights are no shares


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    width: int
    layers: int
    steps: int
    batch_size: int
    num_examples: int  # held out, at each noise share
    num_timed: int  # examples in the batch whose cost is taken
    repeats: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(32, 2, steps=160, batch_size=64, num_examples=256, num_timed=16, repeats=3, seeds=1),
    "standard": _Size(32, 2, steps=500, batch_size=64, num_examples=512, num_timed=16, repeats=5, seeds=3),
    "full": _Size(128, 4, steps=10_000, batch_size=256, num_examples=4096, num_timed=64, repeats=9, seeds=5),
}


def build_model(arm: str, width: int, layers: int) -> nn.Module:
    """The same small encoder with the arm's part, as it is trained.

    It has no positions: the answer does not depend on order, so that noise is all that changes with length.
    """
    layer_index = itertools.count(1)

    def attention(op: nn.Module | None = None) -> SelfAttention:
        return SelfAttention(width, _HEADS, op=WatchedAttention() if op is None else op, is_causal=False)

    makers: dict[str, Callable[[], nn.Module]] = {
        "topk": lambda: attention(TopKAttention(NUM_NEEDLES)),
        "entmax": lambda: attention(EntmaxAttention()),
        "masked": lambda: attention(PackedAttention()),
        "gated": lambda: GatedAttention(attention()),
        "differential": lambda: DifferentialAttention(
            width, _HEADS // 2, layer_index=next(layer_index), is_causal=False
        ),
    }
    mixer = cast("Callable[[], SelfAttention]", makers.get(arm, attention))
    encoder = Encoder(VOCAB_SIZE, width, layers, mixer, num_outputs=NUM_CLASSES)
    if arm == "pruning":
        return _reduced(encoder, TokenPruning(_KEPT))
    if arm == "learned_pruning":  # within reach of the 0.06 to 0.11 that a token receives on average in training
        return _reduced(encoder, LearnedTokenPruning(0.02, temperature=0.01))
    return encoder


def _reduced(encoder: Encoder, reducer: TokenReducer) -> ReducingEncoder:
    """Tokens leave in the first layer, after its attention."""
    return ReducingEncoder(encoder, [reducer, *[None] * (len(encoder.body.blocks) - 1)])


class NoiseSensitivity:
    """Eight evidence tokens vote for a class among padding and real text; trained at up to 50% noise, tested to 95%."""

    problem = 14
    arms = (
        Arm("dense", "dense attention, no mask"),
        Arm("topk", "Sparse: top-k", "sparse-attention", lead=True),
        Arm("entmax", "Sparse: entmax", "sparse-attention"),
        Arm("pruning", "Token pruning", "token-pruning", lead=True),
        Arm("learned_pruning", "Token pruning, learned threshold", "token-pruning"),
        Arm("merging", "Token merging", "token-pruning"),
        Arm("packed", "Masking: packed", "attention-masking", lead=True),
        Arm("masked", "Masking: key mask", "attention-masking"),
        Arm("gated", "Gated attention", "gating-mechanisms", lead=True),
        Arm("differential", "Differential attention", "gating-mechanisms"),
    )
    chart = Chart(
        metric="accuracy",
        problem_title="Evidence among noise, dense attention without a mask",
        solutions_title="The same with each solution",
        x_label="share of the input that is noise",
        y_label="answered correctly (chance 0.125)",
        better="higher",
        x_log_rest=True,
        y_from=0.0,
        draws=("dense", "topk", "pruning", "packed", "gated"),
    )
    columns = (
        Column("accuracy", "accuracy without noise", at=0.0, better="higher"),
        Column("accuracy", "at 75% noise", at=0.75, better="higher"),
        Column("accuracy", "at 95% noise", at=0.95, better="higher"),
        Column("distractor_mass", "attention on noise at 95%", at=0.95, better="lower"),
        Column("flops", "FLOPs an example at 95%", at=0.95, better="lower"),
        Column("latency_s", "seconds an example at 95%", at=0.95, better="lower"),
    )
    gains = (
        Effect(
            "accuracy",
            "difference",
            ("points fewer right answers", "points more right answers"),
            0.95,
            "at 95% noise",
            scale=100,
        ),
    )
    costs = (
        Effect("flops", "ratio", ("less arithmetic", "more arithmetic"), 0.95, "at 95% noise"),
        Effect("latency_s", "ratio", ("less time", "more time"), 0.95, "there"),
        Effect(
            "accuracy",
            "difference",
            ("points fewer right answers", "points more right answers"),
            0.0,
            "without noise",
            scale=100,
        ),
    )
    shared_examples = frozenset({"accuracy", "distractor_mass"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm = _SIZES[bench.cell.scale], bench.cell.arm
        text = load_text()
        model = _trained(bench, size, text)
        for i, share in enumerate(_SHARES):
            draws = generator(0, "held out text", i), generator(0, "held out")
            needles = _draw(text.test, size.num_examples, share, *draws).to(bench.device)
            for repeat, value in enumerate(_correct(arm, model, needles).tolist()):
                yield _record("accuracy", "1", value, share, repeat)
            if arm not in _WITHOUT_MASS:
                for repeat, value in enumerate(distractor_mass(arm, model, needles).tolist()):
                    yield _record("distractor_mass", "1", value, share, repeat)
            yield from _costs(arm, model, needles.first(size.num_timed), share, size.repeats, bench.device)
            bench.progress(0.8 + 0.2 * (i + 1) / len(_SHARES))

    def finding(self, results: Results) -> str:
        first, last = (results.samples("dense", "accuracy", share) for share in (_SHARES[0], _SHARES[-1]))
        mass = results.samples("dense", "distractor_mass", _SHARES[-1])
        assert first is not None
        assert last is not None
        assert mass is not None
        more = results.mean("dense", "flops", _SHARES[-1]) / results.mean("dense", "flops", _SHARES[0])
        by_seed = ", ".join(f"{accuracy:.0%}" for accuracy in last.mean(axis=1))
        seeds = f" ({by_seed} by seed)" if len(last) > 1 else ""
        return (
            f"With {_SHARES[-1]:.0%} noise, dense attention without a mask answers {last.mean():.0%}{seeds} instead "
            f"of {first.mean():.0%}; the noise gets {mass.mean():.0%} of its attention and makes each example "
            f"{more:.0f} times as much work."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        return (
            f"Two methods are told how much evidence there is: top-k keeps {NUM_NEEDLES} keys, exactly as many as "
            f"there are pieces of evidence, and token pruning keeps {_KEPT} tokens, the reading token, the evidence "
            "and little more. What they gain where nobody knows that number is not measured. Entmax, learned "
            "thresholds and gates are told nothing; masks are told which tokens are padding.",
        )


def _record(metric: str, unit: str, value: float, share: float, repeat: int = 0) -> Measurement:
    return Measurement(metric, unit, value, x=share, x_unit="share of noise", repeat=repeat)


def _draw(text: Tensor, num: int, share: float, windows: torch.Generator, evidence: torch.Generator) -> Needles:
    """Examples with this share of noise; the same evidence for the same generator, whatever the share."""
    return plant_needles(sample_windows(text, num=num, length=length_at(share), generator=windows), evidence)


def _trained(bench: Bench, size: _Size, text: TextSplits) -> nn.Module:
    """The arm's model; arms that differ in how they run and not in what they learn share one."""
    seed = bench.cell.seed
    arm = _TRAINED_AS.get(bench.cell.arm, bench.cell.arm)
    recipe = {"problem": 14, "arm": arm, "seed": seed, "text": text.source, **asdict(size)}

    def build() -> nn.Module:
        with seeded(seed, "model"):
            return build_model(arm, size.width, size.layers).to(bench.device)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        share = _TRAINED_SHARES[step % len(_TRAINED_SHARES)]
        draws = generator(seed, "text", step), generator(seed, "evidence", step)
        needles = _draw(text.train, size.batch_size, share, *draws).to(bench.device)
        if arm == "learned_pruning":
            return _pruning_loss(model, needles, is_hard=4 * step >= 3 * size.steps)
        return nn.functional.cross_entropy(answer(arm, model, needles), needles.answers)

    def train_all(model: nn.Module, checkpoint: Path) -> None:
        plan = TrainingPlan(steps=size.steps)
        train(model, batch_loss, plan, progress=lambda done: bench.progress(0.8 * done), checkpoint=checkpoint)

    model = bench.models.get(recipe, build, train_all)
    if bench.cell.arm == "merging":
        return _reduced(cast("Encoder", model), TokenMerging(0.5)).eval()
    return model


def _pruning_loss(model: nn.Module, needles: Needles, *, is_hard: bool) -> Tensor:
    """Thresholds are learned softly first; the rest of training goes on with tokens really gone, as in use."""
    assert isinstance(model, ReducingEncoder)
    if is_hard:
        for module in model.reducer_modules.values():
            cast("LearnedTokenPruning", module).harden()
    trace = model.trace(needles.tokens)
    logits = model.encoder.head(model.encoder.body.norm(trace[-1].x))[:, 0]
    return nn.functional.cross_entropy(logits, needles.answers) + _PENALTY * pruning_penalty(trace[:1])


def answer(arm: str, model: nn.Module, needles: Needles) -> Tensor:
    """Scores of the classes at the reading token, [B, NUM_CLASSES]; only masks are told what is padding."""
    if arm == "packed":
        return run_packed(model, needles.tokens, key_mask=needles.key_mask)[:, 0]
    outputs: Tensor = model(needles.tokens, key_mask=needles.key_mask if arm in _MASKED else None)
    return outputs[:, 0]


def _correct(arm: str, model: nn.Module, needles: Needles) -> Tensor:
    """Whether the class is right, one value an example."""
    with torch.no_grad():
        return (answer(arm, model, needles).argmax(dim=1) == needles.answers).double()


def distractor_mass(arm: str, model: nn.Module, needles: Needles) -> Tensor:
    """Share of the reading token's attention that lands on noise, mean over heads and layers, [B].

    Attention is linear in its values: with ones for noise and zeros elsewhere in their place, each op gives the sum
    of the weights that noise gets. Tokens that have left get none.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(op: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((op, args, kwargs))

    ops = [cast("nn.Module", module.op) for module in model.modules() if isinstance(module, SelfAttention)]
    with ExitStack() as hooks, torch.no_grad():
        for op in ops:
            hooks.enter_context(op.register_forward_pre_hook(note, with_kwargs=True))
        if isinstance(model, ReducingEncoder):
            left = [tokens.sources for tokens in model.trace(needles.tokens)[:-1]]
        else:
            model(needles.tokens, key_mask=needles.key_mask if arm in _MASKED else None)  # packed or not, the same
            left = []
    masses = []
    for i, (op, (q, k, _), kwargs) in enumerate(calls):
        noise = _of_present(needles.noise, left[i - 1], k.shape[-2]) if i and left else needles.noise.float()
        values = noise[:, None, :, None].expand(*k.shape[:-1], 1)
        with torch.no_grad():
            masses.append(op(q, k, values, **kwargs)[:, :, 0, 0].mean(dim=1))
    return torch.stack(masses).mean(dim=0)


def _of_present(noise: Tensor, sources: Tensor, num_tokens: int) -> Tensor:
    """Which of the tokens that are left are noise, [B, N] float; sources: [B, N0], -1 where a token left."""
    present = (noise & (sources >= 0)).float()
    return present.new_zeros(len(noise), num_tokens).scatter_add(1, sources.clamp(min=0), present)


def _costs(
    arm: str, model: nn.Module, needles: Needles, share: float, repeats: int, device: torch.device
) -> Iterator[Measurement]:
    """FLOPs of one example at any share, seconds at the lowest and the highest."""
    num = len(needles.answers)
    step = partial(_correct, arm, model, needles)
    yield _record("flops", "FLOP", count_flops(step) / num, share)
    if share in (_SHARES[0], _SHARES[-1]):
        for repeat, seconds in enumerate(measure_latency(step, device=device, repeats=repeats).times_s):
            yield _record("latency_s", "s", seconds / num, share, repeat)


EXPERIMENT = NoiseSensitivity()
