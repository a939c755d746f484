"""The MobileBERT block and its trigram embedding against transformers' with the same weights; sizes on paper."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import token_positions
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.stack import TransformerLayers
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.attention.watched import WatchedAttention
from transformer_problems.solutions.tokens.bottleneck import BottleneckBlock, NoNorm
from transformer_problems.solutions.tokens.trigram_embedding import TrigramEmbedding
from transformer_problems.testing import check_mixer

WIDTH, NARROW, HEADS = 12, 8, 2
LENGTHS = [1, 63, 64, 100, 101]
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # float64 sums of some hundred terms through norms and a softmax
PEER_NAMES = {  # of the block's parts, in transformers
    "narrow": "bottleneck.input.dense",
    "narrow_norm": "bottleneck.input.LayerNorm",
    "shared": "bottleneck.attention.dense",
    "shared_norm": "bottleneck.attention.LayerNorm",
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "widen": "output.bottleneck.dense",
    "final_norm": "output.bottleneck.LayerNorm",
}


def build(**options: object) -> BottleneckBlock:
    torch.manual_seed(0)
    block = BottleneckBlock(WIDTH, NARROW, HEADS, **options).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def draw(length: int) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def peer_name(name: str, num_feed_forwards: int) -> str:
    """What a parameter is called in transformers, where the last feed-forward network has a place of its own."""
    part, *rest = name.split(".")
    if part in PEER_NAMES:
        return ".".join([PEER_NAMES[part], *rest])
    number, kind = rest
    own = {"ups": "intermediate.dense", "downs": "output.dense", "norms": "output.LayerNorm"}[part]
    return f"{own}.{kind}" if int(number) == num_feed_forwards - 1 else f"ffn.{number}.{own}.{kind}"


@pytest.mark.peer
@pytest.mark.parametrize("num_feed_forwards", [1, 3])
@pytest.mark.parametrize("norm", [NoNorm, nn.LayerNorm])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_with_the_same_weights(length: int, norm: type[nn.Module], num_feed_forwards: int) -> None:
    pytest.importorskip("transformers")
    from transformers import MobileBertConfig
    from transformers.models.mobilebert.modeling_mobilebert import MobileBertLayer

    block = build(norm=norm, num_feed_forwards=num_feed_forwards, expansion=3)
    config = MobileBertConfig(
        hidden_size=WIDTH,
        intra_bottleneck_size=NARROW,
        num_attention_heads=HEADS,
        intermediate_size=3 * NARROW,
        num_feedforward_networks=num_feed_forwards,
        normalization_type="no_norm" if norm is NoNorm else "layer_norm",
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    peer = MobileBertLayer(config).double()
    peer.load_state_dict({peer_name(name, num_feed_forwards): value for name, value in block.state_dict().items()})
    x, cotangent = draw(length).requires_grad_(), draw(length + 1)[:, :length]
    real = torch.rand(2, length) < 0.7
    real[:, 0] = True
    theirs = dict(peer.named_parameters())
    for key_mask in (None, real):
        added = None
        if key_mask is not None:
            added = torch.zeros(2, 1, 1, length).double().masked_fill(~key_mask[:, None, None], float("-inf"))
        ours, other = block(x, key_mask=key_mask), peer(x, added)
        torch.testing.assert_close(ours, other, **TOLERANCE)
        names = [name for name, _ in block.named_parameters()]
        mine = torch.autograd.grad((ours * cotangent).sum(), [x, *block.parameters()])
        pairs = [x, *(theirs[peer_name(name, num_feed_forwards)] for name in names)]
        peers = torch.autograd.grad((other * cotangent).sum(), pairs)
        assert len(pairs) == 1 + len(theirs)
        for a, b in zip(mine, peers, strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)  # sums over all tokens of terms as large as 100


@pytest.mark.peer
@pytest.mark.parametrize("length", LENGTHS)
def test_the_trigram_embedding_equals_transformers(length: int) -> None:
    pytest.importorskip("transformers")
    from transformers import MobileBertConfig
    from transformers.models.mobilebert.modeling_mobilebert import MobileBertEmbeddings

    torch.manual_seed(0)
    ours = TrigramEmbedding(20, WIDTH, 5, padding_idx=0).double()
    config = MobileBertConfig(vocab_size=20, hidden_size=WIDTH, embedding_size=5, hidden_dropout_prob=0.0)
    theirs = MobileBertEmbeddings(config).double()
    with torch.no_grad():
        theirs.word_embeddings.weight.copy_(ours.table.weight)
        before, own, after = ours.widen.weight.chunk(3, dim=1)  # [C, E] each
        theirs.embedding_transformation.weight.copy_(torch.cat([after, own, before], dim=1))
        theirs.embedding_transformation.bias.copy_(ours.widen.bias)
        theirs.position_embeddings.weight.zero_()
        theirs.token_type_embeddings.weight.zero_()
    tokens = torch.randint(20, (2, length))
    mine, other = ours(tokens), theirs(tokens)
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)  # float64 sums of 15 terms
    cotangent = torch.randn_like(mine)
    by_ours = torch.autograd.grad((mine * cotangent).sum(), ours.table.weight)
    by_theirs = torch.autograd.grad((other * cotangent).sum(), theirs.word_embeddings.weight)
    torch.testing.assert_close(by_ours, by_theirs, atol=1e-11, rtol=0)  # of some 200 terms


def test_trigrams_take_the_place_of_an_encoders_embedding_and_padding_is_as_nothing() -> None:
    torch.manual_seed(0)
    model = Encoder(20, WIDTH, 1, lambda: SelfAttention(WIDTH, 2, is_causal=False))
    model.body.embedding = TrigramEmbedding(20, WIDTH, 5, padding_idx=0)
    tokens = torch.randint(1, 20, (2, 7))
    padded = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, key_mask=padded != 0)[:, :7], model(tokens), atol=1e-5, rtol=0)  # float32
    assert model(tokens[:, :0]).shape == (2, 0, 20)


@pytest.mark.parametrize("norm", [NoNorm, nn.LayerNorm])
@pytest.mark.parametrize("op", [None, FlashAttention(), SlidingWindow(5)])
def test_keeps_the_contract_of_a_mixer(op: nn.Module | None, norm: type[nn.Module]) -> None:
    check_mixer(lambda: build(op=op, norm=norm), embed_dim=WIDTH)


def test_gradcheck() -> None:
    block, x = build(norm=nn.LayerNorm), draw(4).requires_grad_()
    key_mask = torch.tensor([[True] * 4, [True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: block(x, key_mask=key_mask)[key_mask], (x,))


def test_it_stands_where_a_layer_stands() -> None:
    layers = TransformerLayers(build() for _ in range(3))
    x, positions = draw(9), token_positions(9, torch.device("cpu"))
    expected = x
    for layer in layers:
        expected = layer(expected)
    assert torch.equal(layers(x, key_mask=None, positions=positions), expected)


def test_the_paper_sizes_have_the_weights_they_say() -> None:
    block = BottleneckBlock(512, 128, 4, device="meta")
    matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
    assert matrices == 4 * 512 * 128 + (3 + 2 * 4 * 4) * 128**2 == 835_584
    trigrams = TrigramEmbedding(30_522, 512, 128, device="meta")
    assert sum(parameter.numel() for parameter in trigrams.parameters()) == 30_522 * 128 + 3 * 128 * 512 + 512


def test_bad_arguments_are_named() -> None:
    for name in ("num_feed_forwards", "expansion"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            BottleneckBlock(WIDTH, NARROW, HEADS, **{name: 0})
    with pytest.raises(ArgumentError, match="embed_dim must be positive; got 0"):
        BottleneckBlock(0, NARROW, HEADS)
    with pytest.raises(ArgumentError, match="bottleneck_dim must be a multiple of num_heads; got 8 and 3"):
        BottleneckBlock(WIDTH, NARROW, 3)
    with pytest.raises(CombinationError, match="WatchedAttention is a class, not an instance"):
        BottleneckBlock(WIDTH, NARROW, HEADS, op=WatchedAttention)
    with pytest.raises(ArgumentError, match="table_dim must be positive; got 0"):
        TrigramEmbedding(20, WIDTH, 0)
    with pytest.raises(ArgumentError, match="padding_idx must be a token from 0 to 19; got 20"):
        TrigramEmbedding(20, WIDTH, 5, padding_idx=20)
