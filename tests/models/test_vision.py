"""VisionTransformer: as transformers' ViT and DeiT with the same weights, and what each option does."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.models.vision import Pool, VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

WIDTH, HEADS, LAYERS, CLASSES = 16, 4, 2, 5


def build(pool: Pool = "class", *, num_class_tokens: int = 1, alibi: bool = False) -> VisionTransformer:
    torch.manual_seed(0)

    def mixer() -> SelfAttention:
        position = ALiBi(HEADS) if alibi else None
        return SelfAttention(WIDTH, HEADS, position=position, is_causal=False, bias=True)

    patches = PatchEmbedding(WIDTH, 4, in_channels=2)
    model = VisionTransformer(
        patches, (12, 12), LAYERS, mixer, CLASSES, pool=pool, num_class_tokens=num_class_tokens
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    return model


def draw(height: int = 12, width: int = 12) -> Tensor:
    return torch.randn(2, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def peer_of(num_class_tokens: int) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    settings = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-5,
        "image_size": 12,
        "patch_size": 4,
        "num_channels": 2,
        "num_labels": CLASSES,
    }
    if num_class_tokens == 1:
        return ViTForImageClassification(ViTConfig(**settings)).double().eval()
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**settings)).double().eval()


def shared(model: VisionTransformer, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters."""
    deit = hasattr(peer, "deit")
    body = peer.deit if deit else peer.vit
    yield model.patches.projection, body.embeddings.patch_embeddings.projection
    yield model.norm, body.layernorm
    yield from zip(
        model.head, [peer.cls_classifier, peer.distillation_classifier] if deit else [peer.classifier], strict=True
    )
    for block, layer in zip(model.blocks, body.layers, strict=True):
        yield block.mixer_residual.norm, layer.layernorm_before
        yield block.feed_forward_residual.norm, layer.layernorm_after
        yield block.feed_forward.up, layer.mlp.fc1
        yield block.feed_forward.down, layer.mlp.fc2
        for name, other in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            yield getattr(block.mixer, name), getattr(layer.attention, other)


@torch.no_grad()
def give_weights(model: VisionTransformer, peer: nn.Module) -> None:
    for ours, theirs in shared(model, peer):
        theirs.load_state_dict(ours.state_dict())
    embeddings, num_tokens = (peer.deit if hasattr(peer, "deit") else peer.vit).embeddings, model.num_class_tokens
    embeddings.position_embeddings[0, num_tokens:] = model.positions.weight.flatten(0, 1)
    embeddings.position_embeddings[0, :num_tokens].normal_()  # theirs have a position, which adds to them
    own = model.class_tokens - embeddings.position_embeddings[0, :num_tokens]
    embeddings.cls_token[0] = own[:1]
    if num_tokens == 2:
        embeddings.distillation_token[0] = own[1:]


@pytest.mark.peer
@pytest.mark.parametrize("size", [(12, 12), (20, 20), (8, 24), (4, 4)])
@pytest.mark.parametrize("num_class_tokens", [1, 2])
def test_it_is_transformers_model_with_the_same_weights(num_class_tokens: int, size: tuple[int, int]) -> None:
    model, peer, images = build(num_class_tokens=num_class_tokens), peer_of(num_class_tokens), draw(*size)
    give_weights(model, peer)
    answer = peer(images, interpolate_pos_encoding=size != (12, 12))
    theirs = [answer.logits] if num_class_tokens == 1 else [answer.cls_logits, answer.distillation_logits]
    ours = model.logits_of_heads(images)
    # float64 sums of up to 64 terms through two layers, in another order
    torch.testing.assert_close(ours, torch.stack(theirs, dim=1), atol=1e-11, rtol=0)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (torch.stack(theirs, dim=1) * weight).sum().backward()
    for own, other in shared(model, peer):
        for parameter, expected in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-10, rtol=1e-10)
    embeddings = (peer.deit if num_class_tokens == 2 else peer.vit).embeddings
    expected = embeddings.position_embeddings.grad[0]
    torch.testing.assert_close(model.class_tokens.grad, expected[:num_class_tokens], atol=1e-10, rtol=1e-10)
    ours_positions = model.positions.weight.grad.flatten(0, 1)
    torch.testing.assert_close(ours_positions, expected[num_class_tokens:], atol=1e-10, rtol=1e-10)


def test_one_class_token_is_read_by_its_head() -> None:
    model, images = build(), draw()
    x = model.features(images)
    assert x.shape == (2, 1 + 9, WIDTH)
    torch.testing.assert_close(model(images), model.head[0](x[:, 0]), atol=1e-13, rtol=0)  # the same float64 sums


def test_pool_mean_reads_all_patches_alike() -> None:
    model, images = build("mean"), draw()
    x = model.features(images)
    assert x.shape == (2, 9, WIDTH) and model.class_tokens is None
    torch.testing.assert_close(model(images), model.head[0](x.mean(dim=1)), atol=1e-13, rtol=0)  # the same float64 sums


def test_pool_attention_reads_patches_by_their_scores() -> None:
    model, images = build("attention"), draw()
    x = model.features(images)
    assert x.shape == (2, 9, WIDTH) and model.class_tokens is None
    scores = (x @ model.score.weight[0]).exp()
    pooled = sum(scores[:, n, None] * x[:, n] for n in range(9)) / scores.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model(images), model.head[0](pooled), atol=1e-12, rtol=0)  # float64, weights up to one
    nn.init.zeros_(model.score.weight)  # then all count alike
    torch.testing.assert_close(model(images), model.head[0](x.mean(dim=1)), atol=1e-13, rtol=0)


@pytest.mark.parametrize("num_class_tokens", [2, 3])
def test_several_heads_answer_with_the_mean_of_their_probabilities(num_class_tokens: int) -> None:
    model, images = build(num_class_tokens=num_class_tokens), draw()
    expected = model.logits_of_heads(images).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(model(images).exp(), expected, atol=1e-13, rtol=0)  # float64 probabilities


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_gradients(pool: Pool) -> None:
    model = build(pool)
    assert torch.autograd.gradcheck(model, (draw()[:1, :, :8, :4].clone().requires_grad_(),))
    model.zero_grad()
    model(draw(8, 4)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not [name for name in idle if not name.endswith("k_proj.bias")]  # which softmax cancels


@pytest.mark.parametrize("size", [(12, 12), (20, 8)])
def test_images_do_not_see_each_other(size: tuple[int, int]) -> None:
    model, images = build(num_class_tokens=2), draw(*size)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-12, rtol=0)  # float64 sums in another order


def test_some_patches_keep_their_places() -> None:
    """With a position encoding inside attention: all patches but one are what a mask of that one leaves."""
    model = build(alibi=True)
    tokens = model.embed(draw())
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    some = model.encode(tokens[:, kept], places=kept)
    key_mask = torch.ones(2, 10, dtype=torch.bool)
    key_mask[:, 4] = False  # patch 3 after the class token
    x = torch.cat([model.class_tokens.expand(2, -1, -1), tokens], dim=1)
    masked = model.norm(model.blocks(x, key_mask=key_mask, positions=torch.arange(10)))
    torch.testing.assert_close(some, masked[:, key_mask[0]], atol=1e-12, rtol=0)  # float64 sums in another order
    by_row = model.encode(tokens[:, kept], places=kept.expand(2, -1))
    torch.testing.assert_close(some, by_row, atol=1e-12, rtol=0)
    assert not torch.allclose(some, model.encode(tokens[:, kept]))


def test_any_embedding_of_images_will_do() -> None:
    class Pixels(nn.Module):
        embed_dim = WIDTH

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(2).mT

        def grid(self, height: int, width: int) -> tuple[int, int]:
            return height, width

    model = VisionTransformer(Pixels(), (2, 3), 1, lambda: SelfAttention(WIDTH, HEADS, is_causal=False), CLASSES)
    assert model(torch.randn(2, WIDTH, 2, 3)).shape == (2, CLASSES)
    assert model(torch.randn(2, WIDTH, 5, 4)).shape == (2, CLASSES)


def test_layers_are_found_by_what_works_on_layers() -> None:
    model, images = build(num_class_tokens=2), draw()
    expected = torch.autograd.grad(model(images).sum(), model.positions.weight)
    with checkpoint_layers(model):
        found = torch.autograd.grad(model(images).sum(), model.positions.weight)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    def mixer() -> SelfAttention:
        return SelfAttention(WIDTH, HEADS, is_causal=False)

    patches = PatchEmbedding(WIDTH, 4)
    with pytest.raises(CombinationError, match="PatchEmbedding is a class, not an instance"):
        VisionTransformer(PatchEmbedding, (8, 8), 1, mixer, CLASSES)  # type: ignore[arg-type]
    for size in (8, (8,), (8, 8, 3), "8", None, (8.0, 8), (0, 8)):
        with pytest.raises(ArgumentError, match=r"image_size must be \(height, width\) in positive whole numbers; got"):
            VisionTransformer(patches, size, 1, mixer, CLASSES)  # type: ignore[arg-type]
    for part in (64, None, nn.Conv2d(3, 8, 4, 4)):
        with pytest.raises(ArgumentError, match="patches must be what makes tokens and says .*; got .*PatchEmbedding"):
            VisionTransformer(part, (8, 8), 1, mixer, CLASSES)  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="patches must make .* 2 axes; TubeletEmbedding does not. .*PatchEmb"):
        VisionTransformer(TubeletEmbedding(WIDTH, 4, 2), (8, 8), 1, mixer, CLASSES)  # type: ignore[arg-type]
    for factory, said in (
        (None, "mixer must be a function that makes a layer's mixer; got None"),
        (mixer(), r"got the SelfAttention itself, which all layers would share. Pass mixer=lambda: SelfAttention\("),
        (SelfAttention, r"must be callable without arguments; SelfAttention is not: missing .*lambda: SelfAttention\("),
        (lambda: None, "mixer must be a token mixer, which says is_causal; got None"),
        (lambda: nn.Linear(WIDTH, WIDTH), "mixer must be a token mixer, which says is_causal; got Linear"),
    ):
        with pytest.raises(ArgumentError, match=said):
            VisionTransformer(patches, (8, 8), 1, factory, CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="skips must say what a layer reads of earlier ones; got 3"):
        VisionTransformer(patches, (8, 8), 1, mixer, CLASSES, skips=3)  # type: ignore[arg-type]
    for pool in (None, 3, ["class"]):
        with pytest.raises(UnknownNameError, match=r"unknown pool .* Known: class, mean, attention"):
            VisionTransformer(patches, (8, 8), 1, mixer, CLASSES, pool=pool)  # type: ignore[arg-type]
    model = VisionTransformer(patches, (8, 8), 1, mixer, CLASSES)
    for tokens in (torch.zeros(4, WIDTH), torch.zeros(1, 4, WIDTH + 1)):
        with pytest.raises(ArgumentError, match=r"tokens must be \[B, n, 16\]; got \["):
            model.encode(tokens)
    with pytest.raises(ArgumentError, match=r"places must be \[4\] or \[1, 4\], one for each token; got \[3\]"):
        model.encode(torch.zeros(1, 4, WIDTH), places=torch.arange(3))
    with pytest.raises(ArgumentError, match="height must be filled by patches of 4 pixels, 4 apart; got 10"):
        VisionTransformer(patches, (10, 8), 1, mixer, CLASSES)
    with pytest.raises(CombinationError, match="is built for embed_dim=16, but its place here has embed_dim=32"):
        VisionTransformer(PatchEmbedding(32, 4), (8, 8), 1, mixer, CLASSES)
    with pytest.raises(CombinationError, match="needs mixers with is_causal=False"):
        VisionTransformer(patches, (8, 8), 1, lambda: SelfAttention(WIDTH, HEADS), CLASSES)
    with pytest.raises(UnknownNameError, match="unknown pool 'max'. Nearest: mean"):
        VisionTransformer(patches, (8, 8), 1, mixer, CLASSES, pool="max")  # type: ignore[arg-type]
    pools: tuple[Pool, ...] = ("mean", "attention")
    for pool in pools:
        with pytest.raises(ArgumentError, match=f"num_class_tokens must be left out with pool='{pool}'.*got 2"):
            VisionTransformer(patches, (8, 8), 1, mixer, CLASSES, pool=pool, num_class_tokens=2)
    with pytest.raises(ArgumentError, match="num_class_tokens must be positive; got 0"):
        VisionTransformer(patches, (8, 8), 1, mixer, CLASSES, num_class_tokens=0)
    with pytest.raises(ArgumentError, match=r"images must be floating point \[B, 3, H, W\]"):
        VisionTransformer(patches, (8, 8), 1, mixer, CLASSES)(torch.zeros(1, 1, 8, 8))
