"""The catalogue says what the project is about: 18 problems, 77 pairs, each with claim, cost, choice and sources."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from transformer_problems.catalogue import Reference, Solution, Treatment, load_catalogue
from transformer_problems.core.errors import UnknownNameError

PACKAGE = Path(__file__).parents[2] / "src" / "transformer_problems"
CATALOGUE = load_catalogue()
PAIRS = [pair for problem in CATALOGUE.problems for pair in CATALOGUE.pairs(problem)]
REFERENCES = sorted(
    {reference for entry in (*CATALOGUE.problems, *CATALOGUE.solutions) for reference in entry.references},
    key=lambda reference: (reference.id, reference.title),
)

TITLES = [
    (1, "Quadratic complexity", "Efficiency"),
    (2, "No positional awareness", "Architecture"),
    (3, "Fixed context window", "Memory"),
    (4, "Slow autoregressive decoding", "Inference"),
    (5, "No local inductive bias", "Architecture"),
    (6, "Data-hungry architecture", "Training"),
    (7, "High memory footprint", "Efficiency"),
    (8, "High compute and power cost", "Efficiency"),
    (9, "Poor length generalization", "Generalization"),
    (10, "Training instability", "Training"),
    (11, "Attention over-smoothing", "Architecture"),
    (12, "No recurrence / streaming", "Architecture"),
    (13, "Large model size", "Deployment"),
    (14, "Sensitivity to noise tokens", "Robustness"),
    (15, "Poor interpretability", "Explainability"),
    (16, "Inefficient for dense inputs", "Vision/Video"),
    (17, "Hardware inefficiency", "Efficiency"),
    (18, "Real-time deployment", "Deployment"),
]
NAMES = [
    (1, "Sparse Attention"),
    (1, "Longformer"),
    (1, "Linformer"),
    (1, "Performer"),
    (1, "FlashAttention"),
    (1, "Transformer-XL"),
    (2, "Sinusoidal PE"),
    (2, "Learnable PE"),
    (2, "Relative PE"),
    (2, "RoPE"),
    (2, "ALiBi"),
    (3, "Transformer-XL"),
    (3, "RAG"),
    (3, "External Memory"),
    (3, "Mamba"),
    (4, "KV Cache"),
    (4, "Speculative Decoding"),
    (4, "Non-Autoregressive Models"),
    (4, "Distillation"),
    (5, "CNN + Transformer"),
    (5, "Swin"),
    (5, "Conformer"),
    (5, "Hierarchical ViT"),
    (6, "Self-Supervised Pretraining"),
    (6, "Transfer Learning"),
    (6, "Fine-Tuning"),
    (6, "Knowledge Distillation"),
    (7, "FlashAttention"),
    (7, "KV Cache Optimization"),
    (7, "Gradient Checkpointing"),
    (7, "Memory-Efficient Attention"),
    (8, "Quantization INT8/INT4"),
    (8, "Lightweight Transformers"),
    (8, "Operator Fusion"),
    (8, "Pruning"),
    (9, "Relative Position Encoding"),
    (9, "RoPE Scaling"),
    (9, "ALiBi"),
    (9, "Length Extrapolation"),
    (10, "Pre-LayerNorm"),
    (10, "Learning Rate Warmup"),
    (10, "AdamW"),
    (10, "Gradient Clipping"),
    (11, "Residual Scaling"),
    (11, "DropHead"),
    (11, "Attention Temperature Control"),
    (11, "Skip Connections"),
    (12, "Transformer-XL"),
    (12, "Chunk-based Attention"),
    (12, "Streaming Transformers"),
    (12, "Delta Attention"),
    (13, "LoRA"),
    (13, "QLoRA"),
    (13, "Parameter Sharing"),
    (13, "Pruning"),
    (13, "Distillation"),
    (14, "Sparse Attention"),
    (14, "Token Pruning"),
    (14, "Attention Masking"),
    (14, "Gating Mechanisms"),
    (15, "Attention Rollout"),
    (15, "Probing Models"),
    (15, "Saliency Methods"),
    (15, "Mechanistic Interpretability"),
    (16, "Patch Embedding"),
    (16, "Hierarchical Vision Transformers"),
    (16, "Tubelet Embedding"),
    (16, "Swin"),
    (17, "FlashAttention"),
    (17, "Fused MHA Kernels"),
    (17, "xFormers"),
    (17, "Custom CUDA Kernels"),
    (18, "Quantization"),
    (18, "Pruning"),
    (18, "Distillation"),
    (18, "Edge-Optimized Transformers"),
    (18, "ONNX"),
]


def test_the_18_problems_in_order() -> None:
    assert [(p.number, p.title, p.category) for p in CATALOGUE.problems] == TITLES


def test_the_77_pairs_in_order() -> None:
    assert len(NAMES) == 77
    assert [(pair.problem.number, pair.name) for pair in PAIRS] == NAMES


@pytest.mark.parametrize(
    ("number", "folder"),
    [
        (1, "01_quadratic_complexity"),
        (2, "02_no_positional_awareness"),
        (9, "09_length_generalization"),
        (18, "18_realtime_deployment"),
    ],
)
def test_folders(number: int, folder: str) -> None:
    assert CATALOGUE.problem(number).folder == folder


def test_one_method_is_one_entry() -> None:
    treated = {s.slug: [p.problem.number for p in PAIRS if p.solution == s] for s in CATALOGUE.solutions}
    assert {slug: numbers for slug, numbers in treated.items() if len(numbers) > 1} == {
        "sparse-attention": [1, 14],
        "flash-attention": [1, 7, 17],
        "transformer-xl": [1, 3, 12],
        "relative-pe": [2, 9],
        "alibi": [2, 9],
        "swin": [5, 16],
        "quantization": [8, 18],
        "pruning": [8, 13, 18],
        "distillation": [4, 6, 13, 18],
        "hierarchical-vit": [5, 16],
    }
    assert all(treated.values()), "a solution that treats nothing"


def test_only_problems_with_experiments_are_ready_for_the_judge() -> None:
    rules = {
        p.number: (p.criterion.metric, p.criterion.at, p.criterion.better, p.criterion.compare, p.criterion.margin)
        for p in CATALOGUE.problems
        if p.criterion.metric
    }
    assert rules == {
        1: ("latency_s", "last", "lower", "ratio", 0.1),
        2: ("order_accuracy", "last", "higher", "difference", 0.05),
        3: ("recall", 32.0, "higher", "difference", 0.05),
        4: ("tokens_per_s", "last", "higher", "ratio", 0.1),
        5: ("accuracy", 20.0, "higher", "difference", 0.02),
        6: ("label_efficiency", None, "higher", "difference", 0.02),
        7: ("peak_memory_bytes", "last", "lower", "ratio", 0.1),
        8: ("seconds", "last", "lower", "ratio", 0.1),
        9: ("bits_per_byte", "last", "lower", "difference", 0.05),
        10: ("learning_rate_sensitivity", None, "lower", "ratio", 0.1),
        11: ("rank_one_distance", "last", "higher", "ratio", 0.1),
        12: ("latency_s", "last", "lower", "ratio", 0.1),
        13: ("finetune_peak_bytes", "last", "lower", "ratio", 0.1),
        14: ("accuracy", 0.95, "higher", "difference", 0.02),
        15: ("auc", "last", "higher", "difference", 0.02),
        16: ("flops", "last", "lower", "ratio", 0.1),
        17: ("seconds", "last", "lower", "ratio", 0.1),
        18: ("p95_s", None, "lower", "ratio", 0.1),
    }
    own = {pair.key: pair.criterion.metric for pair in PAIRS if pair.criterion != pair.problem.criterion}
    assert own == {
        "01/flash-attention": "peak_memory_bytes",
        "11/drophead": "head_dominance",
        "13/parameter-sharing": "stored_bytes",
        "13/pruning": "stored_bytes",
        "13/distillation": "stored_bytes",
    }


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.key)
def test_a_pair_is_planned_or_has_a_verdict(pair: Treatment) -> None:
    assert (pair.status == "planned") == (pair.verdict is None)
    if pair.status == "measured":
        assert pair.code, "measured without code"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.key)
def test_texts_are_sentences(pair: Treatment) -> None:
    for text in (pair.claim, pair.cost, pair.solution.how, pair.problem.cause, pair.criterion.text):
        assert not text[0].islower() or text.startswith("xPos")
    for text in (pair.claim, pair.cost, pair.choose, pair.solution.how, pair.problem.statement, pair.criterion.text):
        assert text.endswith(".")


@pytest.mark.parametrize("solution", [s for s in CATALOGUE.solutions if s.code], ids=lambda s: s.slug)
def test_code_names_files_that_exist(solution: Solution) -> None:
    paths = {path for pair in PAIRS if pair.solution == solution for path in pair.code} | set(solution.code)
    for path in paths:
        module = path.partition(":")[0]
        assert PACKAGE.joinpath(*module.split(".")).with_suffix(".py").is_file(), path
    assert solution.example, "implemented, so show how it is used"


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.example], ids=lambda pair: pair.key)
def test_examples_are_short(pair: Treatment) -> None:
    assert 3 <= len([line for line in pair.example.splitlines() if line]) <= 8


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.id)
def test_references_are_consistent(reference: Reference) -> None:
    """One entry a publication, and not published before it was on arXiv."""
    same = Counter(r.id for r in REFERENCES)
    assert same[reference.id] == 1, "two spellings of one reference"
    if reference.id.startswith("arXiv:"):
        posted = 2000 + int(reference.id[6:8])
        assert posted <= reference.year <= posted + 2
    assert " et al." in reference.authors or " and " in reference.authors or " " not in reference.authors


def test_every_entry_names_its_sources() -> None:
    assert all(entry.references for entry in (*CATALOGUE.problems, *CATALOGUE.solutions))


def test_reading_the_catalogue_does_not_import_torch() -> None:
    program = (
        "import sys; from transformer_problems.catalogue import load_catalogue; load_catalogue(); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_where_nothing_is_near_a_command_lists_the_many_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown solution 'xyz'. See `transformer-problems list`.$"):
        CATALOGUE.solution("xyz")


@pytest.mark.parametrize(
    "name", ["hierarchical-vit", "Hierarchical ViT", "hierarchical vision transformers", "  SWIN "]
)
def test_a_solution_is_found_by_every_name_it_goes_by(name: str) -> None:
    assert CATALOGUE.solution(name).slug == ("swin" if "swin" in name.lower() else "hierarchical-vit")


def test_every_name_leads_to_its_own_solution_and_no_problem_has_it() -> None:
    for treatment in CATALOGUE.treatments:
        for name in (treatment.name, treatment.solution.name, treatment.solution.slug):
            assert CATALOGUE.solution(name) == treatment.solution
            with pytest.raises(UnknownNameError):
                CATALOGUE.problem(name)
    shown = [treatment for solution in CATALOGUE.solutions for treatment in CATALOGUE.pairs_of(solution)]
    assert sorted(shown, key=lambda t: t.key) == sorted(CATALOGUE.treatments, key=lambda t: t.key)
