"""The convolution module against its formula and transformers' Wav2Vec2-Conformer; padding, statistics, streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.solutions.tokens.convolution_module import ConvolutionModule
from transformer_problems.testing import check_mixer

WIDTH = 6
LENGTHS = [1, 63, 64, 100, 101]
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms of order one
GRADIENT_TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # divided by standard deviations, which may be small


def build(kernel_size: int = 5, **options: object) -> ConvolutionModule:
    torch.manual_seed(0)
    layer = ConvolutionModule(WIDTH, kernel_size, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if isinstance(layer.norm, nn.BatchNorm1d):
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2.0)
    return layer


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: ConvolutionModule, x: Tensor, real: Tensor) -> Tensor:
    """The definition, frame by frame; statistics over real frames. real: [B, N] bool."""
    value, gate = (x @ layer.pointwise_in.weight.T).chunk(2, dim=-1)
    gated = value * gate.sigmoid() * real[..., None]
    kernel, length = layer.depthwise.weight[:, 0].T, x.shape[1]  # [kernel_size, C]
    first = -(layer.kernel_size - 1) // (1 if layer.is_causal else 2)
    frames = [
        sum(
            (kernel[k] * gated[:, n + first + k] for k in range(len(kernel)) if 0 <= n + first + k < length),
            0 * x[:, 0],
        )
        for n in range(length)
    ]
    mixed, norm = torch.stack(frames, dim=1), layer.norm
    if isinstance(norm, nn.LayerNorm):
        mean, variance = mixed.mean(-1, keepdim=True), mixed.var(-1, correction=0, keepdim=True)
    elif layer.training:
        mean, variance = mixed[real].mean(0), mixed[real].var(0, correction=0)
    else:
        mean, variance = norm.running_mean, norm.running_var
    normed = (mixed - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return normed * normed.sigmoid() @ layer.pointwise_out.weight.T


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_in_outputs_and_gradients(
    length: int, is_causal: bool, norm: str, is_training: bool
) -> None:
    layer = build(is_causal=is_causal, norm=norm).train(is_training)
    x, real = draw(length, 3).requires_grad_(), torch.rand(3, length) < 0.7
    real[:2, 0] = True
    for key_mask in (None, real):
        mask = torch.ones_like(real) if key_mask is None else key_mask
        ours, theirs = layer(x, key_mask=key_mask)[mask], naive(layer, x, mask)[mask]
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        cotangent, inputs = torch.randn_like(ours), (x, *layer.parameters())
        grads = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(*grads, **GRADIENT_TOLERANCE)


@pytest.mark.peer
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_with_the_same_weights(length: int, is_training: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerConvolutionModule

    config = Wav2Vec2ConformerConfig(
        hidden_size=WIDTH, conv_depthwise_kernel_size=5, hidden_act="swish", conformer_conv_dropout=0.0
    )
    layer, front = build().train(is_training), nn.LayerNorm(WIDTH, dtype=torch.float64)
    peer = Wav2Vec2ConformerConvolutionModule(config).double().train(is_training)
    peer.layer_norm.load_state_dict(front.state_dict())
    peer.batch_norm.load_state_dict(layer.norm.state_dict())
    peer.depthwise_conv.load_state_dict(layer.depthwise.state_dict())
    with torch.no_grad():
        peer.pointwise_conv1.weight.copy_(layer.pointwise_in.weight[..., None])
        peer.pointwise_conv2.weight.copy_(layer.pointwise_out.weight[..., None])
    x, cotangent = draw(length).requires_grad_(), draw(length)
    ours, theirs = layer(front(x)), peer(x)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    pairs = [(x, x), (layer.pointwise_in.weight, peer.pointwise_conv1.weight)]
    pairs += [(layer.depthwise.weight, peer.depthwise_conv.weight)]
    pairs += [(layer.norm.weight, peer.batch_norm.weight), (layer.norm.bias, peer.batch_norm.bias)]
    pairs += [(layer.pointwise_out.weight, peer.pointwise_conv2.weight)]
    own = torch.autograd.grad((ours * cotangent).sum(), [mine for mine, _ in pairs])
    other = torch.autograd.grad((theirs * cotangent).sum(), [their for _, their in pairs])
    for mine, their in zip(own, other, strict=True):
        torch.testing.assert_close(mine, their.view_as(mine), **GRADIENT_TOLERANCE)
    torch.testing.assert_close(layer.norm.running_var, peer.batch_norm.running_var, **TOLERANCE)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keeps_the_contract_of_a_mixer(norm: str, is_causal: bool) -> None:
    report = check_mixer(lambda: build(is_causal=is_causal, norm=norm), embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert streamed.outcome == ("holds" if is_causal else "not applicable")


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradcheck(norm: str, is_training: bool) -> None:
    layer, x = build(3, norm=norm).train(is_training), draw(5).requires_grad_()
    key_mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, key_mask=key_mask)[key_mask], (x,))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    extra=st.integers(0, 9),
    is_causal=st.booleans(),
    norm=st.sampled_from(["batch", "layer"]),
    is_training=st.booleans(),
)
def test_padding_of_any_content_and_length_changes_nothing(
    lengths: list[int], extra: int, is_causal: bool, norm: str, is_training: bool
) -> None:
    layer = build(is_causal=is_causal, norm=norm).train(is_training)
    longest = max(lengths)
    x = draw(longest, len(lengths))
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    noise = torch.where(real[..., None], x, 1e3)
    padded = torch.cat([noise, torch.full((len(lengths), extra, WIDTH), 1e3).double()], dim=1)
    mask = torch.cat([real, torch.zeros(len(lengths), extra, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(layer(padded, key_mask=mask)[mask], layer(x, key_mask=real)[real], **TOLERANCE)


def test_running_statistics_are_those_of_real_frames() -> None:
    x, real = draw(9), torch.arange(9) < torch.tensor([[9], [4]])
    short, padded = build().train(), build().train()
    short(x, key_mask=real)
    longer = torch.cat([x, torch.full((2, 20, WIDTH), 7.0).double()], dim=1)
    padded(longer, key_mask=torch.cat([real, torch.zeros(2, 20, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(short.norm.state_dict(), padded.norm.state_dict(), **TOLERANCE)


@settings(max_examples=40)
@given(
    kernel_size=st.sampled_from([1, 3, 7]),
    norm=st.sampled_from(["batch", "layer"]),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
)
def test_causal_streams_of_any_chunks_give_what_the_whole_gives(kernel_size: int, norm: str, sizes: list[int]) -> None:
    layer, x = build(kernel_size, is_causal=True, norm=norm).eval(), draw(sum(sizes))
    state, outputs = layer.initial_state(2), []
    with torch.no_grad():
        for chunk in x.split(sizes, dim=1):
            y, state = layer.stream(chunk, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)
    assert state.frames.shape == (2, kernel_size - 1, WIDTH)
    assert not state.detach().frames.requires_grad


def test_a_frame_reaches_as_far_as_the_kernel() -> None:
    for is_causal, reached in ((False, [8, 9, 10, 11, 12]), (True, [10, 11, 12, 13, 14])):
        layer, x = build(is_causal=is_causal, norm="layer"), draw(20)
        changed = x.clone()
        changed[:, 10] += 1.0
        differs = (layer(changed) != layer(x)).any(dim=-1).any(dim=0)
        assert differs.nonzero().flatten().tolist() == reached


def test_what_cannot_stream_says_so() -> None:
    with pytest.raises(ArgumentError, match="is_causal must be True to stream"):
        build().initial_state(1)
    layer = build(is_causal=True).train()
    with pytest.raises(ArgumentError, match=r"must be in evaluation mode to stream: .*Call eval\(\) first"):
        layer.stream(draw(3), layer.initial_state(2))
    with pytest.raises(ArgumentError, match="must have the batch size of its state, 2; got 3"):
        layer.eval().stream(draw(3, 3), layer.initial_state(2))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"kernel_size must be odd, .* got 4. Choose 3 or 5"):
        ConvolutionModule(WIDTH, 4)
    with pytest.raises(ArgumentError, match="kernel_size must be positive; got -1"):
        ConvolutionModule(WIDTH, -1)
    with pytest.raises(ArgumentError, match="embed_dim must be positive; got 0"):
        ConvolutionModule(0)
    with pytest.raises(UnknownNameError, match="unknown norm of the convolution 'group'. Known: batch, layer"):
        ConvolutionModule(WIDTH, norm="group")  # type: ignore[arg-type]


def test_bad_inputs_are_named() -> None:
    layer = build()
    with pytest.raises(ArgumentError, match=rf"x must be \[B, N, {WIDTH}\]; got \[2, 5, 3\]"):
        layer(draw(5)[..., :3])
    with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 5\]"):
        layer(draw(5), key_mask=torch.ones(2, 4, dtype=torch.bool))
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ArgumentError, match="two real frames or more to train with norm='batch'; got 1"):
        layer.train()(draw(2), key_mask=mask)
