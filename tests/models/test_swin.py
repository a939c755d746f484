"""SwinTransformer and its block: as transformers' with the same weights, for images; their cost; clips; bad input."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.grid import GridBlock
from transformer_problems.models.swin import SwinTransformer
from transformer_problems.solutions.attention.shifted_windows import ShiftedWindowAttention
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

WIDTH, HEADS, WINDOW, CLASSES = 8, (2, 4), 4, 5


def build(depths: tuple[int, ...] = (2, 2), *, clips: bool = False) -> SwinTransformer:
    torch.manual_seed(0)
    if clips:
        patches = TubeletEmbedding(WIDTH, 2, 2, in_channels=2, pad=True)
    else:
        patches = PatchEmbedding(WIDTH, 2, in_channels=2, pad=True)
    window_size = (2, WINDOW, WINDOW) if clips else (WINDOW, WINDOW)
    model = SwinTransformer(patches, window_size, depths, HEADS[: len(depths)], CLASSES).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    return model


def draw(*sizes: int) -> Tensor:
    return torch.randn(2, 2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def peer_of(depths: tuple[int, ...] = (2, 2)) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=2,
        num_channels=2,
        embed_dim=WIDTH,
        depths=list(depths),
        num_heads=list(HEADS),
        window_size=WINDOW,
        num_labels=CLASSES,
    )
    return SwinForImageClassification(config).double().eval()


def shared_by_blocks(block: GridBlock, layer: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Modules of ours and theirs with the same parameters, but for queries, keys, values and the table."""
    yield block.mixer_residual.norm, layer.layernorm_before
    yield block.feed_forward_residual.norm, layer.layernorm_after
    yield block.feed_forward.up, layer.mlp.fc1
    yield block.feed_forward.down, layer.mlp.fc2
    yield block.mixer.out_proj, layer.attention.o_proj


def layers_of(model: SwinTransformer, peer: nn.Module) -> Iterator[tuple[GridBlock, nn.Module]]:
    for stage, layers in zip(model.stages, peer.swin.encoder.layers, strict=True):
        yield from zip(stage.blocks, layers.blocks, strict=True)


def shared(model: SwinTransformer, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    yield model.stages[0].entrance.patches.projection, peer.swin.embeddings.patch_embeddings.projection
    yield model.stages[0].entrance.norm, peer.swin.embeddings.norm
    for stage, layers in zip(model.stages[1:], peer.swin.encoder.layers[:-1], strict=True):
        yield stage.entrance.norm, layers.downsample.norm
        yield stage.entrance.projection, layers.downsample.reduction
    yield model.norm, peer.swin.layernorm
    yield model.head, peer.classifier
    for block, layer in layers_of(model, peer):
        yield from shared_by_blocks(block, layer)


def of_projections(layer: nn.Module, name: str) -> list[nn.Parameter]:
    return [getattr(getattr(layer.attention, projection), name) for projection in ("q_proj", "k_proj", "v_proj")]


@torch.no_grad()
def give_attention_weights(block: GridBlock, layer: nn.Module) -> None:
    layer.attention.relative_position_bias.relative_position_bias_table.copy_(block.mixer.bias_table)
    for name in ("weight", "bias"):
        parts = getattr(block.mixer.qkv_proj, name).chunk(3)
        for part, other in zip(parts, of_projections(layer, name), strict=True):
            other.copy_(part)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # float64 sums of up to 2 * 256 terms through four layers, in another order
        torch.testing.assert_close(own.grad, other.grad, atol=1e-10, rtol=1e-10)


def assert_same_attention_gradients(block: GridBlock, layer: nn.Module) -> None:
    table = layer.attention.relative_position_bias.relative_position_bias_table
    torch.testing.assert_close(block.mixer.bias_table.grad, table.grad, atol=1e-10, rtol=1e-10)
    for name in ("weight", "bias"):
        theirs = torch.cat([parameter.grad for parameter in of_projections(layer, name)])
        torch.testing.assert_close(getattr(block.mixer.qkv_proj, name).grad, theirs, atol=1e-10, rtol=1e-10)


@pytest.fixture
def peer_masks_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers' layer do the one thing in which it differs: hide padding from tokens."""
    from transformers.models.swin.modeling_swin import SwinLayer, window_partition

    plain_pad, plain_mask = SwinLayer.maybe_pad, SwinLayer.get_attn_mask

    def maybe_pad(self: Any, x: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
        self.real = (height, width)
        return plain_pad(self, x, height, width)

    def get_attn_mask(self: Any, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        blank = torch.ones(1, height, width, 1, dtype=dtype)
        blank[:, : self.real[0], : self.real[1]] = 0
        blank = window_partition(self.cyclic_shift(blank), self.window_size).flatten(1)
        hidden = torch.where(blank[:, None] > blank[:, :, None], float("-inf"), 0.0)
        plain = plain_mask(self, height, width, dtype, device)
        return hidden if plain is None else plain + hidden

    monkeypatch.setattr(SwinLayer, "maybe_pad", maybe_pad)
    monkeypatch.setattr(SwinLayer, "get_attn_mask", get_attn_mask)


def compare_blocks(grid: tuple[int, int], *, shifted: bool) -> None:
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    torch.manual_seed(0)
    block = GridBlock(12, ShiftedWindowAttention(12, 3, (WINDOW, WINDOW), shifted=shifted)).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = SwinConfig(window_size=WINDOW, attn_implementation="sdpa")
    layer = SwinLayer(config, 12, grid, 3, shift_size=WINDOW // 2 if shifted else 0).double().eval()
    for ours, theirs in shared_by_blocks(block, layer):
        theirs.load_state_dict(ours.state_dict())
    give_attention_weights(block, layer)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = block(own), layer(other.flatten(1, 2), grid)[0].view(x.shape)
    # float64 sums of at most 48 terms of order one, in another order
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(x)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(own.grad, other.grad, atol=1e-11, rtol=0)
    for ours, theirs in shared_by_blocks(block, layer):
        assert_same_gradients(ours, theirs)
    assert_same_attention_gradients(block, layer)


@pytest.mark.peer
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (4, 4)])
def test_block_is_transformers_layer(grid: tuple[int, int], shifted: bool) -> None:
    compare_blocks(grid, shifted=shifted)


@pytest.mark.peer
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(7, 8), (9, 5), (6, 11)])
@pytest.mark.usefixtures("peer_masks_padding")
def test_block_is_transformers_layer_that_masks_padding(grid: tuple[int, int], shifted: bool) -> None:
    compare_blocks(grid, shifted=shifted)


def compare_models(sizes: tuple[int, int]) -> None:
    model, peer, images = build(), peer_of(), draw(*sizes)
    for ours, theirs in shared(model, peer):
        theirs.load_state_dict(ours.state_dict())
    for block, layer in layers_of(model, peer):
        give_attention_weights(block, layer)
    logits, features, expected = model(images), model.features(images), peer.swin(images)
    # float64 sums of up to 64 terms through four layers, in another order
    torch.testing.assert_close(features.flatten(1, 2), expected.last_hidden_state, atol=1e-11, rtol=0)
    theirs = peer(images).logits
    torch.testing.assert_close(logits, theirs, atol=1e-11, rtol=0)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (theirs * weight).sum().backward()
    for own, other in shared(model, peer):
        assert_same_gradients(own, other)
    for block, layer in layers_of(model, peer):
        assert_same_attention_gradients(block, layer)


@pytest.mark.peer
@pytest.mark.parametrize("sizes", [(32, 32), (16, 16), (31, 48)])
def test_model_is_transformers_model(sizes: tuple[int, int]) -> None:
    compare_models(sizes)


@pytest.mark.peer
@pytest.mark.parametrize("sizes", [(26, 34), (19, 45), (17, 17)])
@pytest.mark.usefixtures("peer_masks_padding")
def test_model_is_transformers_model_that_masks_padding(sizes: tuple[int, int]) -> None:
    compare_models(sizes)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_cost_is_linear_in_pixels(clips: bool, backward: bool) -> None:
    model = build(clips=clips).float()

    def flops(side: int) -> int:
        images = torch.zeros(1, 2, *(4, side, side) if clips else (side, side))
        if backward:
            return count_flops(lambda: model.features(images).sum().backward())
        with torch.no_grad():
            return count_flops(lambda: model.features(images))

    counts = [flops(side) for side in (16, 32, 64, 128)]  # windows of 8 and 16 pixels fill all of these
    assert [after / before for before, after in pairwise(counts)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("clips", "sizes"), [(False, (12, 10)), (False, (3, 5)), (True, (6, 10, 12)), (True, (5, 9, 22))]
)
def test_features_and_logits(clips: bool, sizes: tuple[int, ...]) -> None:
    model, images = build(clips=clips), draw(*sizes)
    steps = [-(-size // 2) for size in sizes[:-2]]  # frames do not merge
    x = model.features(images)
    assert x.shape == (2, *steps, -(-sizes[-2] // 4), -(-sizes[-1] // 4), 2 * WIDTH)
    assert model.embed_dim == 2 * WIDTH
    expected = model.head(x.flatten(1, -2).mean(dim=1))
    torch.testing.assert_close(model(images), expected, atol=0, rtol=0)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-12, rtol=0)  # float64 sums in another order


def test_gradients() -> None:
    model = build()
    assert torch.autograd.gradcheck(model, (draw(6, 5)[:1].clone().requires_grad_(),))
    model.zero_grad()
    model(draw(22, 22)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not idle


def test_shifts_and_stages_widen_the_view() -> None:
    """The first token of the second window sees its window, with a shift both beside it, and twice as far merged."""

    def rows_seen(depths: tuple[int, ...]) -> tuple[int, int]:
        images = draw(64, 64)[:1].requires_grad_()
        features = build(depths).features(images)
        (grad,) = torch.autograd.grad(features[0, 4, 4].sum(), images)
        rows = grad.abs().sum(dim=(0, 1, 3)).nonzero()
        return int(rows.min()), int(rows.max()) + 1

    # windows of 4 tokens of 2 pixels each
    assert rows_seen((1,)) == (8, 16)
    assert rows_seen((2,)) == (0, 16)
    assert rows_seen((3,)) == (0, 24)
    assert rows_seen((1, 1)) == (16, 32)


def test_layers_are_found_by_what_works_on_layers() -> None:
    model, images = build(), draw(22, 18)
    weight = model.stages[0].blocks[0].mixer.qkv_proj.weight
    expected = torch.autograd.grad(model(images).sum(), weight)
    with checkpoint_layers(model):
        found = torch.autograd.grad(model(images).sum(), weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    patches = PatchEmbedding(WIDTH, 2)
    with pytest.raises(CombinationError, match="PatchEmbedding is a class, not an instance"):
        SwinTransformer(PatchEmbedding, (4, 4), (2,), (2,), CLASSES)  # type: ignore[arg-type]
    for depths, heads in (((2, 2), (2,)), ((), ())):
        with pytest.raises(ArgumentError, match="depths and num_heads must have an entry for each stage; got"):
            SwinTransformer(patches, (4, 4), depths, heads, CLASSES)
    with pytest.raises(ArgumentError, match="depths must be a tuple of whole numbers; got 2"):
        SwinTransformer(patches, (4, 4), 2, (2,), CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="depths must be positive; got 0"):
        SwinTransformer(patches, (4, 4), (2, 0), (2, 4), CLASSES)
    with pytest.raises(ArgumentError, match="num_classes must be positive; got 0"):
        SwinTransformer(patches, (4, 4), (2,), (2,), 0)
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 16 and 3"):
        SwinTransformer(patches, (4, 4), (2, 2), (2, 3), CLASSES)
    with pytest.raises(CombinationError, match="patches must make tokens on a grid of 3 axes; PatchEmbedding does not"):
        SwinTransformer(patches, (2, 4, 4), (2,), (2,), CLASSES)
    with pytest.raises(ArgumentError, match=r"patches must be what makes tokens .* got 8. Pass e.g. PatchEmbedding"):
        SwinTransformer(8, (4, 4), (2,), (2,), CLASSES)  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="ShiftedWindowAttention is a class, not an instance"):
        GridBlock(8, ShiftedWindowAttention)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="shifted must be True or False; got 'no'"):
        ShiftedWindowAttention(8, 2, (4, 4), shifted="no")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"images must be floating point \[B, 3, H, W\]"):
        SwinTransformer(patches, (4, 4), (2,), (2,), CLASSES)(torch.zeros(1, 1, 16, 16))
