"""Models of the transformers library, read without importing it."""

import copy
from typing import Any

import pytest
import torch

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.rollout import AttentionRollout

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOKENS = torch.tensor([[2, 11, 7, 5, 9, 4, 3], [2, 8, 6, 3, 0, 0, 0]])
MASK = torch.arange(7) < torch.tensor([[7], [4]])
BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 20,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}
LLAMA = {**BERT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1}
CLASSIFIERS = [
    ("BertForSequenceClassification", "BertConfig", BERT, [0, 0]),
    ("RobertaForSequenceClassification", "RobertaConfig", BERT, [0, 0]),
    ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, [0, 0]),
    ("GPT2ForSequenceClassification", "GPT2Config", GPT2, [6, 3]),
    ("LlamaForSequenceClassification", "LlamaConfig", LLAMA, [6, 3]),
]
LANGUAGE_MODELS = [
    ("BertForMaskedLM", "BertConfig", BERT),
    ("GPT2LMHeadModel", "GPT2Config", GPT2),
    ("LlamaForCausalLM", "LlamaConfig", LLAMA),
]
ALL = [case[:3] for case in CLASSIFIERS] + LANGUAGE_MODELS


def made(name: str, config: str, sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).double()


@pytest.mark.parametrize(
    ("name", "config", "sizes", "places"), CLASSIFIERS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_classifiers_give_their_own_logits_and_where_they_read(
    name: str, config: str, sizes: dict[str, int], places: list[int]
) -> None:
    model = made(name, config, sizes)
    reader = readable(model)
    logits = reader.logits(TOKENS, key_mask=MASK)
    assert model.training, "left in training, as it was"
    expected = model.eval()(input_ids=TOKENS, attention_mask=MASK.long()).logits
    assert torch.equal(logits, expected) and logits.shape == (2, 3)
    assert torch.equal(reader.logits(TOKENS, key_mask=MASK, embeddings=reader.embed(TOKENS)), expected)
    one_hot = torch.nn.functional.one_hot(torch.tensor(places), 7).double()
    torch.testing.assert_close(reader.reading(TOKENS, key_mask=MASK), one_hot)
    with pytest.raises(ArgumentError, match=f"read_at must be left out for {name}.*; got 0"):
        readable(model, read_at=0).logits(TOKENS)


@pytest.mark.parametrize(("name", "config", "sizes"), LANGUAGE_MODELS)
@pytest.mark.parametrize("read_at", [None, 1])
def test_language_models_give_one_row_of_their_own_logits(
    name: str, config: str, sizes: dict[str, int], read_at: int | None
) -> None:
    model = made(name, config, sizes).eval()
    reader = readable(model, read_at=read_at)
    places = torch.tensor([6, 3]) if read_at is None else torch.tensor([1, 1])
    expected = model(input_ids=TOKENS, attention_mask=MASK.long()).logits[torch.arange(2), places]
    assert torch.equal(reader.logits(TOKENS, key_mask=MASK), expected)
    assert torch.equal(reader.reading(TOKENS, key_mask=MASK).argmax(dim=1), places)


@pytest.mark.parametrize(("name", "config", "sizes"), ALL)
def test_attentions_are_the_eager_ones_and_the_way_of_attending_comes_back(
    name: str, config: str, sizes: dict[str, int]
) -> None:
    model = made(name, config, sizes).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    found = readable(model).attentions(TOKENS, key_mask=MASK)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = eager(input_ids=TOKENS, attention_mask=MASK.long(), output_attentions=True).attentions
    assert len(found) == 2 and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "config", "sizes"), ALL)
def test_gradients_are_those_of_inputs_embeds_and_padding_scores_nothing(
    name: str, config: str, sizes: dict[str, int]
) -> None:
    model = made(name, config, sizes).eval()
    row, length = TOKENS[:1], 7  # without padding, which inputs_embeds would hide from some models
    embeds = model.get_input_embeddings()(row).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=torch.ones(1, length).long()).logits
    logits = logits[:, -1] if logits.dim() == 3 else logits
    (slope,) = torch.autograd.grad(logits[0, 1], embeds)
    found = GradientXInput().explain(model, TOKENS, key_mask=MASK, target=1).scores
    torch.testing.assert_close(found[:1], (slope * embeds.detach()).sum(-1), rtol=1e-9, atol=1e-12)
    assert not found[1, 4:].any() and found[1, :4].all()
    shares = AttentionRollout().explain(model, TOKENS, key_mask=MASK).scores
    assert not shares[1, 4:].any()
    torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))


def test_a_model_without_a_head_and_one_of_two_sides_are_refused() -> None:
    bert = transformers.BertModel(transformers.BertConfig(**BERT))
    with pytest.raises(ArgumentError, match="model must have a head that gives logits; BertModel has none"):
        readable(bert).logits(TOKENS)
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ArgumentError, match="got T5ForConditionalGeneration"):
        readable(t5)


def test_a_classifier_in_inference_mode_is_told_what_to_use() -> None:
    name, config, sizes, _ = CLASSIFIERS[0]
    with torch.inference_mode(), pytest.raises(CombinationError, match=r"torch.inference_mode\(\). Use torch.no_grad"):
        AttentionRollout().explain(made(name, config, sizes), TOKENS)


RECURRENT = [
    ("MambaForCausalLM", "MambaConfig", {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    ),
]


@pytest.mark.parametrize(("name", "config", "sizes"), RECURRENT)
def test_a_model_that_has_no_attention_is_explained_by_gradients_alone(
    name: str, config: str, sizes: dict[str, int]
) -> None:
    model = made(name, config, sizes)
    embeds = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model.train()(inputs_embeds=embeds).logits[:, -1, 1]  # in training no state is kept, here nothing drops
    (slope,) = torch.autograd.grad(logits.sum(), embeds)
    found = GradientXInput().explain(model, TOKENS, target=1).scores
    torch.testing.assert_close(found, (slope * embeds.detach()).sum(-1), rtol=1e-9, atol=1e-12)
    with pytest.raises(ArgumentError, match="attention weights"):
        AttentionRollout().explain(model, TOKENS)


XLNET = {"vocab_size": 20, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:, :2]], ids=["not square", "square"])
def test_a_model_that_turns_its_tokens_is_refused_and_left_as_it_was(tokens: torch.Tensor) -> None:
    """Of as many sequences as tokens the shapes agree, and each would be given another's embeddings."""
    model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**XLNET))
    with pytest.raises(
        CombinationError, match="a model must embed its tokens as they are .* turned, padded or changed"
    ):
        GradientXInput().explain(model, tokens)
    assert not model.get_input_embeddings()._forward_hooks and model.training
