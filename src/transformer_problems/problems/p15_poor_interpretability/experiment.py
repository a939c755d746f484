"""Evidence planted in text: which explanation of a classifier's answer finds it, in models of more and more layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.text import load_text
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.meters.latency import measure_latency
from transformer_problems.lab.results import Results
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p15_poor_interpretability.classifiers import (
    NUM_HEADS,
    ClassifierPlan,
    examples,
    right_answers,
    trained_classifier,
)
from transformer_problems.problems.p15_poor_interpretability.explanations import (
    READ_AT,
    STEPS,
    explanation_of,
    probe_scores,
)
from transformer_problems.problems.p15_poor_interpretability.found_heads import SHARE, ablation_losses
from transformer_problems.problems.p15_poor_interpretability.planted import (
    BLANK_TOKEN,
    NUM_CLASSES,
    VOTES,
    Planted,
)
from transformer_problems.solutions.interpretability.attribution import Attribution
from transformer_problems.solutions.interpretability.faithfulness import faithfulness
from transformer_problems.solutions.interpretability.readable import readable

_CHUNK = 32  # examples explained at a time
_TIMED = 4  # examples in the batch whose time is taken
_BASELINE = "last_attention"


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here.

    Args:
        layers: Depths of the models that are explained.
        num_known: Examples that probes and the search for heads learn from.
        num_examples: Held-out examples that are explained.
        num_flows: How many of them attention flow explains, which takes N maximum flows each.
    """

    layers: tuple[int, ...]
    plan: ClassifierPlan
    num_known: int
    num_examples: int
    num_flows: int
    repeats: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size((1, 2), ClassifierPlan(32, 48, 200, 32), 64, 32, 8, repeats=3, seeds=1),
    "standard": _Size((1, 2, 4), ClassifierPlan(32, 48, 600, 32), 256, 96, 48, repeats=3, seeds=3),
    "full": _Size((1, 2, 4, 8), ClassifierPlan(128, 128, 10_000, 64), 1024, 512, 64, repeats=9, seeds=5),
}


class PoorInterpretability:
    """Nine tokens planted in text vote for three classes; what tells the winning class is to be found."""

    problem = 15
    arms = (
        Arm(_BASELINE, "attention of the last layer"),
        Arm("rollout", "Attention rollout", "attention-rollout", lead=True),
        Arm("flow", "Attention flow", "attention-rollout"),
        Arm("probing", "Probe told the evidence", "probing-models", lead=True),
        Arm("integrated", "Integrated gradients", "saliency-methods", lead=True),
        Arm("gradient_x_input", "Gradient x input", "saliency-methods"),
        Arm("smooth_grad", "SmoothGrad x input", "saliency-methods"),
        Arm("mechanistic", "Activation patching", "mechanistic-interpretability", lead=True),
        Arm("random", "random scores"),
    )
    chart = Chart(
        metric="auc",
        problem_title="Evidence found by the attention of the last layer",
        solutions_title="The same with each solution",
        x_label="layers of the model",
        y_label="area under the ROC curve (chance 0.5)",
        better="higher",
        x_log=True,
        y_from=0.5,
        draws=(_BASELINE, "rollout", "probing", "integrated", "mechanistic", "random"),
    )
    columns = (
        Column("auc", "AUC, 1 layer", at=1.0, better="higher"),
        Column("auc", "AUC, most layers", at="last", better="higher"),
        Column("auc_among_planted", "AUC among planted tokens", at="last", better="higher"),
        Column("comprehensiveness", "probability lost without it", at="last", better="higher"),
        Column("sufficiency", "lost with it alone", at="last", better="lower"),
        Column("latency_s", "seconds an explanation", at="last", better="lower"),
    )
    gains = (Effect("auc", "difference", ("less AUC", "more AUC"), "last", "at {x:.0f} layers"),)
    costs = (
        Effect("latency_s", "ratio", ("less time", "more time"), "last", "an explanation"),
        Effect(
            "comprehensiveness",
            "difference",
            ("points less lost", "points more lost"),
            "last",
            "without what it names",
            scale=100,
        ),
    )
    shared_examples = frozenset({"auc", "auc_among_planted", "comprehensiveness", "sufficiency"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size, arm, device = _SIZES[bench.cell.scale], bench.cell.arm, bench.device
        text = load_text()
        known = examples(text.valid, size.num_known, size.plan, "known").to(device)
        planted = examples(text.test, size.num_examples, size.plan, "explained").to(device)
        if arm == "flow":
            planted = planted.rows(0, size.num_flows)
        for i, layers in enumerate(size.layers):

            def progress(done: float, i: int = i) -> None:
                bench.progress((i + 0.8 * done) / len(size.layers))

            model = trained_classifier(bench, size.plan, layers, text, progress)
            explain = explanation_of(arm, model, known, bench.cell.seed)
            for start in range(0, len(planted), _CHUNK):
                part = planted.rows(start, start + _CHUNK)
                for metric, values in _worth(model, part, explain(part)):
                    yield from _by_example(metric, values, layers, start)
            timed = partial(explain, planted.rows(0, _TIMED))
            for repeat, seconds in enumerate(measure_latency(timed, device=device, repeats=size.repeats).times_s):
                yield Measurement("latency_s", "s", seconds / _TIMED, layers, "layers", repeat)
            yield from _beside(arm, model, planted, known, layers)
            bench.progress((i + 1) / len(size.layers))

    def finding(self, results: Results) -> str:
        depths = results.xs(_BASELINE, "auc")
        aucs = ", ".join(f"{results.mean(_BASELINE, 'auc', x):.3f} with {_layers(x)}" for x in depths)
        last = depths[-1]
        return (
            f"Scores from the attention of the last layer have an area under the ROC curve of {aucs}, where chance "
            f"has 0.5. Of planted tokens alone, those that tell the answer against those that tell another, they have "
            f"{results.mean(_BASELINE, 'auc_among_planted', last):.3f} with {_layers(last)}, in a model that is right "
            f"in {results.mean(_BASELINE, 'accuracy', last):.0%} of the examples."
        )

    def notes(self, results: Results) -> tuple[str, ...]:
        size = _SIZES[results.scale]
        plan, (most, *others) = size.plan, VOTES
        against = " and ".join(map(str, others))
        return (
            f"Each example is {plan.length} bytes of real text. {sum(VOTES)} tokens outside the bytes are planted at "
            f"random places: {most} tell the answer, one of {NUM_CLASSES} classes, and {against} tell two other "
            f"classes. Models of width {plan.width} with {NUM_HEADS} heads and sinusoidal positions train for "
            f"{plan.steps} steps of {plan.batch_size} with AdamW at a peak rate of 0.003, in texts with a share of "
            "blank tokens that is drawn from 0 to 1. All methods explain the same models and the right class, whatever "
            f"the model answers, in {size.num_examples} held-out examples, attention flow in {size.num_flows} of them.",
            "A blank token is the neutral input of integrated gradients and stands for what is deleted: 1, 5, 10, 20 "
            "and 50% of the tokens. Random scores, deleted in the same way, tell what deletion alone does. "
            f"Integrated gradients take {STEPS} points and SmoothGrad {STEPS} noisy copies. Seconds of the probe "
            "leave out its training.",
            f"The probe is told what no other method is: where the evidence of {size.num_known} other examples stands. "
            "Patching puts one embedding at a time into the run of another text, all of whose tokens differ.",
            *filter(None, (_probe_note(results), _heads_note(results), _gap_note(results))),
        )


def _worth(model: Encoder, planted: Planted, found: Attribution) -> Iterator[tuple[str, Tensor]]:
    """What an explanation is worth, [B] each."""
    yield "auc", auc(found.scores, planted.evidence, planted.candidates & ~planted.evidence)
    yield "auc_among_planted", auc(found.scores, planted.evidence, planted.planted & ~planted.evidence)
    reader = readable(model, read_at=READ_AT)
    trust = faithfulness(
        reader, planted.tokens, found, keep=~planted.candidates, mask_token=BLANK_TOKEN, num_controls=1
    )
    yield "comprehensiveness", trust.comprehensiveness
    yield "sufficiency", trust.sufficiency
    if found.completeness_gap is not None:
        yield "completeness_gap", found.completeness_gap.abs()


def auc(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve of each row: the share of pairs in which the positive one scores higher, ties half.

    Shape:
        scores: [B, N]; positive, negative: [B, N] bool, as many in each row; output: [B].
    """
    high, low = (scores[chosen].view(len(scores), -1) for chosen in (positive, negative))
    above = high[:, :, None] - low[:, None, :]
    return (above > 0).double().mean(dim=(1, 2)) + 0.5 * (above == 0).double().mean(dim=(1, 2))


def _beside(arm: str, model: Encoder, planted: Planted, known: Planted, layers: int) -> Iterator[Measurement]:
    """What only one arm tells: the baseline of the model's answers, a probe of itself, patching of the heads found."""
    if arm == _BASELINE:
        yield from _by_example("accuracy", right_answers(model, planted), layers)
    if arm == "probing":
        scores = probe_scores(model, known)
        yield Measurement("probe_accuracy", "1", scores.accuracy, layers, "layers")
        yield Measurement("selectivity", "1", scores.selectivity, layers, "layers")
    if arm == "mechanistic":
        found, others = ablation_losses(model, planted, known)
        yield from _by_example("loss_without_found_heads", found, layers)
        yield from _by_example("loss_without_other_heads", others, layers)


def _by_example(metric: str, values: Tensor, layers: int, first: int = 0) -> Iterator[Measurement]:
    for repeat, value in enumerate(values.tolist(), start=first):
        yield Measurement(metric, "1", value, layers, "layers", repeat)


def _probe_note(results: Results) -> str:
    said = [
        f"{results.mean('probing', 'probe_accuracy', x):.2f} with {_layers(x)} (selectivity "
        f"{results.mean('probing', 'selectivity', x):.2f})"
        for x in results.xs("probing", "selectivity")
    ]
    return f"Of evidence and as many other tokens, the probe tells rightly {', '.join(said)}." if said else ""


def _heads_note(results: Results) -> str:
    said = [
        f"{results.mean('mechanistic', 'loss_without_found_heads', x):.2f} against "
        f"{results.mean('mechanistic', 'loss_without_other_heads', x):.2f} with {_layers(x)}"
        for x in results.xs("mechanistic", "loss_without_found_heads")
    ]
    return (
        f"Without the {SHARE:.0%} of heads that patching finds at the answer's position, the answer's probability "
        f"loses, against as many other heads drawn at random: {', '.join(said)}. Heads are put at their mean."
        if said
        else ""
    )


def _gap_note(results: Results) -> str:
    said = [
        f"{results.mean('integrated', 'completeness_gap', x):.2g} with {_layers(x)}"
        for x in results.xs("integrated", "completeness_gap")
    ]
    return f"Scores of integrated gradients miss their sum, in logits, by {', '.join(said)}." if said else ""


def _layers(x: float) -> str:
    return f"{x:.0f} layer{'' if x == 1 else 's'}"


EXPERIMENT = PoorInterpretability()
