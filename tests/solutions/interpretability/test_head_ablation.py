"""Ablating a head is setting its slice of the output projection to zero, or its constant part to a bias."""

import copy

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.head_ablation import ablate_heads
from transformer_problems.solutions.interpretability.sites import Site, attention_layers

TOKENS = torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(17, (4, 7), generator=torch.Generator().manual_seed(1))
FAMILIES = ["decoder", "llama", "their gpt2", "their llama", "their neox", "their opt", "their bert"]


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "decoder":
        return Decoder(17, 16, 2, lambda: SelfAttention(16, 4, bias=True)).double().eval()
    if family == "llama":
        return LlamaDecoder(LlamaConfig(17, 16, 2, 4, 24, num_kv_heads=2)).double().eval()
    import transformers

    name = {
        "their gpt2": "GPT2LMHeadModel",
        "their llama": "LlamaForCausalLM",
        "their neox": "GPTNeoXForCausalLM",
        "their opt": "OPTForCausalLM",
        "their bert": "BertForMaskedLM",
    }[family]
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "their opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    else:
        sizes |= {"intermediate_size": 24}
    model_class = getattr(transformers, name)
    config = model_class.config_class(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model_class(config).double().eval()


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


def columns(projection: nn.Module, head: int) -> Tensor:
    """The weights that read a head, [C, D]; GPT-2 stores them the other way round."""
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    return weight[:, 4 * head : 4 * head + 4]


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_what_a_projection_without_the_heads_columns_gives(family: str) -> None:
    model = make_model(family)
    first, second = attention_layers(model)
    heads = [Site(first, head=1), Site(first, head=3), Site(second, head=0)]
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for site in heads:
            columns(attention_layers(cut)[site.path].projection, site.head).zero_()
    before = logits_of(model, TOKENS)
    with ablate_heads(model, heads):
        without = logits_of(model, TOKENS)
    torch.testing.assert_close(without, logits_of(cut, TOKENS), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(without, before)
    assert torch.equal(logits_of(model, TOKENS), before)


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_is_a_bias_in_the_place_of_the_head(family: str) -> None:
    model = make_model(family)
    site = Site(list(attention_layers(model))[1], head=2)
    projection, read = attention_layers(model)[site.path].projection, []
    handle = projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(OTHERS)
    handle.remove()
    mean = read[0][..., 8:12].mean(dim=(0, 1))
    cut = copy.deepcopy(model)
    lost = columns(attention_layers(cut)[site.path].projection, 2)
    with torch.no_grad():
        constant = lost @ mean
        lost.zero_()
    attention_layers(cut)[site.path].projection.register_forward_hook(lambda _, inputs, output: output + constant)
    with ablate_heads(model, [site], mean_over=OTHERS):
        without = logits_of(model, TOKENS)
    torch.testing.assert_close(without, logits_of(cut, TOKENS), rtol=1e-12, atol=1e-12)


def test_gradients_flow_past_the_heads_that_are_cut() -> None:
    model = make_model("decoder")
    cut = copy.deepcopy(model)
    with torch.no_grad():
        columns(cut.body.blocks[0].mixer.out_proj, 1).zero_()
    cut(TOKENS).square().sum().backward()
    with ablate_heads(model, [Site("body.blocks.0.mixer", head=1)]):
        model(TOKENS).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), cut.parameters(), strict=True):
        expected = theirs.grad.clone()
        if name == "body.blocks.0.mixer.out_proj.weight":  # columns at zero still have a gradient, cut heads none
            expected[:, 4:8] = 0
        torch.testing.assert_close(ours.grad, expected, rtol=1e-10, atol=1e-10)
    assert float(model.body.blocks[0].mixer.v_proj.weight.grad[4:8].abs().max()) == 0


def test_the_model_is_left_as_it_was_after_an_error_too() -> None:
    model = make_model("decoder").train()
    before = model(TOKENS)
    with pytest.raises(RuntimeError, match="within"), ablate_heads(model, [Site("*", head=0)], mean_over=OTHERS):
        assert all(part.training for part in model.modules())
        raise RuntimeError("within")
    assert torch.equal(model(TOKENS), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.peer
def test_the_mean_is_that_of_a_model_in_evaluation() -> None:
    model = make_model("their gpt2")  # with dropout
    site = Site("*.attn", head=1)
    with ablate_heads(model, [site], mean_over=OTHERS):
        wanted = logits_of(model, TOKENS)
    with ablate_heads(model.train(), [site], mean_over=OTHERS):
        assert torch.equal(logits_of(model.eval(), TOKENS), wanted)


def test_half_precision_stays_half() -> None:
    model = make_model("decoder").bfloat16()
    with ablate_heads(model, [Site("*", head=0)], mean_over=OTHERS):
        assert model(TOKENS).dtype == torch.bfloat16


def test_bad_input_is_refused() -> None:
    model = make_model("decoder")
    for heads, error, message in (
        ([Site("body.blocks.7.mixer", head=0)], UnknownNameError, "unknown attention layer 'body.blocks.7.mixer'"),
        ([Site("*.mixer", head=4)], ArgumentError, "head must be one of the 4 of body.blocks.0.mixer; got 4"),
        ([Site("body.norm")], ArgumentError, "heads must be sites with a head each; got body.norm without"),
        ([], ArgumentError, "sites must be a sequence of one site or more"),
    ):
        with pytest.raises(error, match=message), ablate_heads(model, heads):
            pass
    for reference in (TOKENS[:0], TOKENS.tolist()):  # of no sequence the mean is NaN
        with (
            pytest.raises(ArgumentError, match="mean_over must be a tensor of one sequence or more; got "),
            ablate_heads(model, [Site("*", head=0)], mean_over=reference),
        ):
            pass
    with pytest.raises(CombinationError, match="Sequential holds none"), ablate_heads(nn.Sequential(), [Site("*", 0)]):
        pass
