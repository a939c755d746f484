"""InvertedResidual as transformers' with the same weights and as the formula; its cost on paper; what it refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.tokens.inverted_residual import InvertedResidual

WIDTH = 8
KINDS = [{"out_channels": WIDTH}, {"out_channels": 2 * WIDTH}, {"out_channels": WIDTH, "stride": 2}]
SIZES = [(6, 4), (7, 5), (1, 3), (1, 1)]
PARTS = {"widen": "expand_1x1", "depthwise": "conv_3x3", "narrow": "reduce_1x1"}  # ours and theirs


def fill(module: nn.Module) -> nn.Module:
    """Weights and statistics by which every part counts."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module


def build(**options: int) -> InvertedResidual:
    block = fill(InvertedResidual(WIDTH, dtype=torch.float64, **options))
    assert isinstance(block, InvertedResidual)
    return block


def draw(size: tuple[int, int]) -> Tensor:
    return torch.randn(3, WIDTH, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def normalized(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean = x.mean(dim=(0, 2, 3))
        var = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    scale = norm.weight / (var + norm.eps).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def naive(block: InvertedResidual, x: Tensor) -> Tensor:
    """Products with matrices and loops over places, in place of convolutions."""

    def everywhere(part: nn.Sequential, y: Tensor) -> Tensor:
        return normalized(torch.einsum("oc,bchw->bohw", part[0].weight[:, :, 0, 0], y), part[1])

    y = silu(everywhere(block.widen, x))
    height, width = y.shape[2:]
    kernel = block.depthwise[0].weight[:, 0]
    mixed = torch.zeros_like(y[:, :, :: block.stride, :: block.stride])
    for row in range(mixed.shape[2]):
        for column in range(mixed.shape[3]):
            for i in range(3):
                for j in range(3):
                    r, c = row * block.stride + i - 1, column * block.stride + j - 1
                    if 0 <= r < height and 0 <= c < width:
                        mixed[:, :, row, column] += y[:, :, r, c] * kernel[:, i, j]
    y = everywhere(block.narrow, silu(normalized(mixed, block.depthwise[1])))
    return x + y if block.stride == 1 and y.shape == x.shape else y


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula(kind: dict[str, int], size: tuple[int, int], training: bool) -> None:
    block, x = build(**kind, expansion=3).train(training), draw(size).requires_grad_()
    y, expected = block(x), naive(block, x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)  # float64 sums of at most 24 terms
    assert_same_gradients((y, block, x), (expected, block, x))


def assert_same_gradients(ours: tuple[Tensor, nn.Module, Tensor], theirs: tuple[Tensor, nn.Module, Tensor]) -> None:
    weight = torch.randn_like(ours[0])
    found, expected = (
        torch.autograd.grad((y * weight).sum(), [x, *block.parameters()], retain_graph=True)
        for y, block, x in (ours, theirs)
    )
    for own, other in zip(found, expected, strict=True):
        # sums over all places as well; a variance of three numbers may be small and its inverse large
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_with_the_same_weights(kind: dict[str, int], size: tuple[int, int], training: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import MobileViTConfig
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTInvertedResidual

    block, x = build(**kind, expansion=3).train(training), draw(size).requires_grad_()
    config = MobileViTConfig(expand_ratio=3.0)
    peer = MobileViTInvertedResidual(config, WIDTH, kind["out_channels"], kind.get("stride", 1)).double()
    for ours, theirs in PARTS.items():
        own, other = block.get_submodule(ours), peer.get_submodule(theirs)
        other.convolution.load_state_dict(own[0].state_dict())
        other.normalization.load_state_dict(own[1].state_dict())
    peer.train(training)
    y, expected = block(x), peer(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)  # float64, the same operators
    assert_same_gradients((y, block, x), (expected, peer, x))
    for ours, theirs in PARTS.items():
        own, other = block.get_submodule(ours)[1], peer.get_submodule(theirs).normalization
        torch.testing.assert_close(own.running_mean, other.running_mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(own.running_var, other.running_var, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: dict[str, int]) -> None:
    assert torch.autograd.gradcheck(build(**kind).eval(), (draw((4, 3))[:1].requires_grad_(),))


@pytest.mark.parametrize("stride", [1, 2])
def test_it_costs_what_it_says(stride: int) -> None:
    block, side, expansion, out = InvertedResidual(8, 24, stride=stride, expansion=4).eval(), 16, 4, 24
    with torch.no_grad():
        flops = count_flops(lambda: block(torch.zeros(1, 8, side, side)))
    a_place = expansion * 8 * (2 * 8 + (18 + 2 * out) / stride**2)
    assert flops == side**2 * a_place


def test_a_batch_of_none_gives_none() -> None:
    assert build(out_channels=4, stride=2).eval()(draw((5, 4))[:0]).shape == (0, 4, 3, 2)


def test_bad_arguments_are_named() -> None:
    for name in ("in_channels", "out_channels", "expansion", "stride"):
        options = {"in_channels": 8, "out_channels": 8, name: 0}
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            InvertedResidual(**options)
    with pytest.raises(
        ArgumentError, match=r"stride must be 1, or 2 to halve the map; got 3\. Halve it twice with two blocks"
    ):
        InvertedResidual(8, 8, stride=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"stride must be a positive whole number; got 2\.0"):
        InvertedResidual(8, 8, stride=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(1, 3, 4, 4), "torch.float32 [1, 3, 4, 4]"),
        (torch.zeros(8, 4, 4), "torch.float32 [8, 4, 4]"),
        (torch.zeros(1, 8, 0, 4), "torch.float32 [1, 8, 0, 4]"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.uint8), "torch.uint8 [1, 8, 4, 4]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(x: Tensor, got: str) -> None:
    with pytest.raises(ArgumentError) as error:
        InvertedResidual(8, 8)(x)
    assert str(error.value) == (
        f"x must be floating point [B, 8, H, W]; got {got}. Divide whole numbers by 255, give a single one as x[None], "
        "or build the module for as many channels as x has."
    )


def test_training_on_one_place_is_refused() -> None:
    block = InvertedResidual(8, 8, stride=2)
    with pytest.raises(ArgumentError, match="two places or more to train batch norm; got 1. Use larger batches or"):
        block(torch.zeros(1, 8, 2, 2))
    assert block(torch.zeros(2, 8, 2, 2)).shape == block.eval()(torch.zeros(2, 8, 1, 1)).shape
