"""ConvolutionalStem against explicit loops over convolutions, norms and pools; what its tokens see and cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.vision import VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem, Downsampling

KINDS: tuple[Downsampling, ...] = ("stride", "pool")


def build(num_stages: int, downsampling: Downsampling) -> ConvolutionalStem:
    torch.manual_seed(0)
    stem = ConvolutionalStem(8, num_stages, in_channels=2, downsampling=downsampling, dtype=torch.float64)
    for norm in (module for module in stem.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return stem


def draw(height: int, width: int) -> Tensor:
    return torch.randn(3, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def around(x: Tensor, row: int, column: int) -> dict[tuple[int, int], Tensor]:
    """The pixels of the image in the 3 x 3 around one, by their place in it."""
    places = [(i, j) for i in range(3) for j in range(3)]
    inside = [(i, j) for i, j in places if 0 <= row + i - 1 < x.shape[2] and 0 <= column + j - 1 < x.shape[3]]
    return {(i, j): x[:, :, row + i - 1, column + j - 1] for i, j in inside}


def on_grid(pixels: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in pixels], dim=-2)


def convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    rows, columns = (range(0, size, stride) for size in x.shape[2:])
    return on_grid(
        [[sum(p @ weight[:, :, i, j].T for (i, j), p in around(x, r, c).items()) for c in columns] for r in rows]
    )


def pooled(x: Tensor) -> Tensor:
    rows, columns = (range(0, size, 2) for size in x.shape[2:])
    return on_grid([[torch.stack(list(around(x, r, c).values())).amax(dim=0) for c in columns] for r in rows])


def normalized(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean = x.mean(dim=(0, 2, 3))
        var = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    scale = norm.weight / (var + norm.eps).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def naive(stem: ConvolutionalStem, images: Tensor) -> Tensor:
    x = images
    for stage in stem.stages:
        if stem.downsampling == "pool":
            x = pooled(convolved(x, stage[0].weight, 1).clamp(min=0))
        else:
            x = normalized(convolved(x, stage[0].weight, 2), stage[1]).clamp(min=0)
    tokens = x.flatten(2).mT
    if stem.downsampling == "stride":
        tokens = tokens @ stem.projection.weight.flatten(1).T + stem.projection.bias
    return tokens


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 3)])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("downsampling", KINDS)
def test_tokens_are_the_formula(
    downsampling: Downsampling, num_stages: int, size: tuple[int, int], training: bool
) -> None:
    stem, images = build(num_stages, downsampling).train(training), draw(*size).requires_grad_()
    expected = naive(stem, images)
    found = stem(images)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # float64 sums of up to 36 terms, three times
    weight = torch.randn_like(expected)
    inputs = [images, *stem.parameters()]
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=1e-10)  # sums over all places as well


@pytest.mark.parametrize("downsampling", KINDS)
def test_gradients(downsampling: Downsampling) -> None:
    stem = build(2, downsampling).eval()
    assert torch.autograd.gradcheck(stem, (draw(5, 6)[:1].requires_grad_(),))


@given(num_stages=st.integers(1, 3), height=st.integers(1, 17), width=st.integers(1, 17))
def test_every_pixel_of_any_image_is_seen(num_stages: int, height: int, width: int) -> None:
    stem = ConvolutionalStem(4, num_stages, in_channels=1).eval()
    for parameter in stem.parameters():
        nn.init.constant_(parameter, 0.1)  # so that no ReLU hides a pixel
    images = torch.ones(1, 1, height, width, requires_grad=True)
    tokens = stem(images)
    rows, columns = stem.grid(height, width)
    assert tokens.shape == (1, rows * columns, 4)
    assert build(num_stages, "pool")(draw(height, width)).shape == (3, rows * columns, 8)
    tokens.sum().backward()
    assert bool((images.grad > 0).all())


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_token_sees_overlapping_surroundings(num_stages: int) -> None:
    stem, side = ConvolutionalStem(4, num_stages, in_channels=1).eval(), 2**num_stages
    for parameter in stem.parameters():
        nn.init.constant_(parameter, 0.1)
    images = torch.ones(1, 1, 8 * side, 8 * side, requires_grad=True)
    tokens = stem(images).unflatten(1, (8, 8))
    (seen,) = torch.autograd.grad(tokens[0, 4, 4].sum(), images)
    rows = seen[0, 0].any(dim=1).nonzero().flatten()
    reach = side - 1  # to each side of the pixel in the middle: 2^(S + 1) - 1 in all
    assert rows.tolist() == list(range(4 * side - reach, 4 * side + reach + 1))


@pytest.mark.parametrize("downsampling", KINDS)
def test_equal_surroundings_make_equal_tokens(downsampling: Downsampling) -> None:
    stem, images = build(2, downsampling).eval(), torch.zeros(1, 2, 32, 32, dtype=torch.float64)
    images[:, :, 10:18, 6:14] = draw(8, 8)[:1]
    moved = images.roll((4, 8), dims=(2, 3))  # by one token down and two to the right
    tokens, expected = (stem(x).unflatten(1, (8, 8)) for x in (moved, images))
    # away from the borders, where zeros come in that are no pixels
    torch.testing.assert_close(tokens[:, 2:7, 3:7], expected[:, 1:6, 1:5], atol=1e-12, rtol=0)
    assert not torch.allclose(tokens[:, 2:7, 3:7], expected[:, 2:7, 3:7])


@pytest.mark.parametrize("downsampling", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (30, 13)])
def test_flops_are_the_formula(downsampling: Downsampling, size: tuple[int, int]) -> None:
    stem, images = build(3, downsampling).eval(), draw(*size)[:1]
    (height, width), expected = size, 0
    for inner, outer in ((2, 2), (2, 4), (4, 8)):
        halved = (height + 1) // 2, (width + 1) // 2
        made = height * width if downsampling == "pool" else halved[0] * halved[1]
        expected += 2 * 9 * inner * outer * made
        height, width = halved
    assert stem.grid(*size) == (height, width)
    if downsampling == "stride":
        expected += 2 * 8 * 8 * height * width
    with torch.no_grad():
        assert count_flops(lambda: stem(images)) == expected


@pytest.mark.parametrize("downsampling", KINDS)
def test_a_vision_transformer_learns_through_it(downsampling: Downsampling) -> None:
    torch.manual_seed(0)
    stem = ConvolutionalStem(16, 2, in_channels=1, downsampling=downsampling)
    model = VisionTransformer(stem, (16, 16), 1, lambda: SelfAttention(16, 4, is_causal=False), 5, pool="attention")
    assert model(torch.randn(2, 1, 16, 16)).shape == model(torch.randn(2, 1, 9, 30)).shape == (2, 5)
    model(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]


def test_images_of_half_precision_and_no_images() -> None:
    for downsampling in KINDS:
        stem = ConvolutionalStem(8, 2, downsampling=downsampling, dtype=torch.bfloat16).eval()
        assert stem(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert stem(torch.zeros(0, 3, 8, 8, dtype=torch.bfloat16)).shape == (0, 4, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of 4, .* 3 stages; got 30. Choose 28 or 32"):
        ConvolutionalStem(30, 3)
    with pytest.raises(ArgumentError, match="num_stages must be positive; got 0"):
        ConvolutionalStem(8, 0)
    with pytest.raises(
        ArgumentError, match="num_stages must be at most 4, as widths double up to embed_dim=8; got 2000"
    ):
        ConvolutionalStem(8, 2000)
    with pytest.raises(ArgumentError, match="in_channels must be a positive whole number; got 1.5"):
        ConvolutionalStem(8, 1, in_channels=1.5)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown downsampling 'pooling'. Nearest: pool"):
        ConvolutionalStem(8, 1, downsampling="pooling")  # type: ignore[arg-type]
    stem = ConvolutionalStem(8, 2)
    for images in (torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, 3)):
        with pytest.raises(
            ArgumentError, match=r"images must be floating point \[B, 3, H, W\]; got torch\..*in_channels"
        ):
            stem(images)
    with pytest.raises(ArgumentError, match=r"got torch\.uint8 \[1, 3, 8, 8\]. Pass images.float\(\) / 255.$"):
        stem(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match="height must be positive; got 0"):
        stem(torch.zeros(1, 3, 0, 8))
    for num_images in (0, 1):
        with pytest.raises(ArgumentError, match=f"two tokens or more to train the batch norm .* got {num_images}"):
            stem(torch.zeros(num_images, 3, 4, 4))
    assert stem.eval()(torch.zeros(1, 3, 4, 4)).shape == (1, 1, 8)
    assert ConvolutionalStem(8, 2, downsampling="pool")(torch.zeros(1, 3, 4, 4)).shape == (1, 1, 8)
