"""Treatments leave their argument alone, say whom they are not for, and do what they say; the proof notices others."""

import copy
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transformer_problems import treat
from transformer_problems.catalogue import load_catalogue
from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.decoding import uses_cache, without_cache
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.clinic.claims import CLAIMS
from transformer_problems.clinic.treat import chosen_treatments, prove
from transformer_problems.clinic.treatment import Treated, applied, load_treatment, treatable
from transformer_problems.clinic.treatments import TREATMENTS
from transformer_problems.clinic.treatments.quantization import Quantization
from transformer_problems.clinic.treatments.rope_scaling import RoPEScaling, scaled_copy
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.findings import Finding, Remedy
from transformer_problems.solutions.compression.int8 import Int8Linear
from transformer_problems.solutions.position.rotary_scaling import Method, ScaledRotaryEmbedding

PAGE = (Path(__file__).parents[2] / "docs" / "receipt.md").read_text()


@pytest.fixture(scope="module")
def draft() -> Subject:
    return load_subject(bundled("draft"))


@pytest.fixture(scope="module")
def visit(draft: Subject) -> Visit:
    return Visit(draft, machines_texts())


def state_of(subject: Subject) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return copy.deepcopy(subject.model.state_dict()), subject.config.to_dict()


@pytest.mark.parametrize("slug", TREATMENTS)
def test_a_treatment_leaves_its_argument_as_it_was(slug: str, visit: Visit) -> None:
    if slug == "kv-cache":
        visit = Visit(without_cache(visit.subject), visit.material)
    weights, config = state_of(visit.subject)
    treatment = load_treatment(slug)
    after = applied(treatment, visit)
    assert treatment.solution == slug
    assert after.subject.model is not visit.subject.model
    weights_now, config_now = state_of(visit.subject)
    assert config_now == config
    assert all(torch.equal(weights_now[key], value) for key, value in weights.items())
    assert visit.subject.record is None
    assert after.subject.record is not None
    assert after.subject.record.solutions == (slug,)
    json.dumps(after.subject.record.steps[0].settings, allow_nan=False)


@pytest.mark.parametrize("slug", TREATMENTS)
def test_every_claim_can_be_measured(slug: str) -> None:
    assert load_catalogue().solution(slug).slug == slug
    assert set(load_treatment(slug).claims) <= set(CLAIMS)


def test_a_solution_without_a_treatment_names_those_that_have_one() -> None:
    with pytest.raises(CombinationError, match=r"alibi .* trained anew .*kv-cache, quantization, rope-scaling"):
        load_treatment("alibi")
    with pytest.raises(ArgumentError, match="Nearest: rope-scaling"):
        load_treatment("rope-scalin")


def test_adapters_are_for_trained_checkpoints_but_not_for_this_command() -> None:
    with pytest.raises(CombinationError, match="it is used from Python"):
        load_treatment("lora")


@pytest.mark.parametrize("solutions", [[], "rope-scaling", ["kv-cache", "kv-cache"], ["kv-cache", 3]])
def test_solutions_are_a_list_that_names_each_once(solutions: Any) -> None:
    with pytest.raises(ArgumentError, match="solutions must"):
        chosen_treatments(solutions)


@pytest.mark.parametrize(
    ("way", "method"), [("linear", "linear"), ("yarn", "yarn"), ("dynamic", "dynamic_ntk")], ids=lambda name: name
)
def test_transformers_turns_by_the_angles_of_this_packages_own_scaling(
    way: str, method: Method, draft: Subject
) -> None:
    scaled = scaled_copy(draft, way, 2.0)
    part: Any = scaled.model.get_submodule("model.rotary_emb")
    positions = torch.arange(512)
    cos, sin = part(torch.zeros(1), positions[None])  # [1, N, D]
    head_dim = cos.shape[-1]
    ours = ScaledRotaryEmbedding(head_dim, method=method, factor=2.0, trained_length=256)
    angles = positions[:, None] * ours._frequencies(positions.device, positions, positions)
    # both are float32: angles of up to 512 are off by 512 roundings at most
    torch.testing.assert_close(cos[0, :, : head_dim // 2], angles.cos() * ours.attention_factor, atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, :, : head_dim // 2], angles.sin() * ours.attention_factor, atol=1e-4, rtol=0)


def test_rope_scaling_takes_the_best_of_those_that_keep_short_texts(visit: Visit) -> None:
    settings = RoPEScaling().apply(visit).settings
    tried = settings["tried"]
    keeping = {way: told["loss_beyond_nats"] for way, told in tried.items() if told["growth_within_nats"] <= 0.02}
    del keeping["untreated"]
    assert settings["rope_parameters"]["rope_type"] == min(keeping, key=lambda way: keeping[way])


def test_rope_scaling_helps_a_model_that_was_trained_on_short_texts(visit: Visit, tmp_path: Path) -> None:
    outcome = prove(visit, [RoPEScaling()], out=tmp_path / "treated")
    claims = [clause for clause in outcome.receipt.clauses if clause.name == "claim"]
    assert outcome.receipt.verdict == "helps"
    assert [claim.problem for claim in claims] == [9, 9]  # at once, and beside a cache
    assert all(claim.change == "better" for claim in claims)
    assert (tmp_path / "treated").is_dir()


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan"), float("inf")])
def test_a_factor_of_rope_scaling(factor: float) -> None:
    with pytest.raises(ArgumentError, match="factor must be"):
        RoPEScaling(factor=factor)


def test_refusals(draft: Subject, encoder: Subject, vision: Subject) -> None:
    def told(slug: str, subject: Subject) -> str:
        return load_treatment(slug).refusal(subject) or ""

    assert "no rotary positions" in told("rope-scaling", encoder)
    assert "scaled already" in told("rope-scaling", scaled_copy(draft, "yarn", 2.0))
    assert "writes no text" in told("kv-cache", vision)
    assert "already" in told("kv-cache", draft)
    assert "kv-cache" in TREATMENTS
    assert told("kv-cache", without_cache(draft)) == ""


def small(name: str, **settings: object) -> Subject:
    """A random model of transformers, of that class."""
    import transformers

    made_of = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model_class: Any = getattr(transformers, name)
    return Subject(name, "causal", model_class(model_class.config_class(**{**made_of, **settings})).eval())


def test_kinds_of_layers_with_positions_of_their_own_are_refused() -> None:
    told = load_treatment("rope-scaling").refusal(small("Gemma3ForCausalLM", head_dim=16, sliding_window=32))
    assert "kinds of layers" in (told or "")


@pytest.mark.parametrize("way", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_other_models_with_rotary_positions_are_scaled(name: str, way: str) -> None:
    subject = small(name)
    tokens = torch.arange(120)[None]
    scaled = scaled_copy(subject, way, 2.0)
    with torch.no_grad():
        before, after = (one.run({"input_ids": tokens}).output for one in (subject, scaled))
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_codes_are_not_rounded_again(visit: Visit) -> None:
    rounded = applied(Quantization(), visit)
    with pytest.raises(CombinationError, match="codes already"):
        applied(Quantization(), rounded)


def test_gpt2_is_refused_by_the_name_of_its_layers(texts: Material) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    subject = Subject("small", "causal", GPT2LMHeadModel(config).eval())
    with pytest.raises(CombinationError, match="Conv1D"):
        applied(Quantization(), Visit(subject, texts))


def test_the_head_and_what_shares_its_weights_stay_in_floats(visit: Visit) -> None:
    after = applied(Quantization(), visit).subject
    model: Any = after.model
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layers = [part for part in model.model.layers.modules() if isinstance(part, nn.Linear | Int8Linear)]
    assert layers
    assert all(isinstance(part, Int8Linear) for part in layers)
    assert after.num_parameters == visit.subject.num_parameters
    assert after.weight_bytes < visit.subject.weight_bytes


def test_the_cache_is_turned_on(visit: Visit) -> None:
    without = Visit(without_cache(visit.subject), visit.material)
    outcome = prove(without, chosen_treatments(["kv-cache"]))
    assert uses_cache(outcome.subject)
    assert not uses_cache(without.subject)
    assert outcome.receipt.verdict == "helps"
    assert outcome.receipt.written is None


@dataclass(frozen=True)
class Spoiling:
    """Claims what RoPE scaling claims, and shuffles weights."""

    solution: str = "rope-scaling"
    claims: tuple[int, ...] = (9,)

    def refusal(self, subject: Subject) -> str | None:
        return None

    def apply(self, visit: Visit) -> Treated:
        model = copy.deepcopy(visit.subject.model)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data = weight.data.flip(0)
        return Treated(visit.subject.with_model(model), {})


def test_a_treatment_that_spoils_the_weights_hurts_and_nothing_is_written(visit: Visit, tmp_path: Path) -> None:
    outcome = prove(visit, [Spoiling()], out=tmp_path / "treated")
    assert outcome.receipt.verdict == "hurts"
    assert outcome.receipt.clauses[0].state == "broken"
    assert outcome.receipt.written is None
    assert not list(tmp_path.iterdir())


def test_nothing_helps_on_texts_that_the_model_does_not_know(visit: Visit, tmp_path: Path) -> None:
    """The byte-level model knows Python; of random letters it foretells nothing."""
    draws = torch.Generator().manual_seed(0)
    letters = "".join(map(chr, torch.randint(33, 1_000, (60_000,), generator=draws).tolist()))
    foreign = replace(visit, material=Material("own", texts=(letters,), own=True))
    outcome = prove(foreign, [load_treatment("quantization")], out=tmp_path / "treated")
    assert outcome.receipt.caution is not None
    assert outcome.receipt.verdict in ("inconclusive", "hurts")
    assert not list(tmp_path.iterdir())


def test_unless_it_is_to_be_written_anyway(visit: Visit, tmp_path: Path) -> None:
    outcome = prove(visit, [Spoiling()], out=tmp_path / "treated", write_anyway=True)
    assert outcome.receipt.verdict == "hurts"
    assert outcome.receipt.written == str(tmp_path / "treated")
    assert [file.name for file in tmp_path.iterdir()] == ["treated"]


def test_a_receipt_holds_what_its_page_says() -> None:
    receipt = treat(bundled("draft"), ["quantization"]).receipt
    told = json.loads(json.dumps(receipt.to_json(), allow_nan=False))
    tables = PAGE.split("A clause:")
    for table, fields in zip(tables, (told, told["clauses"][0]), strict=True):
        assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(fields)
    assert [finding["problem"] for finding in told["findings_before"]] == [13, 18]
    assert told["solutions"] == ["quantization"]


def test_a_remedy_is_named_where_the_model_can_have_it(draft: Subject, encoder: Subject) -> None:
    remedies = (Remedy("alibi", "much", 9.0), Remedy("rope-scaling", "some", 2.0))
    severe = [Finding(9, "severe", "so it is", remedies=remedies)]
    assert treatable(severe, draft) == "rope-scaling"
    assert treatable(severe, encoder) is None
    assert treatable([Finding(9, "ok", "well", remedies=remedies)], draft) is None
    assert treatable([Finding(4, "mild", "so", remedies=(Remedy("rope-scaling", "none", 1.0),))], draft) is None
