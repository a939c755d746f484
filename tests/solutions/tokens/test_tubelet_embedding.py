"""TubeletEmbedding against explicit loops and transformers' ViViT; which clips it takes; starts from images."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.tokens.tubelet_embedding import TubeletEmbedding

# clip, then patch_size, tubelet_len, pad
CASES = {
    "tubelets": ((4, 8, 12), (4, 2, False)),
    "frames": ((3, 4, 8), (4, 1, False)),
    "one pixel": ((2, 3, 5), (1, 1, False)),
    "whole clip": ((5, 7, 7), (7, 5, False)),
    "padded": ((5, 9, 11), (4, 2, True)),
    "padded, smaller than a tubelet": ((1, 1, 3), (4, 3, True)),
}


def build(case: str) -> tuple[TubeletEmbedding, Tensor]:
    size, (patch_size, tubelet_len, pad) = CASES[case]
    torch.manual_seed(0)
    module = TubeletEmbedding(6, patch_size, tubelet_len, in_channels=2, pad=pad, dtype=torch.float64)
    return module, torch.randn(3, 2, *size, dtype=torch.float64)


def naive(module: TubeletEmbedding, clips: Tensor) -> Tensor:
    """Tubelet by tubelet, each pixel outside the clip a zero."""
    weight, bias = module.projection.weight, module.projection.bias
    side, length = module.patch_size, module.tubelet_len
    steps, rows, columns = module.grid(*clips.shape[2:])
    tokens = []
    for step, row, column in ((s, r, c) for s in range(steps) for r in range(rows) for c in range(columns)):
        token = bias.expand(len(clips), -1)
        for k, i, j in ((k, i, j) for k in range(length) for i in range(side) for j in range(side)):
            t, y, x = step * length + k, row * side + i, column * side + j
            if t < clips.shape[2] and y < clips.shape[3] and x < clips.shape[4]:
                token = token + clips[:, :, t, y, x] @ weight[:, :, k, i, j].T
        tokens.append(token)
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_projected_tubelets(case: str) -> None:
    module, clips = build(case)
    clips.requires_grad_()
    expected, found = naive(module, clips), module(clips)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # float64 sums of at most 490 terms of order one
    weight = torch.randn_like(expected)
    inputs = [clips, *module.parameters()]
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize(("tubelet", "size"), [((2, 4, 4), (8, 12, 12)), ((3, 5, 5), (9, 15, 15))])
def test_it_is_transformers_embedding_with_the_same_weights(
    tubelet: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    from transformers import VivitConfig
    from transformers.models.vivit.modeling_vivit import VivitTubeletEmbeddings

    torch.manual_seed(0)
    module = TubeletEmbedding(6, tubelet[1], tubelet[0], dtype=torch.float64)
    config = VivitConfig(
        num_frames=size[0], image_size=size[1], tubelet_size=list(tubelet), num_channels=3, hidden_size=6
    )
    peer = VivitTubeletEmbeddings(config).double()
    peer.projection.load_state_dict(module.projection.state_dict())
    clips = torch.randn(2, 3, *size, dtype=torch.float64)
    theirs = peer(clips.transpose(1, 2))  # frames first
    torch.testing.assert_close(module(clips), theirs, atol=1e-13, rtol=0)  # float64 sums of at most 225 terms
    weight = torch.randn_like(theirs)
    found = torch.autograd.grad((module(clips) * weight).sum(), list(module.projection.parameters()))
    wanted = torch.autograd.grad((theirs * weight).sum(), list(peer.projection.parameters()))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", ["tubelets", "padded, smaller than a tubelet"])
def test_gradients(case: str) -> None:
    module, clips = build(case)
    assert torch.autograd.gradcheck(module, (clips[:1].requires_grad_(),))


@given(
    patch_size=st.integers(1, 5),
    tubelet_len=st.integers(1, 4),
    num_frames=st.integers(1, 7),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
)
def test_every_pixel_lies_in_a_tubelet(
    patch_size: int, tubelet_len: int, num_frames: int, height: int, width: int
) -> None:
    strict, padded = (TubeletEmbedding(1, patch_size, tubelet_len, in_channels=1, pad=pad) for pad in (False, True))
    nn.init.ones_(padded.projection.weight)
    size = (num_frames, height, width)
    clips = torch.zeros(1, 1, *size, requires_grad=True)
    tokens = padded(clips)
    steps, rows, columns = padded.grid(*size)
    assert tokens.shape == (1, steps * rows * columns, 1)
    tokens.sum().backward()
    assert bool((clips.grad == 1).all())
    try:
        grid = strict.grid(*size)
    except ArgumentError as error:
        said = str(error)
        named = re.search(r"a clip's ([a-z ]+) must be a multiple of (\d+).*; got (\d+)\. Choose ([\d or]+)\.$", said)
        assert named is not None
        step, got = int(named[2]), int(named[3])
        expected = {"number of frames": (tubelet_len, num_frames), "height": (patch_size, height)}
        assert (step, got) == expected.get(named[1], (patch_size, width))
        nearest = [n for n in (got - got % step, got - got % step + step) if n > 0]
        assert [int(n) for n in named[4].split(" or ")] == nearest
    else:
        assert grid == (steps, rows, columns)


def patches_of_an_image_model() -> PatchEmbedding:
    torch.manual_seed(0)
    return PatchEmbedding(6, 4, in_channels=2, dtype=torch.float64)


@pytest.mark.parametrize("tubelet_len", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["central", "inflate"])
def test_a_still_clip_gets_the_tokens_of_its_image(method: str, tubelet_len: int) -> None:
    patches = patches_of_an_image_model()
    tubelets = TubeletEmbedding.from_patches(patches, tubelet_len, method=method)  # type: ignore[arg-type]
    images = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    still = images[:, :, None].expand(-1, -1, 2 * tubelet_len, -1, -1)
    expected = patches(images).repeat(1, 2, 1)  # at both steps
    torch.testing.assert_close(tubelets(still), expected, atol=1e-13, rtol=0)  # float64, the same terms a t-th each


@pytest.mark.parametrize("tubelet_len", [1, 2, 3, 4])
def test_of_a_moving_clip_one_starts_with_the_central_frame_the_other_with_the_mean(tubelet_len: int) -> None:
    patches = patches_of_an_image_model()
    clips = torch.randn(3, 2, tubelet_len, 8, 12, dtype=torch.float64)
    central = TubeletEmbedding.from_patches(patches, tubelet_len)
    expected = patches(clips[:, :, tubelet_len // 2])
    torch.testing.assert_close(central(clips), expected, atol=1e-13, rtol=0)  # the same float64 terms, and zeros
    inflated = TubeletEmbedding.from_patches(patches, tubelet_len, method="inflate")
    by_frame = torch.stack([patches(frame) for frame in clips.unbind(2)])
    torch.testing.assert_close(inflated(clips), by_frame.mean(dim=0), atol=1e-13, rtol=0)


def test_what_starts_from_an_image_model_learns_on_its_own() -> None:
    patches = PatchEmbedding(6, 4, in_channels=2, pad=True, dtype=torch.bfloat16)
    before = patches.projection.weight.clone()
    tubelets = TubeletEmbedding.from_patches(patches, 3)
    assert tubelets.pad and tubelets.projection.weight.dtype == torch.bfloat16
    tubelets(torch.ones(1, 2, 3, 4, 4, dtype=torch.bfloat16)).sum().backward()
    assert bool(tubelets.projection.weight.grad.all())  # frames that begin with weight zero too
    assert patches.projection.weight.grad is None
    nn.init.zeros_(tubelets.projection.weight)
    assert torch.equal(patches.projection.weight, before)


def test_flops_are_the_formula() -> None:
    module, clips = build("padded")
    steps, rows, columns = module.grid(*clips.shape[2:])
    num_numbers = 2 * 2 * 4 * 4  # of a tubelet
    with torch.no_grad():
        assert count_flops(lambda: module(clips)) == 2 * 3 * steps * rows * columns * num_numbers * 6


def test_clips_of_half_precision_and_no_clips() -> None:
    module = TubeletEmbedding(6, 4, 2, dtype=torch.bfloat16)
    assert module(torch.zeros(2, 3, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module(torch.zeros(0, 3, 4, 8, 8, dtype=torch.bfloat16)).shape == (0, 8, 6)


def test_what_does_not_fit_is_refused() -> None:
    module = TubeletEmbedding(6, 4, 2)
    with pytest.raises(ArgumentError, match="height must be a multiple of 4, .*pad=True; got 30. Choose 28 or 32"):
        module(torch.zeros(1, 3, 4, 30, 32))
    with pytest.raises(ArgumentError, match="number of frames must be a multiple of 2, .* got 1. Choose 2"):
        module(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ArgumentError, match="num_frames must be positive; got 0"):
        module(torch.zeros(1, 3, 0, 8, 8))
    frames_first, one_clip = (1, 4, 3, 8, 8), (3, 4, 8, 8)
    for clips in (torch.zeros(frames_first), torch.zeros(one_clip)):
        with pytest.raises(ArgumentError, match=r"clips must be floating point \[B, 3, T, H, W\]; got torch\..*frames"):
            module(clips)
    with pytest.raises(ArgumentError, match=r"got torch\.int64 \[1, 3, 4, 8, 8\]. Pass clips.float\(\) / 255.$"):
        module(torch.zeros(1, 3, 4, 8, 8, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="tubelet_len must be positive; got 0"):
        TubeletEmbedding(6, 4, 0)
    with pytest.raises(ArgumentError, match="pad must be True or False; got 'no'"):
        TubeletEmbedding(6, 4, 2, pad="no")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="patch_size must be a positive whole number; got 2.5"):
        TubeletEmbedding(6, 2.5, 2)  # type: ignore[arg-type]


def test_a_start_that_does_not_fit_is_refused() -> None:
    patches = PatchEmbedding(6, 4)
    with pytest.raises(UnknownNameError, match="unknown method of initialisation 'centre'. Nearest: central"):
        TubeletEmbedding.from_patches(patches, 2, method="centre")  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="stride=2 and padding=2. Start from PatchEmbedding with stride=4, padd"):
        TubeletEmbedding.from_patches(PatchEmbedding(6, 4, stride=2), 2)
    with pytest.raises(CombinationError, match="stride=4 and padding=1"):
        TubeletEmbedding.from_patches(PatchEmbedding(6, 4, padding=1), 2)
    with pytest.raises(CombinationError, match="PatchEmbedding is a class, not an instance"):
        TubeletEmbedding.from_patches(PatchEmbedding, 2)  # type: ignore[arg-type]
    for other in (ConvolutionalStem(8, 2), TubeletEmbedding(6, 4, 2), nn.Conv2d(3, 6, 4, 4), None):
        with pytest.raises(ArgumentError, match="patches must be the PatchEmbedding of an image model, .* got"):
            TubeletEmbedding.from_patches(other, 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tubelet_len must be positive; got 0"):
        TubeletEmbedding.from_patches(patches, 0)
