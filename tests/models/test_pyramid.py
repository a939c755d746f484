"""PyramidTransformer: as transformers' PVTv2 with the same weights, at any size, and what it really costs."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.pyramid import ConvolutionFeedForward, PyramidStage, PyramidTransformer
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

CLASSES = 5
STAGES = (
    PyramidStage(8, 2, num_heads=1, reduction=4, stride=4, expansion=3),
    PyramidStage(12, 1, num_heads=3, reduction=2),
    PyramidStage(16, 2, num_heads=2, expansion=2),
)


def build(stages: tuple[PyramidStage, ...] = STAGES) -> PyramidTransformer:
    torch.manual_seed(0)
    model = PyramidTransformer(stages, CLASSES, in_channels=2).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    return model


def draw(height: int, width: int) -> Tensor:
    return torch.randn(2, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def peer_of(stages: tuple[PyramidStage, ...]) -> nn.Module:
    from transformers import PvtV2Config, PvtV2ForImageClassification

    config = PvtV2Config(
        num_channels=2,
        num_encoder_blocks=len(stages),
        depths=[stage.depth for stage in stages],
        sr_ratios=[stage.reduction for stage in stages],
        hidden_sizes=[stage.embed_dim for stage in stages],
        patch_sizes=[2 * stage.stride - 1 for stage in stages],
        strides=[stage.stride for stage in stages],
        num_attention_heads=[stage.num_heads for stage in stages],
        mlp_ratios=[stage.expansion for stage in stages],
        layer_norm_eps=1e-5,
        num_labels=CLASSES,
    )
    return PvtV2ForImageClassification(config).double().eval()


def shared(model: PyramidTransformer, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters, but for keys and values."""
    yield model.head, peer.classifier
    for stage, norm, theirs in zip(model.stages, model.norms, peer.pvt_v2.encoder.layers, strict=True):
        yield norm, theirs.layer_norm
        yield stage.entrance.patches.projection, theirs.patch_embedding.proj
        yield stage.entrance.norm, theirs.patch_embedding.layer_norm
        for block, layer in zip(stage.blocks, theirs.blocks, strict=True):
            yield block.mixer_residual.norm, layer.layer_norm_1
            yield block.feed_forward_residual.norm, layer.layer_norm_2
            yield block.mixer.q_proj, layer.attention.query
            yield block.mixer.out_proj, layer.attention.proj
            yield block.feed_forward.up, layer.mlp.dense1
            yield block.feed_forward.depthwise, layer.mlp.dwconv.dwconv
            yield block.feed_forward.down, layer.mlp.dense2
            if block.mixer.reduction > 1:
                yield block.mixer.reduce, layer.attention.spatial_reduction
                yield block.mixer.norm, layer.attention.layer_norm


def keys_and_values(model: PyramidTransformer, peer: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
    for stage, theirs in zip(model.stages, peer.pvt_v2.encoder.layers, strict=True):
        for block, layer in zip(stage.blocks, theirs.blocks, strict=True):
            for name in ("weight", "bias"):
                parts = [getattr(part, name) for part in (layer.attention.key, layer.attention.value)]
                yield getattr(block.mixer.kv_proj, name), parts


WITHOUT_REDUCTION = tuple(PyramidStage(s.embed_dim, 1, s.num_heads, 1, s.stride) for s in STAGES)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("stages", "sizes"),
    [(STAGES, (64, 32)), (STAGES, (61, 96)), (WITHOUT_REDUCTION, (37, 50)), (WITHOUT_REDUCTION, (1, 5))],
)
def test_it_is_transformers_model_with_the_same_weights(
    stages: tuple[PyramidStage, ...], sizes: tuple[int, int]
) -> None:
    model, peer, images = build(stages), peer_of(stages), draw(*sizes)
    for ours, theirs in shared(model, peer):
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for own, others in keys_and_values(model, peer):
            for part, other in zip(own.chunk(2), others, strict=True):
                other.copy_(part)
    logits, expected = model(images), peer(images).logits
    features = peer.pvt_v2(images).last_hidden_state.movedim(1, -1)
    # float64 sums of up to 128 terms through five layers, in another order
    torch.testing.assert_close(model.features(images), features, atol=1e-11, rtol=0)
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in shared(model, peer):
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-10, rtol=1e-10)
    for own, others in keys_and_values(model, peer):
        torch.testing.assert_close(own.grad, torch.cat([p.grad for p in others]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backward", [False, True])
def test_cost_is_linear_in_pixels_but_for_products_of_scores(backward: bool) -> None:
    """Four resolutions lie on one parabola, whose quadratic part is what reductions leave of attention's."""
    model = build().float()

    def flops(side: int) -> int:
        images = torch.zeros(1, 2, side, side)
        if backward:
            return count_flops(lambda: model.features(images).sum().backward())
        with torch.no_grad():
            return count_flops(lambda: model.features(images))

    sides = (32, 64, 128, 256)  # all reductions fit
    counts = [flops(side) for side in sides]
    quadratic, apart = 0.0, 1
    for stage in STAGES:
        apart *= stage.stride
        tokens = 1 / apart**2  # a pixel
        quadratic += stage.depth * 4 * tokens * (tokens / stage.reduction**2) * stage.embed_dim
    if backward:
        quadratic *= 1 + 5 / 2  # the scores again and four gradients, after two products
    linear = [count - quadratic * side**4 for count, side in zip(counts, sides, strict=True)]
    assert [after / before for before, after in pairwise(linear)] == [4, 4, 4]
    ratios = [after / before for before, after in pairwise(counts)]
    assert 4 < ratios[0] < ratios[1] < ratios[2] < 16


@pytest.mark.parametrize("sizes", [(64, 64), (50, 37), (3, 100), (1, 1), (97, 61)])
def test_images_of_any_size(sizes: tuple[int, int]) -> None:
    model, images = build(), draw(*sizes)
    x = model.features(images)
    assert x.shape == (2, -(-sizes[0] // 16), -(-sizes[1] // 16), 16) and model.embed_dim == 16
    torch.testing.assert_close(model(images), model.head(x.flatten(1, 2).mean(dim=1)), atol=0, rtol=0)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-12, rtol=0)  # float64 sums in another order


def test_gradients() -> None:
    stages = (PyramidStage(4, 1, num_heads=2, reduction=2, stride=2), PyramidStage(6, 1, num_heads=1))
    model = build(stages)
    assert torch.autograd.gradcheck(model, (draw(6, 5)[:1].clone().requires_grad_(),))
    model.zero_grad()
    model(draw(22, 22)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not idle


def test_feed_forward_mixes_neighbours_only() -> None:
    module, x = ConvolutionFeedForward(4, dtype=torch.float64), torch.randn(1, 7, 6, 4, dtype=torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[0, 3, 2].sum(), x)
    reached = grad.abs().sum(dim=(0, -1)).nonzero()
    assert reached.amin(dim=0).tolist() == [2, 1] and reached.amax(dim=0).tolist() == [4, 3]


def test_feed_forward_tells_tokens_where_they_are() -> None:
    """All alike, tokens inside stay alike; corners and edges see the zeros around."""
    module = ConvolutionFeedForward(4, dtype=torch.float64)
    y = module(torch.ones(1, 5, 6, 4, dtype=torch.float64)).detach()[0]
    inside = y[1:-1, 1:-1]
    torch.testing.assert_close(inside, y[2, 2].expand_as(inside), atol=1e-15, rtol=0)  # the same sums
    places = torch.stack([y[0, 0], y[0, 2], y[0, -1], y[2, 0], y[2, 2], y[2, -1], y[-1, 0], y[-1, 2], y[-1, -1]])
    assert float(torch.pdist(places).min()) > 1e-3  # of numbers of order a tenth


def test_layers_are_found_by_what_works_on_layers() -> None:
    model, images = build(), draw(50, 37)
    weight = model.stages[0].blocks[0].mixer.q_proj.weight
    expected = torch.autograd.grad(model(images).sum(), weight)
    with checkpoint_layers(model):
        found = torch.autograd.grad(model(images).sum(), weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="stages must be a tuple of one PyramidStage or more; got none"):
        PyramidTransformer((), CLASSES)
    for stages in (STAGES[0], PyramidStage, (8, 12), None, iter(STAGES)):
        with pytest.raises(
            ArgumentError, match=r"stages must be a tuple of one PyramidStage or more; got .* Pass e\.g\."
        ):
            PyramidTransformer(stages, CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_classes must be positive; got 0"):
        PyramidTransformer(STAGES, 0)
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 8 and 3"):
        PyramidStage(8, 2, num_heads=3)
    for name in ("depth", "reduction", "stride", "expansion"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            PyramidStage(**{"embed_dim": 8, "depth": 2, "num_heads": 2, name: 0})
    for reduction, pooled_size in ((1, 0), (4, 0), (4, -3)):
        with pytest.raises(ArgumentError, match=f"pooled_size must be positive; got {pooled_size}"):
            PyramidStage(8, 2, 2, reduction, pooled_size=pooled_size)
    with pytest.raises(ArgumentError, match="reduction must be 1 with a pooled_size, .* got 4. Leave one of them out"):
        PyramidStage(8, 2, 2, 4, pooled_size=7)
    for name in ("embed_dim", "expansion"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            ConvolutionFeedForward(**{"embed_dim": 8, name: 0})
    with pytest.raises(ArgumentError, match=r"x must be \[B, rows, columns, 4\]; got \[1, 9, 4\]"):
        ConvolutionFeedForward(4)(torch.zeros(1, 9, 4))
    with pytest.raises(ArgumentError, match=r"images must be floating point \[B, 2, H, W\]"):
        build()(torch.zeros(1, 3, 16, 16))
