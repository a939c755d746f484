"""Every check-up on every family that people have: examined rightly, or refused in one line."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.decoding import CachedText, next_token_flops
from transformer_problems.checkpoints.loading import load_subject, subject_of
from transformer_problems.checkpoints.material import Material, machines_images, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.diagnose import examine
from transformer_problems.clinic.ward import byte_tokenizer
from transformer_problems.core.errors import CheckpointError
from transformer_problems.core.findings import Finding
from transformer_problems.core.seeding import seeded
from transformer_problems.lab.meters.roofline import Roofline
from transformer_problems.problems.p04_slow_decoding import checkup as decoding
from transformer_problems.problems.p06_data_hungry import checkup as labels
from transformer_problems.problems.p12_no_recurrence import checkup as streaming
from transformer_problems.problems.p17_hardware_inefficiency import checkup as use_of_the_machine
from transformer_problems.problems.p18_realtime_deployment import checkup as requests_in_time

WIDTH, LAYERS, HEADS, LENGTH, WINDOW = 32, 2, 4, 128, 16
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "initializer_range": 0.2,  # so large that attention is not even, as that of small random weights is
}
ENCODER = {**SIZES, "vocab_size": 260, "max_position_embeddings": LENGTH}
CAUSAL = {**ENCODER, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GROUPED = {**CAUSAL, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16, "sliding_window": WINDOW}
OFFSET = {**ENCODER, "max_position_embeddings": LENGTH + 2}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 4, "num_labels": 10}
SHORT_NAMES = {"vocab_size": 260, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
FALCON = {key: value for key, value in CAUSAL.items() if key not in ("pad_token_id", "intermediate_size")}
DISTANCES = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": WIDTH,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}

XLNET = {"vocab_size": 260, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 64}

CAUSALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**CAUSAL, "rotary_pct": 0.25}),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**SHORT_NAMES, **NO_ENDS, "rotary_dim": 4, "initializer_range": 0.2}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**CAUSAL, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "pad_token_id": 1, "init_std": 0.2},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, **MIXTURE}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**WIDE_HEADS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**WIDE_HEADS, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {**CAUSAL, "partial_rotary_factor": 0.5}),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 260, "d_model": WIDTH, "n_layers": 2, "n_heads": HEADS}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**WIDE_HEADS, **MIXTURE, "rope_parameters": None}),
}
CAUSALS["mpt"][2].update(max_seq_len=LENGTH, initializer_range=0.2)
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {**ENCODER, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    "deberta": ("DebertaForMaskedLM", "DebertaConfig", {**ENCODER, **DISTANCES}),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**ENCODER, **DISTANCES, "position_buckets": 16}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", OFFSET),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**ENCODER, "local_attention": WINDOW, "pad_token_id": 257, "layer_types": None},
    ),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", OFFSET),
}
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit-pooler": ("ViTModel", "ViTConfig", IMAGE),
    "beit": ("BeitForImageClassification", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", STAGES),
}
ALL = {**CAUSALS, **ENCODERS, **IMAGES}
NOT_FOR = {"causal": {16}, "encoder": {4, 12, 16}, "image": {3, 4, 9, 12, 14, 15}}
PROBLEMS = load_catalogue().problems


def built(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    with seeded(0, "architecture"):
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return made.eval()


def admitted(name: str) -> Subject:
    return subject_of(built(*ALL[name]), None if name in IMAGES else byte_tokenizer(), name=name)


@pytest.fixture(scope="module")
def texts() -> Material:
    return replace(machines_texts(), texts=machines_texts().texts[:8])


@pytest.fixture(scope="module")
def images() -> Material:
    return machines_images()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are not what is tested here, so few are spent on measuring them."""
    monkeypatch.setattr(Visit, "roofline", Roofline(1e11, 1e10))
    monkeypatch.setattr(use_of_the_machine, "_MOST", 8)
    monkeypatch.setattr(requests_in_time, "_SECONDS", 0.02)
    monkeypatch.setattr(requests_in_time, "_WARMUP", 1)
    monkeypatch.setattr(requests_in_time, "_FEWEST", 4)
    monkeypatch.setattr(decoding, "_STEPS", 4)
    monkeypatch.setattr(decoding, "measure_bandwidth", lambda device, array_bytes: 1e10)
    monkeypatch.setattr(decoding, "best_times", once)
    monkeypatch.setattr(streaming, "best_times", once)
    monkeypatch.setattr(labels, "_NUM_DRAWS", 4)
    monkeypatch.setattr(labels, "_NUM_PIECES", 48)
    monkeypatch.setattr(labels, "_SIZES", (10, 40))


def once(ways: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Each way tried, for the time that it would take is not looked at."""
    return {name: 1.0 for name, way in ways.items() if way() is not None}


def found_in(visit: Visit, *numbers: int) -> dict[int, Finding]:
    chosen = [problem for problem in PROBLEMS if not numbers or problem.number in numbers]
    return {finding.problem: finding for finding in examine(visit, chosen)}


def read(finding: Finding, metric: str) -> float:
    return next(reading.value.value for reading in finding.readings if reading.threshold.metric == metric)


@pytest.mark.parametrize("name", [name for name in ALL if name != "qwen2"])  # which is looked at below, in shards
def test_all_check_ups_look_at_it(name: str, texts: Material, images: Material, hurried: None) -> None:
    subject = admitted(name)
    found = found_in(Visit(subject, images if name in IMAGES else texts))
    assert len(found) == 18
    assert {number: one.meaning for number, one in found.items() if one.severity == "not examined"} == {}
    local_by_build = {5} if name == "swinv2" else set()
    not_for = {number for number, one in found.items() if one.severity == "not applicable"}
    assert not_for == NOT_FOR[subject.kind] | local_by_build


@pytest.mark.parametrize("name", {**CAUSALS, **ENCODERS})
def test_attention_is_shown_of_the_very_pass_that_answers(name: str, texts: Material) -> None:
    subject = admitted(name)
    inputs = Visit(subject, texts).texts(2, 40)
    with torch.no_grad():
        plain, shown = subject.run(inputs), subject.run(inputs, attentions=True)
    torch.testing.assert_close(shown.output, plain.output, atol=2e-4, rtol=1e-3)  # sums in another order, of float32


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gemma2", "gemma3", "gpt-oss", "qwen3"])
def test_windows_in_the_cost_of_the_next_token_and_its_cache(name: str, texts: Material) -> None:
    """Against counting at the longest history itself, where the check-up follows three short ones."""
    subject = admitted(name)
    visit = Visit(subject, texts)
    found = found_in(visit, 7, 12)
    tokens = visit.texts(1, LENGTH)["input_ids"]
    counted = next_token_flops(subject, tokens)
    assert found[12].figures["next_token_at_longest_gflop"] * 1e9 == pytest.approx(counted, rel=0.02)
    kept, per_token = (CachedText(subject, tokens[:, :length]).state_bytes for length in (LENGTH, 1))
    assert abs(found[12].figures["cache_at_longest_bytes"] - kept) <= per_token  # a window's own token is not kept
    local = sum(window is not None for window in subject.windows)
    wanted = per_token / LAYERS * (WINDOW * local + 1000 * (LAYERS - local))
    assert found[7].figures["cache_per_1000_tokens_bytes"] == pytest.approx(wanted)


def test_a_window_in_the_arithmetic_and_the_reach(texts: Material) -> None:
    subject = admitted("mistral")
    found = found_in(Visit(subject, texts), 1, 3, 5)
    weights = sum(part.weight.numel() for part in subject.model.modules() if isinstance(part, nn.Linear))
    attention = LAYERS * 4 * WINDOW * WIDTH  # a score and a share of a value for each key that a token sees
    assert read(found[1], "attention_share") == pytest.approx(attention / (attention + 2 * weights))
    assert read(found[3], "reach_share") == 2 / 8  # two layers see 30 tokens back: two blocks of 15
    assert found[5].figures["local_distance_tokens"] < WINDOW / 2


def test_a_model_without_a_cache_is_looked_at_for_what_needs_none(texts: Material, hurried: None) -> None:
    model = built("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", SHORT_NAMES)
    found = found_in(Visit(subject_of(model, byte_tokenizer()), texts), 3, 4, 7, 9, 12)
    assert "cache_per_1000_tokens_bytes" not in found[7].figures
    assert "refuses text beyond 128 tokens" in found[9].meaning
    assert [number for number, one in found.items() if "keeps no cache" in one.meaning] == [4, 12]
    assert found[3].readings


def test_windows_to_both_sides_are_counted_whole() -> None:
    assert admitted("modernbert").windows == (None, 2 * (WINDOW // 2) + 1)
    assert admitted("gemma2").windows == (WINDOW, None)
    assert admitted("qwen2").windows == (None, None)


def test_partly_turned_keys_have_positions_until_they_do_not_turn(texts: Material) -> None:
    subject = admitted("gpt-neox")
    assert found_in(Visit(subject, texts), 2)[2].severity == "ok"
    for part in subject.model.modules():
        if hasattr(part, "inv_freq"):
            cast("Any", part).inv_freq.zero_()
    assert found_in(Visit(subject, texts), 2)[2].severity == "severe"


@pytest.mark.parametrize("name", ["gpt-j", "mpt", "opt", "mpnet", "xlm-roberta"])
def test_where_tables_end(name: str, texts: Material) -> None:
    subject = admitted(name)
    assert subject.hard_limit == subject.trained_len == LENGTH
    subject.run(Visit(subject, texts).texts(1, LENGTH))
    too_long = torch.zeros(1, LENGTH + 8, dtype=torch.long)
    with pytest.raises((RuntimeError, IndexError)):
        subject.run({"input_ids": too_long, "attention_mask": torch.ones_like(too_long)})


def test_scores_are_those_that_the_softmax_turns_into_shares(texts: Material) -> None:
    visit = Visit(admitted("gemma2"), texts)
    assert 1.5 < read(found_in(visit, 10)[10], "largest_logit") <= 2  # held by its soft cap
    visit = Visit(admitted("gpt-oss"), texts)
    assert read(found_in(visit, 10)[10], "largest_logit") > 1  # which takes the largest off before


def test_tied_shards_of_half_precision(tmp_path: Path, texts: Material, hurried: None) -> None:
    model = cast("Any", built(*CAUSALS["qwen2"])).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    subject = load_subject(tmp_path)
    assert subject.dtype == torch.bfloat16
    assert subject.weight_bytes == 2 * sum(weight.numel() for weight in model.parameters())
    found = found_in(Visit(subject, texts))
    assert {number for number, one in found.items() if not one.readings} == {16}
    assert read(found[13], "duplicate_share") == 0


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: built("XLNetLMHeadModel", "XLNetConfig", XLNET), "see what comes after"),
        (
            lambda: built("FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": True, "multi_query": False}),
            "answers otherwise",
        ),
        (lambda: built("XLMRobertaForCausalLM", "XLMRobertaConfig", OFFSET), "see what comes after"),
        (
            lambda: built("LongformerForMaskedLM", "LongformerConfig", {**OFFSET, "attention_window": 4}),
            "in each layer",
        ),
        (
            lambda: built("BertLMHeadModel", "BertConfig", {**ENCODER, "is_decoder": True}),
            "do not see what comes after",
        ),
        (lambda: built("FNetForMaskedLM", "FNetConfig", ENCODER), "does not show its attention"),
        (
            lambda: built("MambaForCausalLM", "MambaConfig", {"vocab_size": 260, "hidden_size": 8}),
            "does not show its attention",
        ),
    ],
)
def test_what_weighs_tokens_in_another_way_is_refused(make: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        subject_of(make(), byte_tokenizer())
    assert "\n" not in str(caught.value)
    assert "Supported are" in str(caught.value)
