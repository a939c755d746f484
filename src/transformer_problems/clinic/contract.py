"""What has to hold of a treated model, decided before anything is measured, and the word for what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.subject import Inputs, Subject
from transformer_problems.clinic.excerpts import losses_by_text, to_judge, within
from transformer_problems.core.findings import Severity
from transformer_problems.core.records import Interval
from transformer_problems.lab.statistics import mean_interval, paired_difference

MOST_LOSS = 0.02  # nats a token that the loss within the trained length may grow by: 2% in perplexity
LEAST_COSINE = 0.99  # of the answers of a model without a loss
_MOST_APART = 1e-5  # of answers of one model, relative: a few roundings of float32
_NUM_ANSWERS, _LENGTH = 8, 64  # examples whose answers are compared, and their tokens

State = Literal["kept", "broken", "not sure"]
Change = Literal["better", "worse", "same", "not sure"]
Verdict = Literal["helps", "no effect", "hurts", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that has to hold, and whether it does.

    Args:
        name: "quality", "claim" or "read back".
        label: What is read, in plain words.
        effect: After minus before, or after over before, paired where examples are the same; or the answers' likeness.
        compare: What the effect is.
        rule: What has to hold of it, in words.
        problem: Of a claim, the problem that is to be eased.
        change: Of a claim, what became of it.
        left: Of a claim that a check-up reads alike, how grave what is left is by its thresholds.
    """

    name: Literal["quality", "claim", "read back"]
    label: str
    unit: str
    before: Interval | None
    after: Interval | None
    effect: Interval
    compare: Literal["difference", "ratio", "likeness"]
    rule: str
    state: State
    problem: int | None = None
    change: Change | None = None
    left: Severity | None = None


def verdict(clauses: Sequence[Clause], *, on_foreign_texts: bool = False) -> Verdict:
    """What all clauses amount to.

    Args:
        on_foreign_texts: Whether they were measured on texts that say little of the model, by which nothing helps.
    """
    quality = [clause.state for clause in clauses if clause.name == "quality"]
    changes = [clause.change for clause in clauses if clause.name == "claim"]
    if "broken" in quality or "worse" in changes:
        return "hurts"
    if on_foreign_texts or any(clause.state != "kept" for clause in clauses if clause.name != "claim"):
        return "inconclusive"
    if "better" in changes:
        return "helps"
    return "no effect" if all(change == "same" for change in changes) else "inconclusive"


def claimed(
    problem: int,
    label: str,
    unit: str,
    before: Interval,
    after: Interval,
    effect: Interval,
    compare: Literal["difference", "ratio"],
    margin: float,
) -> Clause:
    """The clause of a reading that is to fall: better or worse where the effect's whole interval is beyond a margin.

    Args:
        margin: A change no larger counts as none: of a difference in its unit, of a ratio as a share.
    """
    low, high = (-margin, margin) if compare == "difference" else (1 / (1 + margin), 1 + margin)
    change: Change = "not sure"
    if effect.high < low:
        change = "better"
    elif effect.low > high:
        change = "worse"
    elif low <= effect.low and effect.high <= high:
        change = "same"
    state: State = "kept" if change == "better" else "not sure" if change == "not sure" else "broken"
    least = f"{margin:g} {unit}" if compare == "difference" else f"{margin:.0%}"
    return Clause(
        "claim", label, unit, before, after, effect, compare, f"lower by more than {least}", state, problem, change
    )


def quality(before: Visit, after: Visit) -> Clause:
    """That answers within the trained length stay as good, on texts or images that no setting was chosen by."""
    if not before.subject.has_loss:
        return _likeness(before, after)
    num, length = within(before)
    texts = to_judge(before, num, length)
    old, new = (losses_by_text(visit.subject, texts, visit)[None].numpy() for visit in (before, after))
    label, rule = f"loss on {len(texts)} texts of {length:,} tokens", f"grows by at most {MOST_LOSS:g}"
    if not np.isfinite(new).all():
        broken = exactly(inf)
        return Clause(
            "quality", label, "nats a token", mean_interval(old), broken, broken, "difference", rule, "broken"
        )
    effect = paired_difference(old, new)
    return Clause(
        "quality",
        label,
        "nats a token",
        mean_interval(old),
        mean_interval(new),
        effect,
        "difference",
        rule,
        _at_most(effect, MOST_LOSS),
    )


def read_back(treated: Visit, again: Subject) -> Clause:
    """That the folder, read back, answers as the treated model did."""
    inputs = _examples(treated)
    one, other = (answers(subject, inputs) for subject in (treated.subject, again))
    apart = inf  # where they are not even of one shape
    if one.shape == other.shape:
        apart = float((one - other).norm() / one.norm().clamp(min=1e-30))
    state: State = "kept" if apart <= _MOST_APART else "broken"  # which NaN is, too
    return Clause(
        "read back",
        "how far the folder, read back, answers from the treated model",
        "1",
        None,
        None,
        exactly(apart),
        "difference",
        f"at most {_MOST_APART:g} of the answers",
        state,
    )


@torch.no_grad()
def answers(subject: Subject, inputs: Inputs) -> Tensor:
    """What a model gives, one example at a time, [n, ...] in float32 on the CPU: its pass must not depend on others."""
    num = len(next(iter(inputs.values())))
    rows = [subject.run({name: value[i : i + 1] for name, value in inputs.items()}).output for i in range(num)]
    return torch.cat(rows).float().cpu()


def _likeness(before: Visit, after: Visit) -> Clause:
    """The cosine of the answers of a model without a loss, of each example its mean over the tokens."""
    inputs = _examples(before)
    one, other = (answers(visit.subject, inputs) for visit in (before, after))
    cosines = (
        nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).flatten(1).mean(dim=1)
        if (one.dim() > 2)
        else nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    )
    what = "images" if before.subject.kind == "image" else f"texts of {inputs['input_ids'].shape[1]} tokens"
    label, rule = f"cosine of the answers on {len(cosines)} {what}", f"at least {LEAST_COSINE:g}"
    is_finite = bool(cosines.isfinite().all())
    effect = mean_interval(cosines[None].numpy()) if is_finite else exactly(-inf)
    state: State = "not sure"
    if effect.low >= LEAST_COSINE:
        state = "kept"
    elif effect.high < LEAST_COSINE:
        state = "broken"
    return Clause("quality", label, "1", None, None, effect, "likeness", rule, state)


def _examples(visit: Visit) -> Inputs:
    return visit.inputs(_NUM_ANSWERS, min(_LENGTH, (visit.subject.trained_len or _LENGTH + 1) - 1))


def _at_most(effect: Interval, most: float) -> State:
    if effect.high <= most:
        return "kept"
    return "broken" if effect.low > most else "not sure"
