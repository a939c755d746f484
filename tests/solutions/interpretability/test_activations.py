"""Activations are those of the model's own layers, whatever the batches, and the model is left as it was."""

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.activations import collect_activations
from transformer_problems.solutions.position.alibi import ALiBi

TOKENS = torch.randint(17, (7, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(11) < torch.tensor([11, 3, 7, 1, 11, 5, 10])[:, None]


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(17, 16, 2, lambda: SelfAttention(16, 4, is_causal=False, position=ALiBi(4))).double()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_activations_are_the_states_that_the_layers_hand_on(batch_size: int, masked: bool) -> None:
    model, key_mask = encoder(), MASK if masked else None
    found = collect_activations(model, TOKENS, ["body.blocks.?"], key_mask=key_mask, batch_size=batch_size)
    positions = torch.arange(11)
    x = model.body.embed(TOKENS, positions)
    for path, block in (("body.blocks.0", model.body.blocks[0]), ("body.blocks.1", model.body.blocks[1])):
        x = block(x, key_mask=key_mask, positions=positions)
        torch.testing.assert_close(found[path], x.detach(), rtol=1e-10, atol=1e-10)  # batches sum in another order
        assert not found[path].requires_grad


@pytest.mark.peer
def test_activations_of_a_masked_transformers_model_are_its_hidden_states() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=17, **sizes)).double().eval()
    found = collect_activations(model, TOKENS, ["encoder.layer.?"], key_mask=MASK, batch_size=4)
    with torch.no_grad():
        states = model(TOKENS, attention_mask=MASK.long(), output_hidden_states=True).hidden_states
    for layer in range(2):
        torch.testing.assert_close(found[f"encoder.layer.{layer}"], states[layer + 1], rtol=1e-10, atol=1e-10)


def test_the_model_answers_in_evaluation_and_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Embedding(17, 4), nn.Dropout(0.5), nn.Identity())
    model[2].eval()
    found = collect_activations(model, TOKENS, ["1"])
    assert torch.equal(found["1"], model[0](TOKENS).detach())
    assert [part.training for part in model] == [True, True, False]
    with pytest.raises(CombinationError):
        collect_activations(model, TOKENS, ["1"], key_mask=MASK)
    assert [part.training for part in model] == [True, True, False]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_bad_input_is_refused() -> None:
    model = encoder()
    with pytest.raises(UnknownNameError, match="unknown module 'layers.*'"):
        collect_activations(model, TOKENS, ["layers.*"])
    with pytest.raises(ArgumentError, match="tokens must be a tensor of one sequence or more, .*; got \\[0, 11\\]"):
        collect_activations(model, TOKENS[:0], ["body"])
    with pytest.raises(ArgumentError, match="tokens must be a tensor .*; got list"):
        collect_activations(model, TOKENS.tolist(), ["body"])
    with pytest.raises(ArgumentError, match="key_mask must be bool \\[7, 11\\]"):
        collect_activations(model, TOKENS, ["body"], key_mask=MASK[:3])
    with pytest.raises(ArgumentError, match="batch_size must be positive; got 0"):
        collect_activations(model, TOKENS, ["body"], batch_size=0)
    with pytest.raises(
        CombinationError, match="must give \\[7, N, C\\] .*; body.blocks.0.mixer.op gave \\[7, 4, 11, 4\\]"
    ):
        collect_activations(model, TOKENS, ["body.blocks.0.mixer.op"])
    with pytest.raises(CombinationError, match="must take key_mask or attention_mask .*; Sequential takes neither"):
        collect_activations(nn.Sequential(nn.Embedding(17, 4)), TOKENS, ["0"], key_mask=MASK)


def test_shared_layers_are_refused() -> None:
    model = Decoder(17, 16, 2, lambda: SelfAttention(16, 4))
    model.body.blocks[1] = model.body.blocks[0]
    with pytest.raises(CombinationError, match="body.blocks.0 was called 2 times"):
        collect_activations(model, TOKENS, ["body.blocks.?"])
