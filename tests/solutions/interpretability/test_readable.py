"""Readers give what the model itself gives, through its embeddings too, and leave it as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import AttentionOp
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.differential import DifferentialAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.compression.factorised_embedding import FactoriseEmbedding
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.readable import Readable, readable
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.recurrence.mamba import Mamba

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 8], [2, 7, 1, 8, 2, 8, 1, 8, 0, 0, 0]])
MASK = torch.arange(11) < torch.tensor([[11], [8]])
LAST = torch.tensor([10, 7])


def encoder(op: Callable[[], AttentionOp] = FlashAttention) -> Encoder:
    torch.manual_seed(0)

    def mixer() -> SelfAttention:
        return SelfAttention(16, 4, op=op(), num_kv_heads=2, is_causal=False, position=ALiBi(4))

    return Encoder(10, 16, 2, mixer, num_outputs=3, position=SinusoidalEncoding(16)).double()


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(10, 16, 2, lambda: SelfAttention(16, 2, position=RotaryEmbedding(8))).double()


def llama() -> LlamaDecoder:
    torch.manual_seed(0)
    return LlamaDecoder(
        LlamaConfig(vocab_size=10, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24)
    ).double()


def factorised() -> nn.Module:
    return FactoriseEmbedding(rank=4)(decoder())


@pytest.mark.parametrize("make", [encoder, decoder, llama, factorised])
@pytest.mark.parametrize("read_at", [None, 0, 6])
def test_logits_are_the_model_s_own(make: Callable[[], nn.Module], read_at: int | None) -> None:
    model = make()
    reader = readable(model, read_at=read_at)
    places = LAST if read_at is None else torch.full((2,), read_at)
    expected = model(TOKENS, key_mask=MASK)[torch.arange(2), places]
    torch.testing.assert_close(reader.logits(TOKENS, key_mask=MASK), expected, rtol=0, atol=0)
    through = reader.logits(TOKENS, key_mask=MASK, embeddings=reader.embed(TOKENS))
    torch.testing.assert_close(through, expected, rtol=0, atol=0)
    moved = reader.logits(TOKENS, key_mask=MASK, embeddings=reader.embed(TOKENS).flip(1))
    assert not torch.allclose(moved, expected)
    assert torch.equal(reader.reading(TOKENS, key_mask=MASK).argmax(dim=1), places)
    assert reader.vocab_size == 10


def test_the_last_token_is_found_without_a_mask_and_with_padding_before() -> None:
    model = decoder()
    reader = readable(model)
    assert torch.equal(reader.logits(TOKENS), model(TOKENS)[:, -1])
    assert torch.equal(reader.logits(TOKENS, key_mask=MASK.flip(1)), model(TOKENS, key_mask=MASK.flip(1))[:, -1])


def naive_weights(model: Encoder | Decoder, layer: int, bias: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of the scores of one layer, from its projections alone, [B, H, N, N]."""
    seen: list[Tensor] = []
    mixer = model.body.blocks[layer].mixer
    handle = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(TOKENS, key_mask=MASK)
        handle.remove()
        q = mixer.q_proj(seen[0]).view(2, 11, 4, 4).transpose(1, 2)
        k = mixer.k_proj(seen[0]).view(2, 11, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
    return (q @ k.mT / 2 + bias).masked_fill(~allowed, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize(
    ("op", "width"),
    [(FlashAttention, 11), (DenseAttention, 11), (MemoryEfficientAttention, 11), (lambda: SlidingWindow(2), 2)],
)
def test_attentions_are_the_naive_softmax_whatever_computes_it(op: Callable[[], AttentionOp], width: int) -> None:
    model = encoder(op).eval()
    places = torch.arange(11)
    distance = (places - places[:, None]).abs()
    bias = -distance * torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64)[:, None, None]
    allowed = MASK[:, None, None, :] & (distance <= width)
    found = readable(model).attentions(TOKENS, key_mask=MASK)
    assert len(found) == 2
    for layer, weights in enumerate(found):
        rows = MASK[:, None, :, None].expand_as(weights)
        expected = naive_weights(model, layer, bias, allowed)
        torch.testing.assert_close(weights[rows], expected[rows], rtol=1e-10, atol=1e-12)


def test_attentions_of_a_decoder_are_causal_and_of_random_features_what_multiplies_values() -> None:
    weights = readable(decoder()).attentions(TOKENS)[0]
    assert weights.shape == (2, 2, 11, 11) and not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.manual_seed(0)
    model = Encoder(10, 16, 1, lambda: SelfAttention(16, 2, op=Performer(8, num_features=16), is_causal=False))
    weights = readable(model).attentions(TOKENS)[0]
    # float32 sums of 16 features, normalised
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-4, atol=1e-4)


def test_an_op_shared_by_layers_is_read_once_for_each() -> None:
    torch.manual_seed(0)
    op = DenseAttention()
    model = Encoder(10, 16, 3, lambda: SelfAttention(16, 2, op=op, is_causal=False)).double()
    apart = copy.deepcopy(model)
    for block in apart.body.blocks:
        block.mixer.op = DenseAttention()
    for one, other in zip(readable(model).attentions(TOKENS), readable(apart).attentions(TOKENS), strict=True):
        assert torch.equal(one, other)


class Squared(nn.Module):
    """Not a weighted sum of values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return DenseAttention()(q, k, v).square()


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (lambda: Mamba(16), "a layer must attend through an op to have weights to read; Mamba does not"),
        (lambda: DifferentialAttention(16, 2), "2 layers called theirs 4 times"),
        (lambda: SelfAttention(16, 2, op=Squared()), "an op must give weighted sums of values .* Squared does not"),
    ],
)
def test_layers_without_one_map_of_weights_are_refused_and_still_explained_by_gradients(
    mixer: Callable[[], nn.Module], message: str
) -> None:
    torch.manual_seed(0)
    model = Decoder(10, 16, 2, mixer)
    with pytest.raises(CombinationError, match=message):
        readable(model).attentions(TOKENS)
    assert GradientXInput().explain(model, TOKENS).scores.shape == TOKENS.shape


def test_a_model_is_left_as_it_was() -> None:
    model = encoder().train()
    model.body.blocks[1].eval()
    before = {name: part.training for name, part in model.named_modules()}
    readable(model).attentions(TOKENS)
    with torch.no_grad():  # gradients are taken all the same
        GradientXInput().explain(model, TOKENS)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert not any(part._forward_hooks for part in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_when_the_model_fails() -> None:
    model = decoder()
    reader, wrong = readable(model), torch.ones(2, 10, dtype=torch.bool)
    for call in (reader.attentions, reader.logits):
        with pytest.raises(ArgumentError, match="key_mask must be bool"):
            call(TOKENS, key_mask=wrong)
    assert not any(part._forward_hooks for part in model.modules()) and model.training


def test_what_is_readable_stays_as_it_is() -> None:
    reader = readable(decoder())
    assert isinstance(reader, Readable) and readable(reader) is reader
    with pytest.raises(ArgumentError, match="read_at must be left out for a model that chooses itself; got 0"):
        readable(reader, read_at=0)


@pytest.mark.parametrize("read_at", [-2, 1.5, True])
def test_places_that_are_none_are_refused(read_at: int) -> None:
    with pytest.raises(ArgumentError, match=f"read_at must be a position from 0, or -1 .*; got {read_at}"):
        readable(decoder(), read_at=read_at)


def test_a_place_beyond_the_tokens_is_refused() -> None:
    with pytest.raises(ArgumentError, match="read_at must be a position of the 11 tokens; got 11. Choose at most 10"):
        readable(decoder(), read_at=11).logits(TOKENS)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), "bert-base-uncased", nn.Embedding(3, 3)])
def test_other_models_are_refused_with_what_can_be_read(model: object) -> None:
    with pytest.raises(
        ArgumentError, match=r"model must be an Encoder, Decoder or LlamaDecoder, .* Readable; got \w+\. Wrap"
    ):
        readable(model)
