"""A made-up catalogue and summaries: the shapes that real runs have, with numbers that mean nothing."""

import math

from transformer_problems.catalogue import Catalogue, Criterion, Outcome, Problem, Reference, Solution, Treatment
from transformer_problems.core.records import Cell, Environment, Interval, Measurement, Verdict, VerdictWord
from transformer_problems.core.summaries import Arm, Chart, Column, Line, Point, ProblemSummary, Row

ENVIRONMENT = Environment(
    version="0.1.0",
    revision="0123456789abcdef",
    python="3.12.1",
    torch="2.13.0",
    platform="Linux x86_64",
    processor="AMD EPYC 9B45",
    device="cpu",
    threads=2,
    dtype="float32",
    date="2026-01-31",
)


def around(value: float, share: float = 0.04) -> Interval:
    return Interval(value, value * (1 - share), value * (1 + share))


def quadratic() -> ProblemSummary:
    """Like problem 01: seconds against tokens on logarithmic axes, eight arms, seven of them drawn."""
    lengths = [128 * 2**i for i in range(7)]
    arms = {
        Arm("dense", "dense attention"): (2e-3, 2.0),
        Arm("sparse", "Sparse, strided", "sparse-attention", lead=True): (4e-3, 1.5),
        Arm("sparse_fixed", "Sparse, fixed", "sparse-attention"): (4.2e-3, 1.5),
        Arm("longformer", "Longformer", "longformer", lead=True): (5e-3, 1.03),
        Arm("linformer", "Linformer (encoder)", "linformer", lead=True): (1.5e-3, 1.0),
        Arm("performer", "Performer", "performer", lead=True): (3.8e-3, 1.0),
        Arm("flash", "FlashAttention (PyTorch)", "flash-attention", lead=True): (1.1e-3, 1.9),
        Arm("xl", "Transformer-XL", "transformer-xl", lead=True): (4.9e-3, 1.0),
    }
    lines, rows = [], []
    for arm, (start, power) in arms.items():
        values = [start * (n / lengths[0]) ** power for n in lengths]
        lines.append(Line(arm, tuple(Point(n, around(v)) for n, v in zip(lengths, values, strict=True))))
        speedup = 2e-3 * 64**2 / values[-1]
        word: VerdictWord = "helps" if speedup > 2.6 else "inconclusive"
        rows.append(
            Row(
                arm,
                (around(values[-1]), around(power, 0.02), Interval(*[values[-1] * 1e8] * 3), None),
                None if arm.slug == "dense" else Verdict(1, arm.slug, word, around(speedup), "a reason"),
                gain="" if arm.slug == "dense" else f"{speedup:.0f}x less time at 8,192 tokens (21 to 25)",
                cost="" if arm.slug == "dense" else "0.12 bits/byte more after equal steps; 0.03 after equal seconds",
            )
        )
    chart = Chart(
        metric="latency_s",
        problem_title="One dense attention layer, forward and backward",
        solutions_title="The same with each solution",
        x_label="sequence length, tokens",
        y_label="seconds",
        better="lower",
        x_log=True,
        y_log=True,
        draws=("dense", "sparse", "longformer", "linformer", "performer", "flash", "xl"),
    )
    columns = (
        Column("latency_s", "seconds at longest", at="last", better="lower"),
        Column("latency_s", "exponent of time", better="lower"),
        Column("peak_memory_bytes", "peak memory at longest", at="last", better="lower"),
        Column("bits_per_byte", "bits/byte, equal steps", better="lower"),
    )
    finding = (
        "From 4,096 to 8,192 tokens, twice as many, one dense attention layer takes 3.9 times as long and "
        "4.0 times the memory."
    )
    notes = ("linformer, seed 2: the worker ran out of memory",)
    return ProblemSummary(1, finding, chart, tuple(lines), columns, tuple(rows), "standard", 3, ENVIRONMENT, notes)


GENERALIZATION_ARMS = (
    Arm("learned", "learned positions"),
    Arm("sinusoidal", "sinusoidal"),
    Arm("rope", "RoPE"),
    Arm("t5", "T5 buckets", "relative-position-encoding", lead=True),
    Arm("shaw", "Shaw, clipped", "relative-position-encoding"),
    Arm("xl", "Transformer-XL relative", "relative-position-encoding"),
    Arm("pi", "RoPE + interpolation", "rope-scaling"),
    Arm("ntk", "RoPE + NTK", "rope-scaling"),
    Arm("dynamic", "RoPE + dynamic NTK", "rope-scaling"),
    Arm("yarn", "RoPE + YaRN", "rope-scaling", lead=True),
    Arm("yarn_tuned", "RoPE + YaRN, tuned", "rope-scaling"),
    Arm("alibi", "ALiBi", "alibi", lead=True),
    Arm("xpos", "xPos", "length-extrapolation", lead=True),
    Arm("random", "randomized positions", "length-extrapolation"),
)


def generalization(num_arms: int = 14) -> ProblemSummary:
    """Like problem 09: bits per byte against multiples of the training length, many arms that end close together."""
    arms = GENERALIZATION_ARMS[:num_arms]
    multiples = (1.0, 2.0, 4.0, 8.0, 16.0)
    words: tuple[VerdictWord, ...] = ("helps", "no effect", "hurts", "inconclusive", "not runnable here")
    lines, rows = [], []
    for i, arm in enumerate(arms):
        growth = (0.62, 0.5, 0.45, 0.01, 0.06, 0.05, 0.2, 0.15, 0.12, 0.09, 0.0, -0.02, 0.08, 0.07)[i]
        values = [2.7 + 0.03 * math.sin(3 * i) + growth * math.log2(m) for m in multiples]
        lines.append(Line(arm, tuple(Point(m, around(v, 0.02)) for m, v in zip(multiples, values, strict=True))))
        verdict = Verdict(9, arm.slug, words[i % 5], around(0.5), "the worker ran out of memory")
        said = verdict.word != "not runnable here"
        rows.append(
            Row(
                arm,
                (around(values[0]), around(values[2]), around(values[4], 0.02), Interval(0.11, 0.02, 0.4)),
                verdict if arm.solution else None,
                gain=f"{0.1 * i:.2f} bits/byte less at 16 times the training length" if arm.solution and said else "",
                cost="recall falls from 0.61 to 0.11; 1.2x the time a step" if arm.solution and said else "",
            )
        )
    chart = Chart(
        metric="bits_per_byte",
        problem_title="Held-out loss beyond the training length",
        solutions_title="The same with each solution",
        x_label="times the training length",
        y_label="bits per byte",
        better="lower",
        x_log=True,
    )
    columns = (
        Column("bits_per_byte", "bits/byte at 1x", at=1.0, better="lower"),
        Column("bits_per_byte", "bits/byte at 4x", at=4.0, better="lower"),
        Column("bits_per_byte", "bits/byte at 16x", at="last", better="lower"),
        Column("recall", "recall at 16x", at="last", better="higher"),
    )
    finding = "Trained at 64 tokens, learned positions lose 2.5 bits a byte by 1,024 tokens: beyond 64 they are noise."
    return ProblemSummary(9, finding, chart, tuple(lines), columns, tuple(rows), "quick", 1, ENVIRONMENT)


def records(summary: ProblemSummary) -> list[tuple[Cell, Measurement]]:
    """Two seeds of three repeats behind every point of a summary's chart."""
    return [
        (
            Cell(summary.number, line.arm.slug, summary.scale, seed),
            Measurement(summary.chart.metric, "s", point.y.value * (1 + 0.01 * repeat), point.x, "tokens", repeat),
        )
        for line in summary.lines
        for seed in (0, 1)
        for point in line.points
        for repeat in (0, 1, 2)
    ]


LONGFORMER_PAPER = Reference(
    "Longformer: <The> Long-Document Transformer", "Beltagy, Peters & Cohan", 2020, "arXiv:2004.05150"
)
RULE = Criterion("Time falls by a tenth, with a < b.", "latency_s", "last", "lower", "ratio", 0.1)


def trouble(number: int, slug: str, title: str, category: str) -> Problem:
    return Problem(
        number,
        slug,
        title,
        category,
        statement="Twice the text costs <script>four</script> times the time.",
        cause="Every pair is compared & stored.",
        meter="Seconds of one\nlayer.",
        baseline="Dense attention.",
        criterion=RULE,
        references=(Reference("Attention", "Vaswani et al.", 2017, "ISBN 0-262-01243-0"),),
    )


def pair(problem: Problem, slug: str, name: str, *, measured: bool) -> Treatment:
    how = "Each token attends to a <window> & no more."
    code = ("solutions.attention.self_attention:SelfAttention",)
    solution = Solution(slug, name, "attention", how, code, "", (LONGFORMER_PAPER,))
    return Treatment(
        solution,
        problem,
        name,
        claim="Cost grows as N | not N squared.",
        cost="Far tokens meet only through layers.",
        choose="when documents are long.",
        criterion=RULE,
        code=code,
        example="",
        outcome=Outcome("helps", "less time", "more bits") if measured else None,
    )


def shelf() -> Catalogue:
    """Three problems: two like those of the summaries above, and one that is planned."""
    problems = (
        trouble(1, "quadratic_complexity", "Quadratic complexity", "Efficiency"),
        trouble(2, "no_positional_awareness", "No positional awareness", "Architecture"),
        trouble(9, "length_generalization", "Poor length generalization", "Generalization"),
    )
    first, second, ninth = problems
    pairs = [
        pair(problem, row.arm.solution or "", row.arm.label, measured=True)
        for problem, summary in ((first, quadratic()), (ninth, generalization()))
        for row in summary.rows
        if row.arm.lead
    ]
    pairs += [pair(second, "rope", "RoPE", measured=False), pair(second, "alibi", "ALiBi", measured=False)]
    return Catalogue(problems, tuple(p.solution for p in pairs), tuple(pairs))
