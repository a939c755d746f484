"""Mamba against its definition and against transformers, whole and in chunks of any sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, MissingDependencyError
from transformer_problems.kernels.compiler import find_compiler
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.recurrence.mamba import Mamba, MambaState
from transformer_problems.solutions.recurrence.selective_scan import Backend
from transformer_problems.testing import check_mixer

WIDTH = 10
LENGTHS = [1, 63, 64, 100, 101]
TOLERANCE = {"atol": 1e-11, "rtol": 0.0}  # float64 sums of some hundred terms

try:
    find_compiler()
    HAS_COMPILER = True
except MissingDependencyError:
    HAS_COMPILER = False
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")),
]
pytestmark = pytest.mark.filterwarnings("ignore:selective_scan uses its slower PyTorch path")


def build(*, backend: Backend = "auto", conv_width: int = 4) -> Mamba:
    torch.manual_seed(0)
    return Mamba(WIDTH, state_dim=4, conv_width=conv_width, dt_rank=2, backend=backend).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, dtype=torch.float64)


def naive(layer: Mamba, x: Tensor) -> Tensor:
    """The layer as the paper draws it, one token at a time."""
    u, gate = layer.in_proj(x).chunk(2, dim=-1)
    convolved = nn.functional.conv1d(
        nn.functional.pad(u.mT, (layer.conv_width - 1, 0)), layer.conv1d.weight, layer.conv1d.bias, groups=u.shape[-1]
    )
    u = nn.functional.silu(convolved.mT)
    A, h, outputs = -layer.A_log.exp(), torch.zeros(len(x), *layer.A_log.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        low_rank, B, C = layer.x_proj(u[:, t]).split([layer.dt_rank, layer.state_dim, layer.state_dim], dim=-1)
        delta = nn.functional.softplus(layer.dt_proj(low_rank))[..., None]
        h = (delta * A).exp() * h + delta * B[:, None] * u[:, t, :, None]
        outputs.append((h @ C[..., None])[..., 0] + layer.D * u[:, t])
    y: Tensor = layer.out_proj(torch.stack(outputs, 1) * nn.functional.silu(gate))
    return y


def run_stream(layer: Mamba, x: Tensor, sizes: list[int]) -> tuple[Tensor, MambaState]:
    state, outputs = layer.initial_state(len(x)), []
    for chunk in x.split(sizes, dim=1):
        y, state = layer.stream(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_definition_in_outputs_and_gradients(length: int, backend: Backend) -> None:
    layer = build(backend=backend)
    x = draw(length).requires_grad_()
    weight = draw(length)
    inputs = (x, *layer.parameters())
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # A_log reaches a first output only through a state of zeros: its gradient is then zero in both
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.peer
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers_with_the_same_weights(length: int, backend: Backend) -> None:
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    peer = MambaMixer(MambaConfig(hidden_size=32, state_size=16, num_hidden_layers=1), layer_idx=0).eval()
    layer = Mamba(32, backend=backend)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(2, length, 32, requires_grad=True)
    weight = torch.randn(2, length, 32)
    ours, theirs = layer(x), peer(x)
    names = dict(layer.named_parameters())
    ours_grads = torch.autograd.grad((ours * weight).sum(), [x, *names.values()])
    theirs_grads = torch.autograd.grad((theirs * weight).sum(), [x, *(dict(peer.named_parameters())[n] for n in names)])
    for mine, other in zip((ours, *ours_grads), (theirs, *theirs_grads), strict=True):
        # float32 rounds at 6e-8 and its error grows over sums of up to 2 * 101 * 64 terms
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_the_contract_of_a_mixer(backend: Backend) -> None:
    report = check_mixer(Mamba(32, backend=backend), embed_dim=32)
    assert all(check.outcome == "holds" for check in report.checks)


@settings(max_examples=50)
@given(conv_width=st.integers(1, 5), sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_chunks_of_any_sizes_give_what_the_whole_gives(conv_width: int, sizes: list[int]) -> None:
    layer = build(conv_width=conv_width)
    x = draw(sum(sizes))
    with torch.no_grad():
        streamed, state = run_stream(layer, x, sizes)
        torch.testing.assert_close(streamed, layer(x), **TOLERANCE)
    assert state.num_seen == sum(sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_recurrent_form_equals_parallel_form_in_outputs_and_gradients(length: int, backend: Backend) -> None:
    layer = build(backend=backend)
    x = draw(length).requires_grad_()
    weight = draw(length)
    inputs = (x, *layer.parameters())
    outputs = layer(x), run_stream(layer, x, [1] * length)[0]
    torch.testing.assert_close(*outputs, **TOLERANCE)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), inputs) for y in outputs), **TOLERANCE)


def test_state_has_constant_size_and_holds_nothing_else() -> None:
    layer = build()
    with torch.no_grad():
        states = [run_stream(layer, draw(length), [length])[1] for length in (1, 7, 500)]
    expected = 2 * 2 * WIDTH * (4 + 3) * 8  # batch, E = 2 C, S states and 3 inputs of the convolution, float64
    for state in (layer.initial_state(2), *states):
        assert state.num_bytes == expected
        assert sum(t.untyped_storage().nbytes() for t in state.tensors().values()) == expected


def test_a_state_can_be_continued_in_several_ways() -> None:
    layer = build()
    prefix, one, other = draw(9), draw(3), draw(3)
    _, state = run_stream(layer, prefix, [9])
    before, _ = layer.stream(one, state)
    layer.stream(other, state)
    after, _ = layer.stream(one, state)
    assert torch.equal(before, after)
    free = state.detach()
    assert free.num_seen == 9 and all(t.grad_fn is None for t in free.tensors().values())


def test_padding_in_front_changes_nothing() -> None:
    layer = build()
    x = draw(12)
    padded = torch.cat([torch.full((2, 5, WIDTH), float("nan"), dtype=x.dtype), x], dim=1)
    mask = torch.arange(17) >= 5
    y = layer(padded, key_mask=mask.expand(2, -1))
    torch.testing.assert_close(y[:, 5:], layer(x), **TOLERANCE)
    assert (y[:, :5] == 0).all()


def test_the_state_passes_masked_tokens_unchanged() -> None:
    """With a convolution of one token nothing but the state links tokens, so masked ones can be cut out."""
    layer = build(conv_width=1)
    x, mask = draw(40), torch.rand(40) < 0.6
    y = layer(x, key_mask=mask.expand(2, -1))
    torch.testing.assert_close(y[:, mask], layer(x[:, mask]), **TOLERANCE)
    assert (y[:, ~mask] == 0).all()


def test_positions_are_ignored() -> None:
    layer, x = build(), draw(8)
    assert torch.equal(layer(x, positions=torch.arange(8).flip(0)), layer(x))


def test_untrained_rates_and_steps_are_the_papers() -> None:
    layer = Mamba(64)
    torch.testing.assert_close(layer.A_log.exp()[5], torch.arange(1.0, 17.0))
    steps = nn.functional.softplus(layer.dt_proj.bias)
    assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()
    assert layer.dt_rank == 4 and layer.in_proj.out_features == 2 * 128


def test_a_decoder_streams_through_layers_of_states() -> None:
    model = Decoder(7, WIDTH, 3, lambda: Mamba(WIDTH, state_dim=4)).double()
    tokens = torch.randint(7, (2, 21))
    state, outputs = model.initial_state(2), []
    with torch.no_grad():
        for chunk in tokens.split([1, 2, 3, 15], dim=1):
            logits, state = model.stream(chunk, state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), **TOLERANCE)


def test_misfits_are_named() -> None:
    with pytest.raises(ArgumentError, match="state_dim must be positive; got 0"):
        Mamba(8, state_dim=0)
    layer = build()
    with pytest.raises(ArgumentError, match="a chunk must have the batch size of its state, 3; got 2"):
        layer.stream(draw(4), layer.initial_state(3))
