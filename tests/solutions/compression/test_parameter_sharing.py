"""Layers that are one: outputs, gradients, bytes; and ALBERT itself as the reference."""

from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.parameter_sharing import ShareLayers
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning


def decoder(num_layers: int = 5, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(17, 8, num_layers, lambda: SelfAttention(8, 2)).double().eval()


@pytest.mark.parametrize(("groups", "sources"), [(1, [0] * 5), (2, [0, 0, 0, 3, 3]), (5, [0, 1, 2, 3, 4])])
def test_each_group_runs_its_first_layer(groups: int, sources: list[int]) -> None:
    model, tokens = decoder(), torch.randint(17, (2, 6))
    shared = ShareLayers(groups=groups)(model)
    by_hand = decoder()
    blocks = list(by_hand.body.blocks)
    by_hand.body.blocks = type(by_hand.body.blocks)(blocks[i] for i in sources)
    assert torch.equal(shared(tokens), by_hand(tokens))
    assert len({id(block) for block in shared.body.blocks}) == groups
    layer = sum(p.nbytes for p in blocks[0].parameters())
    assert stored_bytes(model) - stored_bytes(shared) == (5 - groups) * layer


def test_gradients_of_all_places_are_summed_and_streaming_keeps_a_state_for_each() -> None:
    model, tokens = ShareLayers()(decoder(3)), torch.randint(17, (1, 6))
    untied = ShareLayers().undo(model)
    assert len({id(block) for block in untied.body.blocks}) == 3
    whole = model(tokens)
    assert torch.equal(untied(tokens), whole)
    whole.square().sum().backward()
    untied(tokens).square().sum().backward()
    apart = [block.mixer.q_proj.weight.grad for block in untied.body.blocks]
    torch.testing.assert_close(model.body.blocks[0].mixer.q_proj.weight.grad, sum(apart), rtol=1e-10, atol=1e-12)
    first, state = model.stream(tokens[:, :2], model.initial_state(1))
    second, state = model.stream(tokens[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)


def test_a_file_holds_shared_weights_once(tmp_path: Path) -> None:
    shared, path, tokens = ShareLayers()(decoder()), tmp_path / "model.safetensors", torch.randint(17, (1, 6))
    assert save_treated(shared, path) < save_treated(decoder(), tmp_path / "whole.safetensors") / 2
    read = load_treated(path, decoder(seed=1), ShareLayers())
    assert torch.equal(read(tokens), shared(tokens))
    assert len({id(block) for block in read.body.blocks}) == 1


@pytest.mark.peer
def test_albert_is_an_encoder_of_shared_layers() -> None:
    """BERT's encoder with layers shared, given ALBERT's weights, gives ALBERT's outputs and gradients."""
    from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    quiet = {"vocab_size": 11, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu"}
    albert = AlbertModel(AlbertConfig(**sizes, **quiet, embedding_size=16, num_hidden_groups=1)).double().eval()
    shared = ShareLayers()(BertModel(BertConfig(**sizes, **quiet)).double().eval().encoder)
    ours, theirs = shared.layer[0], albert.encoder.albert_layer_groups[0].albert_layers[0]
    pairs = {
        ours.attention.self.query: theirs.attention.query,
        ours.attention.self.key: theirs.attention.key,
        ours.attention.self.value: theirs.attention.value,
        ours.attention.output.dense: theirs.attention.dense,
        ours.attention.output.LayerNorm: theirs.attention.LayerNorm,
        ours.intermediate.dense: theirs.ffn,
        ours.output.dense: theirs.ffn_output,
        ours.output.LayerNorm: theirs.full_layer_layer_norm,
    }
    for mine, other in pairs.items():
        mine.load_state_dict(other.state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y = shared(x).last_hidden_state
    expected = x
    for _ in range(4):
        expected = theirs(expected)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in pairs.items():
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-8, atol=1e-10)


def test_layers_that_heads_and_neurons_left_are_not_shared() -> None:
    pruned = StructuredPruning()(decoder())
    partly = decoder()
    partly.body.blocks[1] = StructuredPruning(heads=0.5, neurons=0)(partly.body.blocks[1])
    for model, name in ((pruned, "body.blocks.0.mixer"), (partly, "body.blocks.1.mixer")):
        words = f"ShareLayers makes no sense on {name}, a SelfAttention: .*Share first, then prune"
        with pytest.raises(CombinationError, match=words):
            ShareLayers()(model)
    untouched = StructuredPruning(heads=0, neurons=0)(decoder())
    assert len({id(block) for block in ShareLayers()(untouched).body.blocks}) == 1


def test_models_without_alike_layers_and_bad_groups_are_refused() -> None:
    words = "must hold an nn.ModuleList of two or more layers of one form; "
    with pytest.raises(ArgumentError, match=f"{words}this Sequential has none"):
        ShareLayers()(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    for layers, difference in (
        ([nn.Linear(2, 2), nn.Linear(2, 3)], r"a.1 and a.0 differ in weight, \[3, 2\] and \[2, 2\]\. Share before"),
        ([nn.Linear(2, 2)] * 2 + [nn.Linear(2, 2, bias=False)], r"a.2 and a.0 differ in bias, none and \[2\]"),
        ([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)], "a.1 and a.0 differ in class, Bilinear and Linear"),
    ):
        with pytest.raises(ArgumentError, match=words + difference):
            ShareLayers()(nn.ModuleDict({"a": nn.ModuleList(layers)}))
    with pytest.raises(ArgumentError, match="got 6, and body.blocks has 5"):
        ShareLayers(groups=6)(decoder())
    with pytest.raises(ArgumentError, match="groups"):
        ShareLayers(groups=0)
