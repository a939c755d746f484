"""The video encoders: joint attention as transformers' ViViT, the factorised one as a loop over clips and steps."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.models.video import ClipPool, FactorisedVideoEncoder, JointVideoEncoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

WIDTH, HEADS, LAYERS, CLASSES = 16, 4, 2, 5
SIZE = (6, 12, 12)
GRID = (3, 3, 3)
Encoder = JointVideoEncoder | FactorisedVideoEncoder


def mixer() -> SelfAttention:
    return SelfAttention(WIDTH, HEADS, is_causal=False, bias=True)


def build(kind: type[Encoder], pool: ClipPool = "class") -> Encoder:
    torch.manual_seed(0)
    tubelets = TubeletEmbedding(WIDTH, 4, 2, in_channels=2)
    model: Encoder
    if kind is JointVideoEncoder:
        model = JointVideoEncoder(tubelets, SIZE, LAYERS, mixer, CLASSES, pool=pool)
    else:
        model = FactorisedVideoEncoder(tubelets, SIZE, LAYERS, 1, mixer, CLASSES, pool=pool)
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    return model


def draw(num_frames: int = 6, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, num_frames, height, width, dtype=torch.float64, generator=generator)


def shared(model: JointVideoEncoder, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters."""
    yield model.tokens.tubelets.projection, peer.vivit.embeddings.patch_embeddings.projection
    yield model.encoder.norm, peer.vivit.layernorm
    yield model.head, peer.classifier
    for block, layer in zip(model.encoder.blocks, peer.vivit.layers, strict=True):
        yield block.mixer_residual.norm, layer.layernorm_before
        yield block.feed_forward_residual.norm, layer.layernorm_after
        yield block.feed_forward.up, layer.mlp.fc1
        yield block.feed_forward.down, layer.mlp.fc2
        for name, other in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            yield getattr(block.mixer, name), getattr(layer.attention, other)


@torch.no_grad()
def peer_of(model: JointVideoEncoder) -> nn.Module:
    from transformers import VivitConfig, VivitForVideoClassification

    config = VivitConfig(
        num_frames=SIZE[0],
        image_size=SIZE[1],
        tubelet_size=[2, 4, 4],
        num_channels=2,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        num_labels=CLASSES,
    )
    peer = VivitForVideoClassification(config).double().eval()
    for ours, theirs in shared(model, peer):
        theirs.load_state_dict(ours.state_dict())
    embeddings = peer.vivit.embeddings
    places, times = model.tokens.positions.weight.flatten(0, 1), model.time.weight
    embeddings.position_embeddings[0, 1:] = (times + places).flatten(0, 1)
    embeddings.position_embeddings[0, 0].normal_()  # theirs has a position, which adds to the token
    embeddings.cls_token[0, 0] = model.encoder.class_token - embeddings.position_embeddings[0, 0]
    return peer


@pytest.mark.peer
def test_joint_attention_is_transformers_model_with_the_same_weights() -> None:
    model, clips = build(JointVideoEncoder), draw()
    peer = peer_of(model)
    ours, theirs = model(clips), peer(clips.transpose(1, 2)).logits  # frames first
    # float64 sums of up to 64 terms through two layers, in another order
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for own, other in shared(model, peer):
        for parameter, expected in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-10, rtol=1e-10)
    expected = peer.vivit.embeddings.position_embeddings.grad[0]
    torch.testing.assert_close(model.encoder.class_token.grad, expected[0], atol=1e-10, rtol=1e-10)
    by_place = expected[1:].unflatten(0, GRID)  # the gradient of a sum goes to each of its terms
    torch.testing.assert_close(model.tokens.positions.weight.grad, by_place.sum(dim=0), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model.time.weight.grad[:, 0], by_place.sum(dim=(1, 2)), atol=1e-10, rtol=1e-10)


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attended(attention: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (affine(part, x) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    size, heads = WIDTH // HEADS, []
    for own in (slice(h * size, (h + 1) * size) for h in range(HEADS)):
        weights = (q[:, own] @ k[:, own].T / math.sqrt(size)).exp()
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, own])
    return affine(attention.out_proj, torch.cat(heads, dim=1))


def summed_up(encoder: nn.Module, x: Tensor) -> Tensor:
    """One sequence [N, C] -> [C]."""
    if encoder.class_token is not None:
        x = torch.cat([encoder.class_token[None], x])
    for block in encoder.blocks:
        x = x + attended(block.mixer, normalized(block.mixer_residual.norm, x))
        inner = affine(block.feed_forward.up, normalized(block.feed_forward_residual.norm, x))
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + affine(block.feed_forward.down, inner)
    x = normalized(encoder.norm, x)
    return x.mean(dim=0) if encoder.class_token is None else x[0]


def stretched(table: nn.Module, *grid: int) -> Tensor:
    """The table of positions for a grid, [places, C]; how it is stretched is tested where it is at home."""
    return table(torch.zeros(1, math.prod(grid), WIDTH, dtype=torch.float64), grid)[0]


def naive_factorised(model: FactorisedVideoEncoder, clips: Tensor) -> Tensor:
    steps, rows, columns = model.tokens.tubelets.grid(*clips.shape[2:])
    places, times = stretched(model.tokens.positions, rows, columns), stretched(model.time, steps, 1)
    logits = []
    for clip in clips:
        seen = []
        for step in range(steps):
            tokens = model.tokens.tubelets(clip[None, :, 2 * step : 2 * step + 2])[0]
            seen.append(summed_up(model.spatial, tokens + places) + times[step])
        logits.append(affine(model.head, summed_up(model.temporal, torch.stack(seen))))
    return torch.stack(logits)


def naive_joint(model: JointVideoEncoder, clips: Tensor) -> Tensor:
    steps, rows, columns = model.tokens.tubelets.grid(*clips.shape[2:])
    places, times = stretched(model.tokens.positions, rows, columns), stretched(model.time, steps, 1)
    positions = torch.cat([time + places for time in times])
    tokens = model.tokens.tubelets(clips)
    return torch.stack([affine(model.head, summed_up(model.encoder, x + positions)) for x in tokens])


KINDS = {"joint": (JointVideoEncoder, naive_joint), "factorised": (FactorisedVideoEncoder, naive_factorised)}


@pytest.mark.parametrize("size", [SIZE, (10, 12, 12), (2, 4, 4), (6, 8, 20)])
@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_formula_for_clips_of_any_size(kind: str, pool: ClipPool, size: tuple[int, int, int]) -> None:
    make, naive = KINDS[kind]
    model, clips = build(make, pool), draw(*size).requires_grad_()
    expected, found = naive(model, clips), model(clips)
    # float64 sums of up to 64 terms through three layers, in another order
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    weight = torch.randn_like(expected)
    inputs = [clips, *model.parameters()]
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("kind", [JointVideoEncoder, FactorisedVideoEncoder])
def test_gradients(kind: type[Encoder], pool: ClipPool) -> None:
    model = build(kind, pool)
    assert torch.autograd.gradcheck(model, (draw(4, 4, 8)[:1].requires_grad_(),))
    model.zero_grad()
    model(draw(4, 4, 8)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not [name for name in idle if not name.endswith("k_proj.bias")]  # which softmax cancels


@pytest.mark.parametrize("kind", [JointVideoEncoder, FactorisedVideoEncoder])
def test_only_positions_tell_the_order_of_steps_and_places(kind: type[Encoder]) -> None:
    model, clips = build(kind), draw()
    later = clips.roll(2, dims=2)  # by a whole tubelet
    aside = clips.roll(4, dims=4)
    for moved in (later, aside):
        assert not torch.allclose(model(moved), model(clips))
    nn.init.zeros_(model.time.weight)
    nn.init.zeros_(model.tokens.positions.weight)
    for moved in (later, aside):
        torch.testing.assert_close(model(moved), model(clips), atol=1e-12, rtol=0)  # float64 sums in another order


@pytest.mark.parametrize("kind", [JointVideoEncoder, FactorisedVideoEncoder])
def test_clips_do_not_see_each_other(kind: type[Encoder]) -> None:
    model, clips = build(kind), draw()
    alone = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(model(clips), alone, atol=1e-12, rtol=0)  # float64 sums in another order
    assert model(clips[:0]).shape == (0, CLASSES)


def layers_flops(num_tokens: int, num_layers: int) -> int:
    """Four projections and a feed-forward network of two layers of width 4 C; scores and their weighted sums."""
    return num_layers * (2 * num_tokens * 12 * WIDTH**2 + 4 * num_tokens**2 * WIDTH)


@pytest.mark.parametrize(("pool", "extra"), [("class", 1), ("mean", 0)])
@pytest.mark.parametrize("size", [SIZE, (16, 20, 28)])
def test_flops_are_the_formula(size: tuple[int, int, int], pool: ClipPool, extra: int) -> None:
    steps, places = size[0] // 2, (size[1] // 4) * (size[2] // 4)
    ends = 2 * steps * places * 64 * WIDTH + 2 * WIDTH * CLASSES  # a tubelet has 2 * 2 * 4 * 4 numbers
    joint = ends + layers_flops(steps * places + extra, LAYERS)
    factorised = ends + steps * layers_flops(places + extra, LAYERS) + layers_flops(steps + extra, 1)
    clips = draw(*size)[:1]
    with torch.no_grad():
        for kind, expected in ((JointVideoEncoder, joint), (FactorisedVideoEncoder, factorised)):
            model = build(kind, pool)
            model(clips)  # what is made once for a length is made
            assert count_flops(lambda model=model: model(clips)) == expected


@pytest.mark.parametrize("kind", [JointVideoEncoder, FactorisedVideoEncoder])
def test_layers_are_found_by_what_works_on_layers(kind: type[Encoder]) -> None:
    model, clips = build(kind), draw()
    expected = torch.autograd.grad(model(clips).sum(), model.tokens.positions.weight)
    with checkpoint_layers(model):
        found = torch.autograd.grad(model(clips).sum(), model.tokens.positions.weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_that_tubelets_do_not_fill_are_padded_where_the_embedding_pads(kind: str) -> None:
    model, clips = build(KINDS[kind][0]), draw(5, 11, 10)
    filled = nn.functional.pad(clips, (0, 2, 0, 1, 0, 1))
    with pytest.raises(ArgumentError, match="number of frames must be a multiple of 2, .* got 5. Choose 4 or 6"):
        model(clips)
    model.tokens.tubelets.pad = True
    torch.testing.assert_close(model(clips), model(filled), atol=0, rtol=0)


def test_half_precision() -> None:
    clips = draw().to(torch.bfloat16)
    for kind in (JointVideoEncoder, FactorisedVideoEncoder):
        assert build(kind).to(torch.bfloat16)(clips).dtype == torch.bfloat16


def makers() -> list[Callable[..., Encoder]]:
    """Both encoders, called alike."""

    def factorised(tubelets: TubeletEmbedding, size: tuple[int, int, int], *rest: object, **options: object) -> Encoder:
        return FactorisedVideoEncoder(tubelets, size, 1, *rest, **options)  # type: ignore[arg-type]

    return [JointVideoEncoder, factorised]


@pytest.mark.parametrize("make", makers())
def test_what_does_not_fit_is_refused(make: Callable[..., Encoder]) -> None:
    tubelets = TubeletEmbedding(WIDTH, 4, 2, in_channels=2)
    with pytest.raises(CombinationError, match="TubeletEmbedding is a class, not an instance"):
        make(TubeletEmbedding, SIZE, 1, mixer, CLASSES)
    with pytest.raises(CombinationError, match=r"tubelets must make .* 3 axes; PatchEmbedding does not. .*TubeletEmb"):
        make(PatchEmbedding(WIDTH, 4), SIZE, 1, mixer, CLASSES)
    with pytest.raises(ArgumentError, match="tubelets must be what makes tokens .* got None"):
        make(None, SIZE, 1, mixer, CLASSES)
    with pytest.raises(ArgumentError, match=r"clip_size must be \(frames, height, width\) .* got \(12, 12\)"):
        make(tubelets, (12, 12), 1, mixer, CLASSES)
    with pytest.raises(
        ArgumentError, match=r"clip_size must be \(frames, height, width\) in positive whole numbers; got 12"
    ):
        make(tubelets, 12, 1, mixer, CLASSES)
    with pytest.raises(ArgumentError, match="number of frames must be a multiple of 2, .* got 5. Choose 4 or 6"):
        make(tubelets, (5, 12, 12), 1, mixer, CLASSES)
    with pytest.raises(CombinationError, match="is built for embed_dim=16, but its place here has embed_dim=32"):
        make(TubeletEmbedding(32, 4, 2), SIZE, 1, mixer, CLASSES)
    with pytest.raises(CombinationError, match="needs mixers with is_causal=False"):
        make(tubelets, SIZE, 1, lambda: SelfAttention(WIDTH, HEADS), CLASSES)
    with pytest.raises(UnknownNameError, match="unknown pool 'max'. Nearest: mean|unknown pool 'max'. Known"):
        make(tubelets, SIZE, 1, mixer, CLASSES, pool="max")
    with pytest.raises(UnknownNameError, match="unknown pool None. Known: class, mean"):
        make(tubelets, SIZE, 1, mixer, CLASSES, pool=None)
    with pytest.raises(ArgumentError, match=r"num_(temporal_)?layers must be positive; got 0"):
        make(tubelets, SIZE, 0, mixer, CLASSES)
    with pytest.raises(ArgumentError, match="num_classes must be positive; got 0"):
        make(tubelets, SIZE, 1, mixer, 0)
    model = make(tubelets, SIZE, 1, mixer, CLASSES)
    for clips in (torch.zeros(1, 1, *SIZE), torch.zeros(2, *SIZE)):
        with pytest.raises(ArgumentError, match=r"clips must be floating point \[B, 2, T, H, W\]"):
            model(clips)
    with pytest.raises(ArgumentError, match="width must be a multiple of 4, .* got 10. Choose 8 or 12"):
        model(torch.zeros(1, 2, 6, 12, 10))
