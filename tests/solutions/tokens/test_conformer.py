"""The Conformer block against its formula and transformers' Wav2Vec2-Conformer; padding, streams, bad input."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import TokenMixer
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.tokens.conformer import ConformerBlock
from transformer_problems.testing import check_mixer

WIDTH, HEADS = 8, 2
LENGTHS = [1, 63, 64, 100, 101]
FREQUENCIES = (10_000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)).double()  # float32 numbers, as the encoding's own
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # float64 sums of some hundred terms through five norms and a softmax
OWN_NAMES = {  # of the block's parts, and of transformers'
    "first_half.norm": "ffn1_layer_norm",
    "first_half.up": "ffn1.intermediate_dense",
    "first_half.down": "ffn1.output_dense",
    "mixer_norm": "self_attn_layer_norm",
    "mixer.q_proj": "self_attn.linear_q",
    "mixer.k_proj": "self_attn.linear_k",
    "mixer.v_proj": "self_attn.linear_v",
    "mixer.out_proj": "self_attn.linear_out",
    "mixer.position.r_proj": "self_attn.linear_pos",
    "mixer.position.content_bias": "self_attn.pos_bias_u",
    "mixer.position.position_bias": "self_attn.pos_bias_v",
    "convolution_norm": "conv_module.layer_norm",
    "convolution.pointwise_in": "conv_module.pointwise_conv1",
    "convolution.depthwise": "conv_module.depthwise_conv",
    "convolution.norm": "conv_module.batch_norm",
    "convolution.pointwise_out": "conv_module.pointwise_conv2",
    "second_half.norm": "ffn2_layer_norm",
    "second_half.up": "ffn2.intermediate_dense",
    "second_half.down": "ffn2.output_dense",
    "final_norm": "final_layer_norm",
}


def relative(**options: object) -> SelfAttention:
    return SelfAttention(WIDTH, HEADS, position=TransformerXLRelative(WIDTH, HEADS), bias=True, **options)


def chunked(look_ahead: bool) -> ChunkedAttention:
    position = TransformerXLRelative(WIDTH, HEADS)
    return ChunkedAttention(
        WIDTH, HEADS, chunk_size=4, left_chunks=1, look_ahead=look_ahead, position=position, bias=True
    )


def build(make_mixer: Callable[[], TokenMixer], **options: object) -> ConformerBlock:
    torch.manual_seed(0)
    block = ConformerBlock(WIDTH, make_mixer(), kernel_size=5, **options).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return block


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(block: ConformerBlock, x: Tensor, key_mask: Tensor | None) -> Tensor:
    """The formula of section 2.4 with all N x N scores, from the parameters alone."""
    p = dict(block.named_parameters())

    def normed(name: str, y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def feed_forward(half: str, y: Tensor) -> Tensor:
        inner = linear(f"{half}.up", normed(f"{half}.norm", y))
        return linear(f"{half}.down", inner * inner.sigmoid())

    def attention(y: Tensor) -> Tensor:
        q, k, v = (linear(f"mixer.{s}_proj", y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for s in "qkv")
        index, dim = torch.arange(y.shape[1]).double(), WIDTH // HEADS
        waves = (index[:, None] - index)[..., None] * FREQUENCIES
        keys = linear("mixer.position.r_proj", torch.cat([waves.sin(), waves.cos()], -1)).unflatten(-1, (HEADS, dim))
        by_content = (q + p["mixer.position.content_bias"][:, None]) @ k.mT
        by_place = torch.einsum("bhnd,nmhd->bhnm", q + p["mixer.position.position_bias"][:, None], keys)
        scores = (by_content + by_place) * dim**-0.5
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
        return linear("mixer.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    def convolution(y: Tensor) -> Tensor:
        value, gate = linear("convolution.pointwise_in", y).chunk(2, -1)
        gated = value * gate.sigmoid()
        if key_mask is not None:
            gated = gated * key_mask[..., None]
        around = F.pad(gated, (0, 0, 2, 2)).unfold(1, 5, 1)  # [B, N, C, 5]
        frames = normed("convolution.norm", (around * p["convolution.depthwise.weight"][:, 0]).sum(-1))
        return linear("convolution.pointwise_out", frames * frames.sigmoid())

    x = x + feed_forward("first_half", x) / 2
    x = x + attention(normed("mixer_norm", x))
    x = x + convolution(normed("convolution_norm", x))
    return normed("final_norm", x + feed_forward("second_half", x) / 2)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int) -> None:
    block = build(lambda: relative(is_causal=False), norm="layer")
    x, real = draw(length).requires_grad_(), torch.rand(2, length) < 0.7
    real[:, 0] = True
    for key_mask in (None, real):
        mask = torch.ones_like(real) if key_mask is None else key_mask
        ours, theirs = block(x, key_mask=key_mask)[mask], naive(block, x, key_mask)[mask]
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        cotangent, inputs = torch.randn_like(ours), (x, *block.parameters())
        grads = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, atol=1e-8, rtol=1e-8)  # sums over all frames of terms as large as 100


@pytest.mark.peer
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_with_the_same_weights(length: int, is_training: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as peers

    config = Wav2Vec2ConformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_act="swish",
        conv_depthwise_kernel_size=5,
        position_embeddings_type="relative",
        **dict.fromkeys(("attention_dropout", "hidden_dropout", "activation_dropout", "conformer_conv_dropout"), 0.0),
    )
    config._attn_implementation = "eager"
    block = build(lambda: relative(is_causal=False)).train(is_training)
    peer = peers.Wav2Vec2ConformerEncoderLayer(config).double().train(is_training)
    own, theirs = block.state_dict(), {}
    for ours, other in OWN_NAMES.items():
        for name, value in own.items():
            if name.startswith(ours):
                theirs[other + name.removeprefix(ours)] = _as_peer(name, value)
    peer.load_state_dict(theirs)
    x, cotangent = draw(length).requires_grad_(), draw(length)
    places = peers.Wav2Vec2ConformerRelPositionalEmbedding(config)
    y_ours, y = block(x), peer(x, relative_position_embeddings=_exact_waves(places, length))
    torch.testing.assert_close(y_ours, y, **TOLERANCE)
    mine, their = dict(block.named_parameters()), dict(peer.named_parameters())
    names = [(name, o + name.removeprefix(n)) for n, o in OWN_NAMES.items() for name in mine if name.startswith(n)]
    assert len(names) == len(mine) == len(their)
    ours = torch.autograd.grad((y_ours * cotangent).sum(), [x, *(mine[name] for name, _ in names)])
    others = torch.autograd.grad((y * cotangent).sum(), [x, *(their[name] for _, name in names)])
    for (name, _), a, b in zip([("x", ""), *names], ours, others, strict=True):
        torch.testing.assert_close(_as_peer(name, a).view_as(b), b, atol=1e-8, rtol=1e-8)  # as for the formula


def _as_peer(name: str, value: Tensor) -> Tensor:
    """A parameter, or its gradient, in the layout of transformers: sine and cosine interleaved, pointwise as Conv1d."""
    if name == "mixer.position.r_proj.weight":
        return torch.stack(value.chunk(2, dim=1), dim=-1).flatten(1)
    return value[..., None] if name.startswith("convolution.pointwise") else value


def _exact_waves(places: nn.Module, length: int) -> Tensor:
    """Its table of distances from length - 1 down to 1 - length, once more in float64."""
    table = places(torch.zeros(1, length, WIDTH))
    distance = torch.arange(length - 1, -length, -1).double()
    waves = distance[:, None] * FREQUENCIES
    exact = torch.stack([waves.sin(), waves.cos()], dim=-1).flatten(1)[None]
    torch.testing.assert_close(exact.float(), table, atol=1e-4, rtol=0)  # float32 angles of up to 100
    return exact


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("mixer", [lambda: relative(is_causal=False), relative, lambda: chunked(look_ahead=False)])
@pytest.mark.parametrize("causal_convolution", [False, True])
def test_keeps_the_contract_of_a_mixer(mixer: Callable[[], TokenMixer], norm: str, causal_convolution: bool) -> None:
    block = build(mixer, norm=norm, causal_convolution=causal_convolution)
    report = check_mixer(block, embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert streamed.outcome == ("holds" if block.is_causal else "not applicable")
    assert block.is_causal == (block.mixer.is_causal and causal_convolution)


@pytest.mark.parametrize("is_training", [False, True])
def test_gradcheck(is_training: bool) -> None:
    block, x = build(lambda: relative(is_causal=False)).train(is_training), draw(4).requires_grad_()
    key_mask = torch.tensor([[True] * 4, [True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: block(x, key_mask=key_mask)[key_mask], (x,))


@pytest.mark.parametrize("is_training", [False, True])
def test_real_frames_do_not_depend_on_padding(is_training: bool) -> None:
    block = build(lambda: relative(is_causal=False)).train(is_training)
    x, real = draw(11), torch.arange(11) < torch.tensor([[11], [6]])
    padded = torch.cat([torch.where(real[..., None], x, 30.0), torch.full((2, 9, WIDTH), 30.0).double()], dim=1)
    mask = torch.cat([real, torch.zeros(2, 9, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(block(padded, key_mask=mask)[mask], block(x, key_mask=real)[real], **TOLERANCE)


def test_positions_reach_the_mixer() -> None:
    block, x = build(lambda: relative(is_causal=False), norm="layer"), draw(9)
    y, index = block(x), torch.arange(9)
    torch.testing.assert_close(block(x, positions=index + 70), y, **TOLERANCE)  # only distances count
    assert (block(x, positions=3 * index) - y).abs().max() > 0.01


@settings(max_examples=30)
@given(
    norm=st.sampled_from(["batch", "layer"]),
    look_ahead=st.booleans(),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    rest=st.integers(1, 9),
)
def test_streams_of_chunks_give_what_the_whole_gives(norm: str, look_ahead: bool, counts: list[int], rest: int) -> None:
    block = build(lambda: chunked(look_ahead), norm=norm, causal_convolution=True).eval()
    sizes = [*(count * (4 if look_ahead else 1) for count in counts), rest]  # look-ahead takes whole chunks of 4
    x = draw(sum(sizes))
    state, outputs = block.initial_state(2), []
    with torch.no_grad():
        for chunk in x.split(sizes, dim=1):
            y, state = block.stream(chunk, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), block(x), **TOLERANCE)
    assert set(state.tensors()) == {"mixer.keys", "mixer.values", "convolution.frames"}
    assert not any(tensor.requires_grad for tensor in state.detach().tensors().values())


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CombinationError, match="SelfAttention is built for embed_dim=8, but its place here has"):
        ConformerBlock(2 * WIDTH, relative())
    with pytest.raises(ArgumentError, match="kernel_size must be odd"):
        ConformerBlock(WIDTH, relative(), kernel_size=4)
    with pytest.raises(ArgumentError, match="expansion must be positive; got 0"):
        ConformerBlock(WIDTH, relative(), expansion=0)
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build(lambda: relative(is_causal=False), causal_convolution=True).initial_state(1)
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build(relative).initial_state(1)
    for other in (relative, lambda: relative(), None, nn.Linear(WIDTH, WIDTH)):
        with pytest.raises(ArgumentError, match=r"mixer must be a token mixer, .* got .* Pass e.g. SelfAttention\(8"):
            ConformerBlock(WIDTH, other)  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="SelfAttention is a class, not an instance"):
        ConformerBlock(WIDTH, SelfAttention)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="causal_convolution must be True or False; got 'no'"):
        ConformerBlock(WIDTH, relative(), causal_convolution="no")  # type: ignore[arg-type]
