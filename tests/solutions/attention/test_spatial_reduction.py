"""SpatialReductionAttention against the formula, square by square, and as transformers' with the same weights."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention.spatial_reduction import SpatialReductionAttention

WIDTH, HEADS = 12, 3
CASES = [((8, 6), 2), ((6, 9), 3), ((7, 5), 2), ((2, 3), 4), ((1, 1), 1), ((7, 9), 1), ((9, 11), 8), ((1, 13), 2)]


def build(reduction: int) -> SpatialReductionAttention:
    torch.manual_seed(0)
    module = SpatialReductionAttention(WIDTH, HEADS, reduction, dtype=torch.float64)
    for parameter in () if module.norm is None else module.norm.parameters():
        nn.init.normal_(parameter)
    return module


def draw(grid: tuple[int, int], *, batch: int = 2) -> Tensor:
    return torch.randn(batch, *grid, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def coarser(module: SpatialReductionAttention, x: Tensor) -> Tensor:
    """Square by square, pixel by pixel, [B, M, C]."""
    if module.reduction == 1:
        return x.flatten(1, 2)
    step, tokens = module.reduction, []
    for top in range(0, x.shape[1], step):
        for left in range(0, x.shape[2], step):
            token = module.reduce.bias.expand(len(x), -1)
            for i in range(top, min(top + step, x.shape[1])):
                for j in range(left, min(left + step, x.shape[2])):
                    token = token + x[:, i, j] @ module.reduce.weight[:, :, i - top, j - left].T
            tokens.append(module.norm(token))
    return torch.stack(tokens, dim=1)


def naive(module: SpatialReductionAttention, x: Tensor) -> Tensor:
    q = module.q_proj(x.flatten(1, 2)).unflatten(-1, (HEADS, -1))
    k, v = (part.unflatten(-1, (HEADS, -1)) for part in module.kv_proj(coarser(module, x)).chunk(2, dim=-1))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return module.out_proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)).view(x.shape)


@pytest.mark.parametrize(("grid", "reduction"), CASES)
def test_equals_the_formula(grid: tuple[int, int], reduction: int) -> None:
    module, x = build(reduction), draw(grid).requires_grad_()
    ours, theirs = module(x), naive(module, x)
    # float64 sums of at most 8 * 8 * 12 terms of order a tenth
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    inputs, weight = (x, *module.parameters()), torch.randn_like(ours)
    found, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize(("grid", "reduction"), [case for case in CASES if not any(n % case[1] for n in case[0])])
def test_it_is_transformers_attention_with_the_same_weights(grid: tuple[int, int], reduction: int) -> None:
    from transformers import PvtConfig
    from transformers.models.pvt.modeling_pvt import PvtAttention

    module, x = build(reduction), draw(grid).requires_grad_()
    peer = PvtAttention(PvtConfig(layer_norm_eps=1e-5), WIDTH, HEADS, reduction).double().eval()
    pairs = [(module.q_proj, peer.self.query), (module.out_proj, peer.output.dense)]
    if reduction > 1:
        pairs += [(module.reduce, peer.self.sequence_reduction), (module.norm, peer.self.layer_norm)]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    for own, (key, value) in zip(module.kv_proj.parameters(), zip(*kv_of(peer), strict=True), strict=True):
        key.data.copy_(own[:WIDTH])
        value.data.copy_(own[WIDTH:])
    y, (expected,) = module(x), peer(x.flatten(1, 2), *grid)
    # the same float64 sums, in another order
    torch.testing.assert_close(y.flatten(1, 2), expected, atol=1e-13, rtol=0)
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((y.flatten(1, 2) * weight).sum(), x, retain_graph=True)
    (peer_grad,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, peer_grad, atol=1e-12, rtol=0)
    (y.flatten(1, 2) * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in pairs:
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-11, rtol=0)
    for own, (key, value) in zip(module.kv_proj.parameters(), zip(*kv_of(peer), strict=True), strict=True):
        torch.testing.assert_close(own.grad, torch.cat([key.grad, value.grad]), atol=1e-11, rtol=0)


def kv_of(peer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return list(peer.self.key.parameters()), list(peer.self.value.parameters())


@pytest.mark.parametrize(("grid", "reduction"), [((3, 2), 2), ((2, 2), 1)])
def test_gradients(grid: tuple[int, int], reduction: int) -> None:
    assert torch.autograd.gradcheck(build(reduction), (draw(grid, batch=1).requires_grad_(),))


def test_images_do_not_see_each_other() -> None:
    module, x = build(2), draw((5, 7), batch=3)
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), alone, atol=1e-13, rtol=0)  # float64 sums in another order


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_scores_fall_by_the_square_of_the_reduction(reduction: int) -> None:
    num_tokens = 16 * 24
    num_keys, x = num_tokens // reduction**2, draw((16, 24), batch=1)
    linear = 2 * num_tokens * WIDTH**2 * 3 + 2 * num_keys * WIDTH**2 * 2  # queries, output, convolution; keys, values
    assert count_flops(lambda: build(reduction)(x)) == linear + 2 * 2 * num_tokens * num_keys * WIDTH


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="embed_dim must be a multiple of num_heads; got 12 and 5"):
        SpatialReductionAttention(12, 5, 2)
    with pytest.raises(ArgumentError, match="reduction must be positive; got 0"):
        SpatialReductionAttention(12, 3, 0)
    for shape in ((2, 8, 8, 13), (2, 64, 12), (2, 2, 8, 8, 12), (2, 8, 0, 12)):
        with pytest.raises(ArgumentError, match=r"x must be \[B, rows, columns, 12\]; got \[2, "):
            SpatialReductionAttention(12, 3, 2)(torch.zeros(shape))


def pooled(size: int) -> SpatialReductionAttention:
    torch.manual_seed(0)
    return SpatialReductionAttention(WIDTH, HEADS, pooled_size=size, dtype=torch.float64)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (3, 2), (16, 24)])
def test_a_pooled_size_is_an_average_that_is_mixed_and_normed(grid: tuple[int, int]) -> None:
    module, x = pooled(4), draw(grid).requires_grad_()
    rows, columns = (
        torch.stack([torch.arange(n).ge(n * i // 4) & torch.arange(n).lt(-(-n * (i + 1) // 4)) for i in range(4)])
        for n in grid
    )
    shares = [part.double() / part.sum(1, keepdim=True) for part in (rows, columns)]  # [4, n]: who is averaged
    mean = torch.einsum("im,jn,bmnc->bijc", *shares, x)
    tokens = nn.functional.gelu(module.norm(mean @ module.reduce.weight[:, :, 0, 0].T + module.reduce.bias)).flatten(
        1, 2
    )
    q = module.q_proj(x.flatten(1, 2)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in module.kv_proj(tokens).chunk(2, dim=-1))
    heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    expected = module.out_proj(heads.transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)  # float64 sums in another order


@pytest.mark.peer
@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
def test_pooled_it_is_transformers_linear_attention_with_the_same_weights(grid: tuple[int, int]) -> None:
    from transformers import PvtV2Config
    from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2SelfAttention

    module, x = pooled(7), draw(grid).requires_grad_()
    config = PvtV2Config(linear_attention=True, qkv_bias=True, layer_norm_eps=1e-5)
    peer = PvtV2SelfAttention(config, WIDTH, HEADS, 1).double().eval()
    pairs = [(module.q_proj, peer.query), (module.out_proj, peer.proj)]
    pairs += [(module.reduce, peer.spatial_reduction), (module.norm, peer.layer_norm)]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    for own, key, value in zip(
        module.kv_proj.parameters(), peer.key.parameters(), peer.value.parameters(), strict=True
    ):
        key.data.copy_(own[:WIDTH])
        value.data.copy_(own[WIDTH:])
    y, expected = module(x).flatten(1, 2), peer(x.flatten(1, 2), *grid)[0]
    torch.testing.assert_close(y, expected, atol=1e-13, rtol=0)  # the same float64 sums, in another order
    weight = torch.randn_like(y)
    found, theirs = (torch.autograd.grad((part * weight).sum(), x, retain_graph=True)[0] for part in (y, expected))
    torch.testing.assert_close(found, theirs, atol=1e-12, rtol=0)


def test_pooled_it_costs_as_tokens_but_for_the_pooled_ones() -> None:
    """16 times the tokens cost 16 times what queries, scores and outputs take; keys and values cost the same."""
    module = pooled(4)
    small, large = (count_flops(lambda side=side: module(draw((side, side), batch=1))) for side in (8, 32))
    keys = 2 * 16 * WIDTH**2 * 3  # mixed, then keys and values, of 4 x 4 tokens
    assert large - keys == 16 * (small - keys)


def test_a_reduction_beside_a_pooled_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match="reduction must be 1 with a pooled_size"):
        SpatialReductionAttention(WIDTH, HEADS, 2, pooled_size=4)
    for pooled_size in (0, -3):
        with pytest.raises(ArgumentError, match=f"pooled_size must be positive; got {pooled_size}"):
            SpatialReductionAttention(WIDTH, HEADS, 2, pooled_size=pooled_size)
