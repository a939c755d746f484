"""The lightweight convolution against its formula: kernels that heads share and that sum to one; padding, streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.tokens.lightweight_convolution import LightweightConvolution
from transformer_problems.testing import check_mixer

WIDTH = 6
LENGTHS = [1, 63, 64, 100, 101]
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some ten terms of order one
GRADIENT_TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # of some hundred


def build(kernel_size: int = 5, num_heads: int = 3, **options: object) -> LightweightConvolution:
    torch.manual_seed(0)
    layer = LightweightConvolution(WIDTH, kernel_size, num_heads=num_heads, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: LightweightConvolution, x: Tensor, real: Tensor) -> Tensor:
    """The definition, token by token. real: [B, N] bool."""
    value, gate = (x @ layer.in_proj.weight.T).chunk(2, dim=-1)
    gated = value * gate.sigmoid() * real[..., None]
    scores, length = layer.place_scores.exp(), x.shape[1]
    kernels = scores / scores.sum(dim=1, keepdim=True)
    num_heads, kernel_size = kernels.shape
    by_channel = torch.stack([kernels[channel * num_heads // WIDTH] for channel in range(WIDTH)], dim=-1)
    first = 1 - kernel_size if layer.is_causal else -(kernel_size // 2)
    tokens = [
        sum(
            (by_channel[k] * gated[:, n + first + k] for k in range(kernel_size) if 0 <= n + first + k < length),
            0 * x[:, 0],
        )
        for n in range(length)
    ]
    return torch.stack(tokens, dim=1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("num_heads", [1, 3, 6])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(length: int, is_causal: bool, num_heads: int) -> None:
    layer = build(num_heads=num_heads, is_causal=is_causal)
    x, real = draw(length).requires_grad_(), torch.rand(2, length) < 0.7
    for key_mask in (None, real):
        ours, theirs = layer(x, key_mask=key_mask), naive(layer, x, torch.ones_like(real) if key_mask is None else real)
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        cotangent, inputs = torch.randn_like(ours), (x, *layer.parameters())
        grads = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, **GRADIENT_TOLERANCE)


@pytest.mark.parametrize("is_causal", [False, True])
def test_keeps_the_contract_of_a_mixer(is_causal: bool) -> None:
    report = check_mixer(lambda: build(is_causal=is_causal), embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert streamed.outcome == ("holds" if is_causal else "not applicable")


def test_gradcheck() -> None:
    layer, x = build(3), draw(5).requires_grad_()
    key_mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, key_mask=key_mask), (x,))


@settings(max_examples=40)
@given(
    kernel_size=st.sampled_from([1, 3, 7]),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
)
def test_causal_streams_of_any_chunks_give_what_the_whole_gives(kernel_size: int, sizes: list[int]) -> None:
    layer, x = build(kernel_size, is_causal=True), draw(sum(sizes))
    state, outputs = layer.initial_state(2), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)
    assert state.frames.shape == (2, kernel_size - 1, WIDTH)


def test_a_token_reaches_as_far_as_the_kernel() -> None:
    for is_causal, reached in ((False, [8, 9, 10, 11, 12]), (True, [10, 11, 12, 13, 14])):
        layer, x = build(is_causal=is_causal), draw(20)
        changed = x.clone()
        changed[:, 10] += 1.0
        differs = (layer(changed) != layer(x)).any(dim=-1).any(dim=0)
        assert differs.nonzero().flatten().tolist() == reached


def test_places_cost_one_weight_a_head_whatever_the_width() -> None:
    for width in (8, 64):
        layer = LightweightConvolution(width, 31, num_heads=4)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * width**2 + 4 * 31


def test_what_cannot_stream_says_so() -> None:
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build().initial_state(1)
    layer = build(is_causal=True)
    with pytest.raises(ArgumentError, match="must have the batch size of its state, 2; got 3"):
        layer.stream(draw(3, 3), layer.initial_state(2))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"kernel_size must be odd, .* got 4. Choose 3 or 5"):
        LightweightConvolution(WIDTH, 4, num_heads=3)
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 6 and 4. Choose num_heads"):
        LightweightConvolution(WIDTH)
    with pytest.raises(ArgumentError, match="kernel_size must be positive; got -1"):
        LightweightConvolution(WIDTH, -1, num_heads=3)
