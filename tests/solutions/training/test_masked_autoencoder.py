"""MaskedAutoencoder: patch by patch, as transformers' ViTMAE with the same weights and draws; what is never seen."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.stack import stack_layers
from transformer_problems.models.vision import Pool, VisionTransformer
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.learned_grid import LearnedGridPositions
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.masked_autoencoder import MaskedAutoencoder

WIDTH, NARROW, HEADS, LAYERS, PATCH, CHANNELS = 16, 8, 2, 2, 3, 2
PATCH_DIM = CHANNELS * PATCH**2


def layer(width: int) -> SelfAttention:
    return SelfAttention(width, HEADS, op=DenseAttention(), is_causal=False, bias=True)


def build(
    *, pool: Pool = "class", mask_share: float = 0.75, normalize_targets: bool = True, patch_size: int = PATCH
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    patches = PatchEmbedding(WIDTH, patch_size, in_channels=CHANNELS)
    encoder = VisionTransformer(patches, (12, 12), LAYERS, lambda: layer(WIDTH), 5, pool=pool)
    decoder = stack_layers(NARROW, 1, lambda: layer(NARROW), is_causal=False)
    positions = LearnedGridPositions(*patches.grid(12, 12), NARROW)
    model = MaskedAutoencoder(
        encoder, decoder, positions, mask_share=mask_share, normalize_targets=normalize_targets
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that every part counts
    return model


def draw(height: int = 12, width: int = 12, *, num: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, CHANNELS, height, width, dtype=torch.float64, generator=generator)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lowest_draws_are_visible(noise: Tensor, num_visible: int) -> Tensor:
    hidden = torch.ones_like(noise, dtype=torch.bool)
    for row, values in zip(hidden, noise.tolist(), strict=True):
        for n in sorted(range(len(values)), key=lambda n: values[n])[:num_visible]:
            row[n] = False
    return hidden


def naive_loss(model: MaskedAutoencoder, image: Tensor, hidden: list[bool]) -> list[Tensor]:
    """The squared error of each hidden patch of one image [C_in, H, W], token by token."""
    encoder, pixels = model.encoder, []
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    for n in range(rows * columns):
        y, x = n // columns * PATCH, n % columns * PATCH
        pixels.append(image[:, y : y + PATCH, x : x + PATCH].flatten())
    projection = encoder.patches.projection
    seen = [] if encoder.class_tokens is None else [encoder.class_tokens[0]]
    num_class = len(seen)
    for n, patch in enumerate(pixels):
        if not hidden[n]:
            seen.append(
                projection.weight.flatten(1) @ patch + projection.bias + encoder.positions.weight.flatten(0, 1)[n]
            )
    known = list(encoder.norm(encoder.blocks(torch.stack(seen)[None], key_mask=None, positions=None))[0])
    narrow = [model.to_decoder(token) for token in known]
    x, visible = narrow[:num_class], iter(narrow[num_class:])
    for n in range(len(pixels)):
        token = model.mask_token if hidden[n] else next(visible)
        x.append(token + model.positions.weight.flatten(0, 1)[n])
    painted = model.to_pixels(model.norm(model.decoder(torch.stack(x)[None], key_mask=None, positions=None)))[
        0, num_class:
    ]
    errors = []
    for n, patch in enumerate(pixels):
        if hidden[n]:
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt() if model.normalize_targets else patch
            errors.append((painted[n] - target).square().mean())
    return errors


@pytest.mark.parametrize("normalize_targets", [False, True])
@pytest.mark.parametrize(
    ("pool", "mask_share", "num_hidden"), [("class", 0.75, 12), ("mean", 0.5, 8), ("class", 0.1, 2)]
)
def test_it_is_what_happens_patch_by_patch(
    pool: Pool, mask_share: float, num_hidden: int, normalize_targets: bool
) -> None:
    model = build(pool=pool, mask_share=mask_share, normalize_targets=normalize_targets)
    images = draw(num=3)
    loss = model(images, generator=draws())
    hidden = lowest_draws_are_visible(torch.rand(3, 16, generator=draws()), 16 - num_hidden).tolist()
    errors = [e for image, row in zip(images, hidden, strict=True) for e in naive_loss(model, image, row)]
    assert len(errors) == 3 * num_hidden
    expected = torch.stack(errors).mean()
    # float64 sums of a few dozen terms through three layers, in another order
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=0)
    learned = {name: p for name, p in model.named_parameters() if not name.startswith("encoder.head")}
    found = torch.autograd.grad(loss, list(learned.values()))
    wanted = torch.autograd.grad(expected, list(learned.values()))
    for name, ours, theirs in zip(learned, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(ours.any()) or name.endswith("k_proj.bias")  # which softmax cancels


def shared(model: MaskedAutoencoder, peer: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of ours and theirs with the same parameters."""
    encoder, decoder = model.encoder, peer.decoder
    yield encoder.patches.projection, peer.vit.embeddings.patch_embeddings.projection
    yield encoder.norm, peer.vit.layernorm
    yield model.to_decoder, decoder.decoder_embed
    yield model.norm, decoder.decoder_norm
    pairs = [*zip(encoder.blocks, peer.vit.layers, strict=True)]
    pairs += zip(model.decoder, decoder.decoder_layers, strict=True)
    for block, theirs in pairs:
        yield block.mixer_residual.norm, theirs.layernorm_before
        yield block.feed_forward_residual.norm, theirs.layernorm_after
        yield block.feed_forward.up, theirs.mlp.fc1
        yield block.feed_forward.down, theirs.mlp.fc2
        for name, other in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            yield getattr(block.mixer, name), getattr(theirs.attention, other)


@pytest.mark.peer
@pytest.mark.parametrize("normalize_targets", [False, True])
def test_it_is_transformers_model_with_the_same_weights_and_draws(normalize_targets: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-5,
        image_size=12,
        patch_size=PATCH,
        num_channels=CHANNELS,
        decoder_hidden_size=NARROW,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=HEADS,
        decoder_intermediate_size=4 * NARROW,
        mask_ratio=0.75,
        norm_pix_loss=normalize_targets,
    )
    model, peer = build(normalize_targets=normalize_targets), ViTMAEForPreTraining(config).double().eval()
    with torch.no_grad():
        for ours, theirs in shared(model, peer):
            theirs.load_state_dict(ours.state_dict())
        # theirs orders the numbers of a patch by row, column and channel
        order = torch.arange(PATCH_DIM).view(CHANNELS, PATCH, PATCH).permute(1, 2, 0).flatten()
        peer.decoder.decoder_pred.weight.copy_(model.to_pixels.weight[order])
        peer.decoder.decoder_pred.bias.copy_(model.to_pixels.bias[order])
        peer.decoder.mask_token[:] = model.mask_token
        peer.vit.embeddings.cls_token[:] = model.encoder.class_tokens
        peer.vit.embeddings.position_embeddings[0, 1:] = model.encoder.positions.weight.flatten(0, 1)
        peer.decoder.decoder_pos_embed[0, 1:] = model.positions.weight.flatten(0, 1)  # its first row is zero
    images = draw()
    answer = peer(images, noise=torch.rand(2, 16, generator=draws()))
    loss = model(images, generator=draws())
    # float64 sums of a few dozen terms through three layers, in another order
    torch.testing.assert_close(loss, answer.loss, atol=1e-11, rtol=0)
    painted = model.predict(images, answer.mask.bool())
    torch.testing.assert_close(painted[..., order], answer.logits, atol=1e-11, rtol=0)
    loss.backward()
    answer.loss.backward()
    for ours, theirs in shared(model, peer):
        for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model.mask_token.grad, peer.decoder.mask_token.grad[0, 0], atol=1e-10, rtol=1e-10)


def test_the_encoder_never_sees_what_is_hidden() -> None:
    model, images = build(), draw()
    hidden = lowest_draws_are_visible(torch.rand(2, 16, generator=draws()), 4)
    elsewhere = images + hidden.view(2, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    assert not torch.equal(images, elsewhere)
    assert torch.equal(model.predict(images, hidden), model.predict(elsewhere, hidden))
    seen = draw().requires_grad_()
    model.predict(seen, hidden).square().sum().backward()
    touched = model.encoder.patches.cut(seen.grad).ne(0).any(dim=-1)
    assert torch.equal(touched, ~hidden)


@pytest.mark.parametrize(("mask_share", "num_visible"), [(0.75, 4), (0.5, 8)])
def test_the_encoders_layers_run_on_visible_tokens_only(mask_share: float, num_visible: int) -> None:
    model = build(mask_share=mask_share)
    with FlopCounterMode(display=False) as counter:
        model(draw(num=1), generator=draws())

    def layers(num: int, width: int, tokens: int) -> int:
        return num * (2 * 12 * width**2 * tokens + 4 * width * tokens**2)

    expected = 2 * 16 * PATCH_DIM * WIDTH + layers(LAYERS, WIDTH, num_visible + 1)
    expected += 2 * (num_visible + 1) * WIDTH * NARROW + layers(1, NARROW, 17) + 2 * 16 * NARROW * PATCH_DIM
    assert counter.get_total_flops() == expected


def test_what_is_hidden_depends_on_the_generator_alone() -> None:
    model, images = build(), draw()
    first, again, other = (model(images, generator=draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    assert torch.equal(model(images, generator=draws()), first)


def test_every_patch_is_hidden_equally_often() -> None:
    model = build(mask_share=0.25)
    hidden = torch.stack([model._draw_hidden(10, 16, draws(seed)) for seed in range(100)])
    assert bool((hidden.sum(dim=-1) == 4).all())
    # a thousand draws of chance 1/4: five standard deviations are 0.068
    assert bool(((hidden.double().mean(dim=(0, 1)) - 0.25).abs() < 0.068).all())


def test_images_of_another_size() -> None:
    model, images = build(), draw(6, 15)
    assert model(images, generator=draws()).isfinite()
    assert model.targets(images).shape == (2, 10, PATCH_DIM)


def test_gradients() -> None:
    model = build(mask_share=0.5, pool="mean")
    images = draw(6, 6, num=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, generator=draws()), (images,))


def test_normalized_targets_have_mean_zero_and_variance_one() -> None:
    targets = build().targets(1000 + draw())
    # float64 rounding of numbers near a thousand; the variance is short by its epsilon of 1e-6
    assert targets.mean(dim=-1).abs().max() < 1e-10 and (targets.var(dim=-1) - 1).abs().max() < 1e-4
    flat = build().targets(torch.full((1, CHANNELS, 12, 12), 7.0))
    assert bool((flat == 0).all())


def test_half_precision_is_compared_in_float32() -> None:
    loss = build().bfloat16()(draw().bfloat16(), generator=draws())
    assert loss.dtype == torch.float32 and bool(loss.isfinite())


def test_the_encoder_learns_and_then_classifies_as_it_is() -> None:
    torch.manual_seed(0)
    model = build().float()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    images = draw(num=8).float().cumsum(-1).cumsum(-2)  # smooth, so that a patch says something of its neighbours
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(images, generator=draws())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    unchanged = {name for name, p in model.encoder.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in unchanged if not name.endswith("k_proj.bias")} == {"head.0.weight", "head.0.bias"}
    assert model.encoder(images).shape == (8, 5)


def test_what_does_not_fit_is_refused() -> None:
    images = draw()
    for share in (0.0, 0.03, 0.97, 1.0):
        with pytest.raises(ArgumentError, match=rf"mask_share must hide at least one of 16 .* {share} hides (0|16)\."):
            build(mask_share=share)(images, generator=draws())
    with pytest.raises(ArgumentError, match=r"images must hold at least one; got \[0, 2, 12, 12\]"):
        build()(images[:0], generator=draws())
    with pytest.raises(ArgumentError, match="mask_share must be a share from 0 to 1; got 75"):
        build(mask_share=75)
    model = build()
    for hidden in (torch.ones(2, 16), torch.ones(2, 15) > 0):
        with pytest.raises(ArgumentError, match=r"hidden must be bool \[2, 16\], True for hidden patches"):
            model.predict(images, hidden)
    uneven = torch.eye(16, dtype=torch.bool)[:2]
    uneven[1] = False
    for hidden, left in ((uneven, r"\[15, 16\]"), (torch.ones(2, 16) > 0, r"\[0\]")):
        with pytest.raises(ArgumentError, match=f"as many patches visible in each row, at least one; it leaves {left}"):
            model.predict(images, hidden)


def test_misfit_parts_are_refused() -> None:
    model = build()
    parts = model.encoder, model.decoder, model.positions
    with pytest.raises(CombinationError, match="LearnedGridPositions is a class, not an instance"):
        MaskedAutoencoder(*parts[:2], LearnedGridPositions)  # type: ignore[arg-type]
    overlapping = PatchEmbedding(WIDTH, PATCH, in_channels=CHANNELS, stride=1)
    leaky = VisionTransformer(overlapping, (12, 12), 1, lambda: layer(WIDTH), 5)
    with pytest.raises(CombinationError, match="overlap, so images cannot be cut into them"):
        MaskedAutoencoder(leaky, *parts[1:])(draw().float(), generator=draws())
    stem = nn.Conv2d(CHANNELS, WIDTH, 3)
    leaky.patches = stem
    with pytest.raises(CombinationError, match="Conv2d has no `cut`. Build the encoder with PatchEmbedding"):
        MaskedAutoencoder(leaky, *parts[1:])
    pixels = PatchEmbedding(WIDTH, 1, in_channels=1)
    pixel_encoder = VisionTransformer(pixels, (4, 4), 1, lambda: layer(WIDTH), 5)
    with pytest.raises(CombinationError, match="a single number has no standard deviation"):
        MaskedAutoencoder(pixel_encoder, *parts[1:])
