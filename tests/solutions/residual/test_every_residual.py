"""What every residual and long skip promises inside a model: streams, dtypes, gradients, and no parameter unused."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.slots import LongSkips
from transformer_problems.models.block import ResidualFactory
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.post_norm import PostNorm
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.residual.deep_norm import DeepNorm
from transformer_problems.solutions.residual.dense_skips import DenseSkips
from transformer_problems.solutions.residual.layer_scale import LayerScale
from transformer_problems.solutions.residual.re_zero import ReZero
from transformer_problems.solutions.residual.skip_connection import SkipConnection
from transformer_problems.solutions.residual.unet_skips import UNetSkips

VOCAB, WIDTH, HEADS, LAYERS = 11, 8, 2, 5
RESIDUALS: dict[str, ResidualFactory] = {
    "pre_norm": PreNorm,
    "post_norm": PostNorm,
    "rms_norm": partial(PreNorm, norm=nn.RMSNorm),
    "skip_connection": SkipConnection,
    "deep_norm": partial(DeepNorm, num_layers=LAYERS),
    "layer_scale": LayerScale,
    "re_zero": ReZero,
}
SKIPS: dict[str, Callable[[], LongSkips | None]] = {
    "none": lambda: None,
    "unet": lambda: UNetSkips(WIDTH, LAYERS),
    "dense": lambda: DenseSkips(LAYERS),
}
PAIRS = [(residual, "none") for residual in RESIDUALS] + [("pre_norm", "unet"), ("post_norm", "dense")]


def disturb(model: nn.Module) -> None:
    """Move every parameter away from its start, where many of these are the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def build(residual: str, skips: str) -> Decoder:
    torch.manual_seed(0)

    def mixer() -> SelfAttention:
        return SelfAttention(WIDTH, HEADS)

    model = Decoder(VOCAB, WIDTH, LAYERS, mixer, residual=RESIDUALS[residual], skips=SKIPS[skips]()).double()
    disturb(model)
    return model


def draw(length: int) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


def assert_streams(model: Decoder, tokens: Tensor, sizes: list[int]) -> None:
    state, outputs = model.initial_state(2), []
    for chunk in tokens.split(sizes, dim=1):
        y, state = model.stream(chunk, state)
        outputs.append(y)
    # the same float64 sums in another order
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_streamed_equals_whole(residual: str, skips: str, length: int) -> None:
    assert_streams(build(residual, skips), draw(length), [length // 2, length - length // 2])


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), pair=st.sampled_from(PAIRS))
def test_chunks_of_any_sizes_give_what_the_whole_gives(sizes: list[int], pair: tuple[str, str]) -> None:
    assert_streams(build(*pair), draw(sum(sizes)), sizes)


@pytest.mark.parametrize(("residual", "skips"), PAIRS)
def test_later_tokens_and_other_sequences_change_nothing(residual: str, skips: str) -> None:
    model, tokens = build(residual, skips), draw(9)
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[0, :5], before[0, :5], atol=1e-12, rtol=0)  # float64 sums of some ten terms
    torch.testing.assert_close(after[1], before[1], atol=1e-12, rtol=0)
    assert not torch.allclose(after[0, 5:], before[0, 5:])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradcheck_of_residuals(residual: str) -> None:
    torch.manual_seed(0)
    joint, weight = RESIDUALS[residual](WIDTH, dtype=torch.float64), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    assert isinstance(joint, nn.Module)
    disturb(joint)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return joint(x, lambda h: torch.tanh(h @ weight))

    assert torch.autograd.gradcheck(run, (x, weight.requires_grad_(), *joint.parameters()))


@pytest.mark.parametrize("skips", ["unet", "dense"])
def test_gradcheck_of_skips(skips: str) -> None:
    torch.manual_seed(0)
    joint = SKIPS[skips]()
    assert isinstance(joint, nn.Module)
    disturb(joint.double())
    history = [torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(joint(history[: i + 1]) for i in range(LAYERS))

    assert torch.autograd.gradcheck(run, (*history, *joint.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("residual", "skips"), PAIRS)
def test_narrow_dtypes_are_kept(residual: str, skips: str, dtype: torch.dtype) -> None:
    """And the output is that of float64, up to roundings that add up to half the digits at most."""
    torch.manual_seed(0)
    model = Encoder(
        VOCAB,
        WIDTH,
        LAYERS,
        lambda: SelfAttention(WIDTH, HEADS, is_causal=False, dtype=dtype),
        residual=RESIDUALS[residual],
        skips=SKIPS[skips](),
        dtype=dtype,
    )
    if isinstance(model.body.skips, nn.Module):
        model.body.skips.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    hidden = model.body(draw(20))
    assert hidden.dtype == dtype
    wide = model.double().body(draw(20))
    assert (hidden - wide).norm() < torch.finfo(dtype).eps ** 0.5 * wide.norm()


@pytest.mark.parametrize(("residual", "skips"), PAIRS)
def test_every_parameter_learns(residual: str, skips: str) -> None:
    model, tokens = build(residual, skips), draw(9)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_built_has_the_device_and_dtype_asked_for() -> None:
    skips = (partial(UNetSkips, num_layers=LAYERS), lambda _, **where: DenseSkips(LAYERS, **where))
    for make in (*RESIDUALS.values(), *skips):
        joint = make(WIDTH, device="meta", dtype=torch.float16)
        assert isinstance(joint, nn.Module)
        assert all(p.device.type == "meta" and p.dtype == torch.float16 for p in joint.parameters())
