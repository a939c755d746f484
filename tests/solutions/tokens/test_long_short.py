"""Long-short range attention: each branch keeps to its half; contracts, streams, weights on paper."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import TokenMixer
from transformer_problems.models.block import FeedForward, TransformerBlock
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.tokens.long_short import LongShortAttention
from transformer_problems.testing import check_mixer

WIDTH, HALF, HEADS = 16, 8, 2
LENGTHS = [1, 63, 64, 100, 101]
TOLERANCE = {"atol": 1e-11, "rtol": 1e-11}  # float64 sums of some hundred terms


def rotary(**options: object) -> SelfAttention:
    return SelfAttention(HALF, HEADS, position=RotaryEmbedding(HALF // HEADS), **options)


def chunked() -> ChunkedAttention:
    return ChunkedAttention(HALF, HEADS, chunk_size=4, left_chunks=1, look_ahead=False)


def build(make: Callable[[], TokenMixer] = rotary, **options: object) -> LongShortAttention:
    torch.manual_seed(0)
    layer = LongShortAttention(WIDTH, make(), **{"kernel_size": 5, **options}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def draw(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def naive(layer: LongShortAttention, x: Tensor, key_mask: Tensor) -> Tensor:
    """Both branches from the parameters alone, with all scores and no positions. key_mask: [B, N] bool."""
    p, length = dict(layer.named_parameters()), x.shape[1]
    far, near = x[..., :HALF], x[..., HALF:]
    q, k, v = (
        (far @ p[f"attention.{s}_proj.weight"].T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for s in ("q", "k", "v")
    )
    seen = key_mask[:, None, None]
    if layer.is_causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    scores = (q @ k.mT / (HALF // HEADS) ** 0.5).masked_fill(~seen, float("-inf"))
    far = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ p["attention.out_proj.weight"].T
    value, gate = (near @ p["convolution.in_proj.weight"].T).chunk(2, -1)
    gated = value * gate.sigmoid() * key_mask[..., None]
    places = p["convolution.place_scores"].softmax(-1)  # [H, 5]
    distance = torch.arange(length) - torch.arange(length)[:, None] + (4 if layer.is_causal else 2)  # [N, M]
    matrix = places[:, distance.clamp(0, 4)] * ((distance >= 0) & (distance <= 4))  # [H, N, M]
    mixed = torch.einsum("hnm,bmhd->bnhd", matrix, gated.unflatten(-1, (len(places), -1))).flatten(-2)
    return torch.cat([far, mixed @ p["convolution.out_proj.weight"].T], dim=-1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int, is_causal: bool) -> None:
    layer = build(lambda: SelfAttention(HALF, HEADS, is_causal=is_causal))
    x, real = draw(length).requires_grad_(), torch.rand(2, length) < 0.7
    real[:, 0] = True
    for key_mask in (None, real):
        ours, theirs = layer(x, key_mask=key_mask), naive(layer, x, torch.ones_like(real) if key_mask is None else real)
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        cotangent, inputs = torch.randn_like(ours), (x, *layer.parameters())
        grads = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)  # sums over all tokens


@pytest.mark.parametrize("make", [rotary, lambda: rotary(is_causal=False), chunked, lambda: Mamba(HALF, state_dim=4)])
def test_keeps_the_contract_of_a_mixer(make: Callable[[], TokenMixer]) -> None:
    layer = build(make)
    report = check_mixer(lambda: build(make), embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert streamed.outcome == ("holds" if layer.is_causal else "not applicable")
    assert layer.is_causal == layer.convolution.is_causal == layer.attention.is_causal


def test_gradcheck() -> None:
    layer, x = build(lambda: rotary(is_causal=False)), draw(4).requires_grad_()
    key_mask = torch.tensor([[True] * 4, [True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, key_mask=key_mask), (x,))


def test_each_half_is_read_by_its_branch_alone() -> None:
    layer, x = build(lambda: rotary(is_causal=False)), draw(20)
    y = layer(x)
    changed = x.clone()
    changed[:, 10, 0] += 1.0
    differs = layer(changed) != y
    assert differs[..., :HALF].any(-1).all() and not differs[..., HALF:].any()  # far: every token
    changed = x.clone()
    changed[:, 10, -1] += 1.0
    differs = layer(changed) != y
    assert not differs[..., :HALF].any()
    assert differs.any(-1).any(0).nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_positions_reach_the_attention() -> None:
    layer, x, positions = build(), draw(9), 3 * torch.arange(9)
    y = layer(x, positions=positions)
    assert torch.equal(y[..., :HALF], layer.attention(x[..., :HALF], positions=positions))
    assert (y - layer(x)).abs().max() > 0.01


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_streams_of_any_chunks_give_what_the_whole_gives(sizes: list[int]) -> None:
    layer, x = build(), draw(sum(sizes))
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **TOLERANCE)
    assert set(state.tensors()) == {"mixer.keys", "mixer.values", "convolution.frames"}
    assert not any(tensor.requires_grad for tensor in state.detach().tensors().values())


def test_a_flattened_block_has_the_weights_that_the_docstring_says() -> None:
    width = 64
    mixer = LongShortAttention(width, SelfAttention(width // 2, 4), kernel_size=31, num_heads=4)
    assert sum(p.numel() for p in mixer.parameters()) == 7 * width**2 // 4 + 4 * 31
    block = TransformerBlock(width, mixer, feed_forward=partial(FeedForward, expansion=1))
    matrices = [p.numel() for name, p in block.named_parameters() if p.dim() == 2 and "place" not in name]
    assert sum(matrices) == 3.75 * width**2
    plain = TransformerBlock(width, SelfAttention(width, 4))
    assert sum(p.numel() for p in plain.parameters() if p.dim() == 2) == 12 * width**2


def test_a_whole_decoder_learns_with_it() -> None:
    torch.manual_seed(0)
    model = Decoder(11, WIDTH, 2, lambda: LongShortAttention(WIDTH, rotary(), kernel_size=5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens, losses = torch.arange(11).repeat(4, 2), []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CombinationError, match="SelfAttention is built for embed_dim=8, but its place here has"):
        LongShortAttention(2 * WIDTH, rotary())
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of 2, half for each branch; got 15"):
        LongShortAttention(WIDTH - 1, rotary())
    with pytest.raises(ArgumentError, match="kernel_size must be odd"):
        LongShortAttention(WIDTH, rotary(), kernel_size=4)
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 8 and 3"):
        LongShortAttention(WIDTH, rotary(), num_heads=3)
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build(lambda: rotary(is_causal=False)).initial_state(1)
    with pytest.raises(CombinationError, match="SelfAttention is a class, not an instance"):
        LongShortAttention(WIDTH, SelfAttention)  # type: ignore[arg-type]
