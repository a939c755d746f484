"""Sites are found by path and head in our models and in those of transformers, and refused where there are none."""

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.sites import Site, attention_layers, find_places, record


def decoder(mixer=lambda: SelfAttention(16, 4)) -> Decoder:
    torch.manual_seed(0)
    return Decoder(17, 16, 2, mixer)


def test_patterns_name_places_in_the_order_of_the_model() -> None:
    model = decoder()
    places = find_places(model, [Site("body.blocks.*.mixer", head=1), "body.blocks.?", "body.norm"])
    assert [place.site for place in places] == [
        Site("body.blocks.0.mixer", head=1),
        Site("body.blocks.1.mixer", head=1),
        Site("body.blocks.0"),
        Site("body.blocks.1"),
        Site("body.norm"),
    ]
    assert places[0].module is model.body.blocks[0].mixer.out_proj


def test_the_gate_of_a_gated_layer_acts_before_its_projection() -> None:
    model = decoder(lambda: GatedAttention(SelfAttention(16, 4)))
    layers = attention_layers(model)
    assert list(layers) == ["body.blocks.0.mixer", "body.blocks.1.mixer"]
    assert layers["body.blocks.0.mixer"].projection is model.body.blocks[0].mixer.out_proj


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "path", "projection"),
    [
        ("GPT2LMHeadModel", "transformer.h.{}.attn", "c_proj"),
        ("LlamaForCausalLM", "model.layers.{}.self_attn", "o_proj"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.{}.attention", "dense"),
        ("OPTForCausalLM", "model.decoder.layers.{}.self_attn", "out_proj"),
        ("BertForMaskedLM", "bert.encoder.layer.{}.attention", "output.dense"),
        ("ModernBertForMaskedLM", None, None),
    ],
)
def test_the_attention_layers_of_transformers_are_found(name: str, path: str | None, projection: str | None) -> None:
    import transformers

    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"OPTForCausalLM": {"word_embed_proj_dim": 32, "ffn_dim": 40}}.get(name, {"intermediate_size": 40})
    config = model_class.config_class(**sizes, **extra, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = model_class(config)
    layers = attention_layers(model)
    if path is None:  # its projection has another name; its head with a dense layer and a config is no attention
        assert not layers
        return
    assert list(layers) == [path.format(0), path.format(1)]
    for found, layer in layers.items():
        assert layer.num_heads == 4
        assert layer.projection is model.get_submodule(f"{found}.{projection}")


def test_attention_that_never_calls_its_projection_is_left_out() -> None:
    assert not attention_layers(nn.TransformerEncoderLayer(16, 4))


def test_what_names_nothing_is_refused() -> None:
    model = decoder()
    with pytest.raises(UnknownNameError, match="unknown module 'body.block.0'. Nearest: body.blocks"):
        find_places(model, ["body.block.0"])
    with pytest.raises(UnknownNameError, match="unknown attention layer 'body.blocks.0'. Nearest: body.blocks.0.mixer"):
        find_places(model, [Site("body.blocks.0", head=0)])
    with pytest.raises(
        ArgumentError, match="head must be one of the 4 of body.blocks.0.mixer; got 4. Choose at most 3"
    ):
        find_places(model, [Site("*.0.mixer", head=4)])
    with pytest.raises(ArgumentError, match="head must be a whole number from 0; got -1. Leave it out"):
        Site("*.mixer", head=-1)
    with pytest.raises(ArgumentError, match="path must be the path of a module, .*; got 3"):
        Site(3)
    with pytest.raises(ArgumentError, match="sites must be a sequence of one site or more; got 'body'"):
        find_places(model, "body")
    with pytest.raises(ArgumentError, match="sites must be a sequence of one site or more; got \\[\\]"):
        find_places(model, [])
    with pytest.raises(ArgumentError, match="model must be a torch.nn.Module; got int"):
        find_places(3, ["body"])
    with pytest.raises(CombinationError, match="model must hold attention layers with heads .* this Linear holds none"):
        find_places(nn.Linear(3, 3), [Site("*", head=0)])


def test_what_is_not_called_once_or_gives_no_tensor_is_refused() -> None:
    layer = nn.Linear(3, 3)
    twice = nn.Sequential(layer, layer)
    x = torch.ones(1, 2, 3)
    with pytest.raises(CombinationError, match="called once .*; 0 was called 2 times"):
        record(find_places(twice, ["0"]), lambda: twice(x))
    with pytest.raises(CombinationError, match="0 was called 0 times"):
        record(find_places(twice, ["0"]), lambda: None)
    recurrent = nn.Sequential(nn.LSTM(3, 3, batch_first=True))
    assert record(find_places(recurrent, ["0"]), lambda: recurrent(x))[0].shape == (1, 2, 3)  # the first of a tuple

    class Named(nn.Module):
        def forward(self, x):
            return {"hidden": x}

    named = nn.Sequential(Named())
    with pytest.raises(CombinationError, match="0 must give a tensor, .*; got dict"):
        record(find_places(named, ["0"]), lambda: named(x))


def test_what_is_recorded_stays_when_later_layers_change_it_in_place() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(4, 2, 3)
    recorded = record(find_places(model, ["0"]), lambda: model(x))[0]
    assert torch.equal(recorded, model[0](x))
    assert recorded.min() < 0


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    model = decoder()
    model.body.blocks[0].mixer.num_heads = 4
    places = find_places(model, [Site("body.blocks.0.mixer", head=0)])
    uneven = [type(place)(place.site, place.module, 3) for place in places]
    with pytest.raises(
        CombinationError, match="the 3 heads of body.blocks.0.mixer must be equal slices .* 16 channels"
    ):
        record(uneven, lambda: model(torch.ones(1, 2, dtype=torch.long)))
