"""Heads and neurons leave, and the rest computes what it would with theirs at zero."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.parameter_sharing import ShareLayers
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding


def decoder(num_kv_heads: int = 4, *, bias: bool = False, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return (
        Decoder(
            17,
            16,
            2,
            lambda: SelfAttention(16, 4, num_kv_heads=num_kv_heads, position=RotaryEmbedding(4), bias=bias),
        )
        .double()
        .eval()
    )


def silence(model: Decoder, pruned: Decoder) -> None:
    """Put to zero in the model what the pruned one lacks: columns of its output layers, found by their values."""
    for whole, small in zip(model.body.blocks, pruned.body.blocks, strict=True):
        for layer, left in (
            (whole.mixer.out_proj, small.mixer.out_proj),
            (whole.feed_forward.down, small.feed_forward.down),
        ):
            kept = {tuple(column) for column in left.weight.T.tolist()}
            lost = torch.tensor([tuple(column) not in kept for column in layer.weight.T.tolist()])
            assert lost.sum() == layer.in_features - left.in_features
            with torch.no_grad():
                layer.weight[:, lost] = 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_kv_heads", "heads", "left"), [(4, 0.5, 2), (4, 0.25, 3), (2, 0.5, 2), (1, 0.5, 4)])
def test_what_is_left_computes_what_the_model_does_with_the_rest_at_zero(
    num_kv_heads: int, heads: float, left: int, bias: bool
) -> None:
    model, tokens = decoder(num_kv_heads, bias=bias), torch.randint(17, (2, 11))
    pruned = StructuredPruning(heads=heads, neurons=0.75)(model)
    assert pruned.body.blocks[0].mixer.num_heads == left
    assert pruned.body.blocks[0].feed_forward.up.out_features == 16
    silence(model, pruned)
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-12, atol=1e-12)  # sums in another order


def test_the_weakest_leave() -> None:
    model = decoder()
    with torch.no_grad():
        for block in model.body.blocks:
            block.mixer.v_proj.weight[4:8] *= 1e-3  # head 1
            block.feed_forward.up.weight[::2] *= 1e-3
    pruned = StructuredPruning(heads=0.25, neurons=0.5)(model)
    for whole, small in zip(model.body.blocks, pruned.body.blocks, strict=True):
        assert torch.equal(small.mixer.v_proj.weight, whole.mixer.v_proj.weight[[*range(4), *range(8, 16)]])
        assert torch.equal(small.feed_forward.up.weight, whole.feed_forward.up.weight[1::2])


def test_a_pruned_decoder_streams_trains_and_costs_less() -> None:
    model, tokens = decoder(), torch.randint(17, (2, 9))
    pruned = StructuredPruning()(model)
    whole = pruned(tokens)
    state, parts = pruned.initial_state(2), []
    for chunk in tokens.split([1, 5, 3], dim=1):
        logits, state = pruned.stream(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    layers = 2 * 2 * 9 * (4 * 16 * 16 + 2 * 16 * 64) * 2  # FLOPs of products with weights, outside the head
    attention = 2 * (2 * 2 * 4 * 9 * 9 * 4) * 2
    saved = count_flops(lambda: model(tokens)) - count_flops(lambda: pruned(tokens))
    assert saved == (layers + attention) / 2
    assert stored_bytes(model) - stored_bytes(pruned) == 8 * (2 * (4 * 16 * 16 + 2 * 16 * 64 + 64)) / 2


def test_gated_networks_and_sequences_lose_neurons_of_all_their_matrices() -> None:
    config = LlamaConfig(vocab_size=17, embed_dim=16, num_layers=1, num_heads=4, feed_forward_dim=24)
    torch.manual_seed(0)
    llama = LlamaDecoder(config).eval()
    pruned = StructuredPruning(heads=0.5, neurons=0.5)(llama)
    network = pruned.blocks[0].feed_forward
    assert {tuple(part.weight.shape) for part in (network.gate, network.up, network.down)} == {(12, 16), (16, 12)}
    assert pruned(torch.randint(17, (1, 5))).isfinite().all()
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert StructuredPruning(neurons=0.5)(plain)[0].out_features == 4


def test_saved_and_read_back_outputs_are_equal(tmp_path: Path) -> None:
    transform, tokens = StructuredPruning(heads=0.5, neurons=0.25), torch.randint(17, (2, 7))
    pruned = transform(decoder())
    save_treated(pruned, tmp_path / "model.safetensors")
    read = load_treated(tmp_path / "model.safetensors", decoder(seed=1), transform)
    assert torch.equal(read(tokens), pruned(tokens))


def test_the_original_is_left_as_it_was() -> None:
    model, tokens = decoder(), torch.randint(17, (2, 7))
    before = model(tokens)
    StructuredPruning()(model)
    assert torch.equal(model(tokens), before)


def test_a_block_that_runs_in_every_place_is_pruned_once_for_all() -> None:
    shared, tokens = ShareLayers()(decoder()), torch.randint(17, (2, 7))
    pruned = StructuredPruning(heads=0.5, neurons=0.75)(shared)
    assert pruned.body.blocks[0] is pruned.body.blocks[1]
    assert pruned.body.blocks[0].mixer.num_heads == 2
    silence(shared, pruned)
    torch.testing.assert_close(pruned(tokens), shared(tokens), rtol=1e-12, atol=1e-12)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def twice_in_one() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def one_layer_in_two_networks() -> nn.Module:
    model = nn.ModuleList([network(), network()])
    model[1][0] = model[0][0]
    return model


def tied_in_two_networks(name: str) -> nn.Module:
    model = nn.ModuleList([network(), network()])
    setattr(model[1][0], name, getattr(model[0][0], name))
    return model


def tied_to_the_model_itself() -> nn.Module:
    model = nn.ModuleDict({"net": network()})
    model.table = model["net"][2].weight
    return model


def tied_queries_and_keys() -> nn.Module:
    model = decoder()
    model.body.blocks[1].mixer.k_proj.weight = model.body.blocks[1].mixer.q_proj.weight
    return model


@pytest.mark.parametrize(
    ("make", "names", "remedy"),
    [
        (twice_in_one, "0 and 2", "neurons=0"),
        (one_layer_in_two_networks, "0.0 and 1.0", "neurons=0"),
        (lambda: tied_in_two_networks("weight"), "0.0 and 1.0", "neurons=0"),
        (lambda: tied_in_two_networks("bias"), "0.0 and 1.0", "neurons=0"),
        (tied_to_the_model_itself, "the model and net.2", "neurons=0"),
        (tied_queries_and_keys, "body.blocks.1.mixer.q_proj and body.blocks.1.mixer.k_proj", "heads=0"),
    ],
)
def test_shared_weights_are_refused_unless_they_stay_as_they_are(
    make: Callable[[], nn.Module], names: str, remedy: str
) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    number = len(list(model.parameters()))
    words = rf"belong to one layer to become smaller; {names} share theirs. Untie them, or pass {remedy}\.$"
    with pytest.raises(ArgumentError, match=words):
        StructuredPruning()(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    kept = StructuredPruning(**{"heads": 0.5, "neurons": 0.5, remedy[:-2]: 0})(model)
    assert len(list(kept.parameters())) == len(list(model.parameters())) == number  # each tied weight counts once


def test_weights_tied_outside_of_what_shrinks_stay_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 8), "net": network(), "head": nn.Linear(8, 5)})
    model["head"].weight = model["embedding"].weight
    pruned = StructuredPruning()(model)
    assert pruned["net"][0].out_features == 4
    assert pruned["head"].weight is pruned["embedding"].weight


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, None, "half", True])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match="heads must be a share from 0 to below 1"):
        StructuredPruning(heads=share)
    with pytest.raises(ArgumentError, match="neurons must be a share"):
        StructuredPruning(neurons=share)


def test_models_that_cannot_be_pruned_are_refused() -> None:
    model = Decoder(17, 16, 1, lambda: SelfAttention(16, 4, position=ALiBi(4)))
    with pytest.raises(CombinationError, match="ALiBi of body.blocks.0.mixer is built for 4 heads"):
        StructuredPruning()(model)
    pruned = StructuredPruning(heads=0)(model)
    assert pruned.body.blocks[0].mixer.num_heads == 4
    assert pruned.body.blocks[0].feed_forward.up.out_features == 32
    with pytest.raises(ArgumentError, match="this Linear has neither"):
        StructuredPruning()(nn.Linear(2, 2))
