"""MobileViT: as transformers' with the same weights, at any size, and in ONNX."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.mobilevit import MobileViT, MobileViTStage
from transformer_problems.solutions.deployment.onnx_export import export_onnx
from transformer_problems.solutions.deployment.onnx_session import OnnxSession
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

CLASSES = 5
LIKE_THE_PEER = (  # which has five stages of these strides and depths
    MobileViTStage(8, stride=1),
    MobileViTStage(12, depth=3),
    MobileViTStage(16, embed_dim=12, num_layers=2, num_heads=2),
    MobileViTStage(16, embed_dim=16, num_layers=4, num_heads=2),
    MobileViTStage(24, embed_dim=20, num_layers=3, num_heads=2),
)
SMALL = (MobileViTStage(8, stride=1), MobileViTStage(10, embed_dim=12, num_layers=1, num_heads=3))


def build(stages: tuple[MobileViTStage, ...] = SMALL, **options: int) -> MobileViT:
    torch.manual_seed(0)
    options = {"in_channels": 2, "stem_channels": 8, "expansion": 2} | options
    model = MobileViT(stages, CLASSES, **options, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


def draw(height: int, width: int) -> Tensor:
    return torch.randn(2, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def peer_of(stages: tuple[MobileViTStage, ...], **options: object) -> nn.Module:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        neck_hidden_sizes=[8, *(stage.channels for stage in stages), 4 * stages[-1].channels],
        hidden_sizes=[stage.embed_dim for stage in stages if stage.embed_dim is not None],
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        **options,
    )
    return MobileViTForImageClassification(config)


def convolutions(*pairs: tuple[nn.Module, nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for ours, theirs in pairs:
        yield ours[0], theirs.convolution
        yield ours[1], theirs.normalization


def shared(model: MobileViT, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters, all of them."""
    yield model.head, peer.classifier
    yield from convolutions((model.stem, peer.mobilevit.conv_stem), (model.widen, peer.mobilevit.conv_1x1_exp))
    for stage, theirs in zip(model.stages, peer.mobilevit.encoder.layer, strict=True):
        residuals = theirs.layer if hasattr(theirs, "layer") else [theirs.downsampling_layer]
        for ours, other in zip(stage, residuals, strict=False):
            yield from convolutions(
                (ours.widen, other.expand_1x1), (ours.depthwise, other.conv_3x3), (ours.narrow, other.reduce_1x1)
            )
        if not hasattr(theirs, "transformer"):
            continue
        block = stage[-1]
        yield from convolutions(
            (block.local, theirs.conv_kxk), (block.out, theirs.conv_projection), (block.fuse, theirs.fusion)
        )
        yield block.enter, theirs.conv_1x1.convolution
        yield block.norm, theirs.layernorm
        for layer, other in zip(block.layers.blocks, theirs.transformer.layer, strict=True):
            yield layer.mixer_residual.norm, other.layernorm_before
            yield layer.mixer.q_proj, other.attention.attention.query
            yield layer.mixer.k_proj, other.attention.attention.key
            yield layer.mixer.v_proj, other.attention.attention.value
            yield layer.mixer.out_proj, other.attention.output.dense
            yield layer.feed_forward_residual.norm, other.layernorm_after
            yield layer.feed_forward.up, other.intermediate.dense
            yield layer.feed_forward.down, other.output.dense


@pytest.mark.peer
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (50, 37), (33, 96)])
def test_it_is_transformers_model_with_the_same_weights(sizes: tuple[int, int], training: bool) -> None:
    pytest.importorskip("transformers")
    model = build(LIKE_THE_PEER).train(training)
    peer = peer_of(LIKE_THE_PEER, num_channels=2, num_labels=CLASSES, num_attention_heads=2, expand_ratio=2.0)
    peer = peer.double().train(training)
    pairs = list(shared(model, peer))
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    found, expected = ([p for pair in pairs for p in pair[side].parameters()] for side in (0, 1))
    assert len(found) == len(list(model.parameters())) == len(list(peer.parameters()))
    images = draw(*sizes)
    logits, theirs = model(images), peer(images).logits
    # float64 sums of up to 216 terms through some fifty layers, in another order
    torch.testing.assert_close(logits, theirs, atol=1e-9, rtol=1e-9)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (theirs * weight).sum().backward()
    for own, other in zip(found, expected, strict=True):
        # the batch norms of a few places divide by small variances, and gradients before them are large
        torch.testing.assert_close(own.grad, other.grad, atol=1e-6 * float(other.grad.abs().max() + 1), rtol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("widths", "dims", "expansion", "millions"),
    [((32, 64, 96, 128, 160), (144, 192, 240), 4, 5.6), ((16, 24, 48, 64, 80), (64, 80, 96), 2, 1.3)],
)
def test_the_paper_models_have_the_size_they_say(
    widths: tuple[int, ...], dims: tuple[int, ...], expansion: int, millions: float
) -> None:
    """MobileViT-S and -XXS, table 4 of the paper; transformers rounds no width of these either."""
    pytest.importorskip("transformers")
    fine = (MobileViTStage(widths[0], stride=1), MobileViTStage(widths[1], depth=3))
    coarse = tuple(
        MobileViTStage(width, embed_dim=dim, num_layers=layers)
        for width, dim, layers in zip(widths[2:], dims, (2, 4, 3), strict=True)
    )
    with torch.device("meta"):
        model = MobileViT(fine + coarse, 1000, expansion=expansion)
        peer = peer_of(fine + coarse, num_labels=1000, expand_ratio=float(expansion))
        peer.mobilevit.conv_stem = model.stem  # 16 channels in ours; peer_of says 8
        first = model.stages[0][0]
        peer.mobilevit.encoder.layer[0].layer[0].expand_1x1 = first.widen
        peer.mobilevit.encoder.layer[0].layer[0].conv_3x3 = first.depthwise
        peer.mobilevit.encoder.layer[0].layer[0].reduce_1x1 = first.narrow
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in peer.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(("stem_stride", "sizes"), [(1, (32, 32)), (2, (32, 32)), (2, (15, 21)), (2, (1, 1))])
def test_images_of_any_size(stem_stride: int, sizes: tuple[int, int]) -> None:
    model, images = build(stem_stride=stem_stride).eval(), draw(*sizes)
    x = model.features(images)
    assert x.shape == (2, *(-(-size // (2 * stem_stride)) for size in sizes), 40) and model.embed_dim == 40
    torch.testing.assert_close(model(images), model.head(x.flatten(1, 2).mean(dim=1)), atol=0, rtol=0)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-12, rtol=0)  # float64 sums in another order
    assert model(images[:0]).shape == (0, CLASSES)


def test_cost_is_linear_in_pixels_but_for_products_of_attention() -> None:
    model = build().float().eval()

    def flops(side: int) -> int:
        with torch.no_grad():
            return count_flops(lambda: model(torch.zeros(1, 2, side, side)))

    sides = (16, 32, 64)
    products = [4 * (side // 4) ** 4 // 4 * 12 for side in sides]  # 2 N^2 C twice, over a quarter of the places
    head = 2 * 40 * CLASSES
    linear = [flops(side) - product - head for side, product in zip(sides, products, strict=True)]
    assert [after / before for before, after in pairwise(linear)] == [4, 4]


def test_gradients() -> None:
    model = build()
    assert torch.autograd.gradcheck(model.eval(), (draw(6, 5)[:1].clone().requires_grad_(),))
    model.train()(draw(20, 12)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # a key's bias adds one number to all scores of a query, which the softmax takes away
    assert all(bool((model.get_parameter(name).grad == 0).all()) for name in idle)
    assert {name for name in idle if not name.endswith("k_proj.bias")} == set()


def test_layers_are_found_by_what_works_on_layers() -> None:
    model, images = build(LIKE_THE_PEER).eval(), draw(32, 32)
    weight = model.stem[0].weight
    expected = torch.autograd.grad(model(images).sum(), weight)
    with checkpoint_layers(model):
        found = torch.autograd.grad(model(images).sum(), weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_it_runs_in_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, images = build().float().eval(), draw(32, 28).float()  # in maps of 8 x 7, which patches do not divide
    report = export_onnx(model, images, tmp_path / "model.onnx")
    more = torch.cat([images, images.flip(3)[:1]])  # another number of images
    with torch.no_grad():
        exact = model.double()(more.double())
    torch.testing.assert_close(OnnxSession(report.path)(more).double(), exact, atol=report.tolerance * 4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    for stages in ((), (8, 16)):
        with pytest.raises(ArgumentError, match=r"stages must be one MobileViTStage or more; got \(.*\)\. Pass e\.g\."):
            MobileViT(stages, CLASSES)  # type: ignore[arg-type]
    for name in ("num_classes", "in_channels", "stem_channels", "stem_stride", "head_channels", "expansion"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            MobileViT(SMALL, **{"num_classes": CLASSES, name: 0})
    with pytest.raises(ArgumentError, match="stem_stride must be 1, or 2 to halve the map; got 4"):
        MobileViT(SMALL, CLASSES, stem_stride=4)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="patch_size must be positive; got 0"):
        MobileViT(SMALL, CLASSES, patch_size=0)
    for name in ("channels", "depth", "num_layers"):
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            MobileViTStage(**{"channels": 8, name: 0})
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 10 and 4"):
        MobileViTStage(8, embed_dim=10)
    with pytest.raises(ArgumentError, match="stride must be 1, or 2 to halve the map; got 3"):
        MobileViTStage(8, stride=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8 [1, 3, 32, 32]"),
        (torch.zeros(1, 1, 32, 32), "torch.float32 [1, 1, 32, 32]"),
        (torch.zeros(3, 32, 32), "torch.float32 [3, 32, 32]"),
        (torch.zeros(1, 3, 32, 0), "torch.float32 [1, 3, 32, 0]"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor, got: str) -> None:
    with pytest.raises(ArgumentError) as error:
        MobileViT(SMALL, CLASSES)(images)
    assert str(error.value) == (
        f"images must be floating point [B, 3, H, W]; got {got}. Divide whole numbers by 255, give a single one as "
        "images[None], or build the module for as many channels as images has."
    )


def test_training_on_one_place_is_refused() -> None:
    model = build()
    for side in (1, 4):
        with pytest.raises(ArgumentError, match="two places or more to train batch norm; got 1"):
            model(draw(side, side)[:1])
