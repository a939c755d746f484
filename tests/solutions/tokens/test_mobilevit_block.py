"""MobileViTBlock as transformers' with the same weights, at any size; what it sees and costs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.block import TransformerBlock
from transformer_problems.models.mobilevit import SiLUFeedForward
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.mobilevit_block import MobileViTBlock

CHANNELS, WIDTH, HEADS = 4, 12, 3
SIZES = [(8, 6), (7, 5), (4, 9), (2, 2), (1, 3), (1, 1)]


def two_layers(embed_dim: int, *, device: object = None, dtype: torch.dtype | None = None) -> nn.Sequential:
    return nn.Sequential(
        *(
            TransformerBlock(
                embed_dim,
                SelfAttention(embed_dim, HEADS, is_causal=False, bias=True, dtype=dtype),
                feed_forward=SiLUFeedForward,
                dtype=dtype,
            )
            for _ in range(2)
        )
    )


def build(layers: Callable[..., nn.Module] = two_layers, *, patch_size: int = 2) -> MobileViTBlock:
    torch.manual_seed(0)
    block = MobileViTBlock(CHANNELS, WIDTH, layers, patch_size=patch_size, dtype=torch.float64)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    for norm in (part for part in block.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return block


def draw(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, CHANNELS, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pairs_of(block: MobileViTBlock, peer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters, all of them."""
    pairs = [(block.enter, peer.conv_1x1.convolution), (block.norm, peer.layernorm)]
    for ours, theirs in ((block.local, peer.conv_kxk), (block.out, peer.conv_projection), (block.fuse, peer.fusion)):
        pairs += [(ours[0], theirs.convolution), (ours[1], theirs.normalization)]
    for layer, other in zip(block.layers, peer.transformer.layer, strict=True):
        pairs += [
            (layer.mixer_residual.norm, other.layernorm_before),
            (layer.mixer.q_proj, other.attention.attention.query),
            (layer.mixer.k_proj, other.attention.attention.key),
            (layer.mixer.v_proj, other.attention.attention.value),
            (layer.mixer.out_proj, other.attention.output.dense),
            (layer.feed_forward_residual.norm, other.layernorm_after),
            (layer.feed_forward.up, other.intermediate.dense),
            (layer.feed_forward.down, other.output.dense),
        ]
    return pairs


@pytest.mark.peer
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_transformers_with_the_same_weights(size: tuple[int, int], patch_size: int, training: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import MobileViTConfig
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    block, x = build(patch_size=patch_size).train(training), draw(size).requires_grad_()
    config = MobileViTConfig(
        patch_size=patch_size, num_attention_heads=HEADS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    peer = MobileViTLayer(config, CHANNELS, CHANNELS, 1, WIDTH, 2).double().train(training)
    pairs = pairs_of(block, peer)
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    y, expected = block(x), peer(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)  # float64 sums of up to 72 terms through a dozen layers
    weight = torch.randn_like(y)
    found, other = ([x, *(p for pair in pairs for p in pair[side].parameters())] for side in (0, 1))
    assert len(found) == 1 + len(list(block.parameters())) == 1 + len(list(peer.parameters()))
    gradients = (torch.autograd.grad((out * weight).sum(), on) for out, on in ((y, found), (expected, other)))
    for own, theirs in zip(*gradients, strict=True):
        # sums over all places as well; a variance of two numbers may be small and its inverse large
        torch.testing.assert_close(own, theirs, atol=1e-9, rtol=1e-9)
    for own, theirs in zip(block.buffers(), peer.buffers(), strict=True):  # the norms' statistics
        torch.testing.assert_close(own, theirs, atol=1e-12, rtol=0)


class _Watched(nn.Module):
    """Layers that leave tokens as they are and remember them."""

    def __init__(self, embed_dim: int, *, device: object = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def test_layers_see_the_same_place_of_all_patches() -> None:
    block, x = build(_Watched).eval(), draw((4, 6))
    y = block(x)
    (tokens,) = block.layers.seen
    entered = block.enter(block.local(x))
    assert tokens.shape == (2 * 4, 2 * 3, WIDTH)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                own = entered[image, :, row::2, column::2].flatten(1).mT
                assert torch.equal(tokens[image * 4 + row * 2 + column], own)
    back = block.norm(entered.movedim(1, -1)).movedim(-1, 1)  # what each token gives goes back to where it was
    torch.testing.assert_close(y, block.fuse(torch.cat([x, block.out(back)], dim=1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("patch_size", "sees_all"), [(1, True), (2, True), (3, True), (4, False)])
def test_every_place_hears_of_every_other_unless_patches_are_larger_than_kernels(
    patch_size: int, sees_all: bool
) -> None:
    block, x = build(patch_size=patch_size).eval(), draw((12, 12))[:1].requires_grad_()
    y = block(x)
    found = []
    for row in range(12):
        for column in range(12):
            (grad,) = torch.autograd.grad(y[0, :, row, column].square().sum(), x, retain_graph=True)
            found.append(bool((grad.abs().sum(dim=1) > 0).all()))
    assert all(found) == sees_all


@pytest.mark.parametrize("patch_size", [2, 4])
def test_attention_costs_so_many_times_less(patch_size: int) -> None:
    def flops(size: int) -> int:
        block = build(patch_size=size).float().eval()
        with torch.no_grad():
            return count_flops(lambda: block(torch.zeros(1, CHANNELS, 16, 16)))

    whole = 2 * 4 * 16**4 * WIDTH  # two layers, two products of 2 N^2 C operations each
    assert flops(1) - flops(patch_size) == whole - whole // patch_size**2


def test_gradcheck() -> None:
    for size in ((4, 2), (3, 3)):
        assert torch.autograd.gradcheck(build().eval(), (draw(size)[:1].requires_grad_(),))


@pytest.mark.parametrize("size", SIZES)
def test_images_of_a_batch_do_not_meet(size: tuple[int, int]) -> None:
    block, x = build().eval(), draw(size)
    alone = torch.cat([block(image[None]) for image in x])
    torch.testing.assert_close(block(x), alone, atol=1e-12, rtol=0)  # float64 sums in another order
    assert block(x[:0]).shape == (0, *x.shape[1:])


def test_layers_are_made_for_the_width_the_device_and_the_dtype() -> None:
    block = MobileViTBlock(CHANNELS, WIDTH, nn.LayerNorm, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.float16)}
    assert block.layers.normalized_shape == (WIDTH,)


def test_bad_arguments_are_named() -> None:
    for name in ("channels", "embed_dim", "patch_size"):
        options = {"channels": 4, "embed_dim": 12, "layers": two_layers, name: 0}
        with pytest.raises(ArgumentError, match=f"{name} must be positive; got 0"):
            MobileViTBlock(**options)
    for layers, got in ((nn.Identity(), "Identity"), (None, "NoneType")):
        with pytest.raises(ArgumentError, match=f"layers must be a function that makes .* width 12; got {got}. Pass"):
            MobileViTBlock(4, 12, layers)  # type: ignore[arg-type]
    block = MobileViTBlock(4, 12, two_layers)
    for x in (torch.zeros(2, 3, 4, 4), torch.zeros(4, 4, 4), torch.zeros(2, 4, 4, 4).int(), torch.zeros(2, 4, 4, 0)):
        with pytest.raises(ArgumentError, match=r"x must be floating point \[B, 4, H, W\]; got torch"):
            block(x)
    with pytest.raises(ArgumentError, match="two places or more to train batch norm; got 1"):
        block(torch.zeros(1, 4, 1, 1))
    assert block.eval()(torch.zeros(1, 4, 1, 1)).shape == (1, 4, 1, 1)
