"""Predicted bytes against those that PyTorch holds: parameters, optimizer, saved tensors, peaks, caches."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.footprint import (
    DecoderSize,
    Footprint,
    predict_cache_bytes,
    predict_rounded_cache_bytes,
    predict_training_bytes,
)
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.memory_efficient import MemoryEfficientAttention
from transformer_problems.solutions.attention.quantized_cache import QuantizedKVCache
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

OPS = {
    "dense": DenseAttention,
    "flash": lambda: FlashAttention(backend="sdpa"),
    "flash_tiled": lambda: FlashAttention(backend="tiled", block_size=32),
    "memory_efficient": lambda: MemoryEfficientAttention(32, 32),
}
SIZES = {
    "deep": (DecoderSize(8, 32, 4, 61), 2, 128),
    "wide": (DecoderSize(3, 96, 4, 101, num_kv_heads=2, rotary=True), 3, 100),
}


@pytest.fixture(params=SIZES)
def case(request: pytest.FixtureRequest) -> tuple[DecoderSize, int, int]:
    return SIZES[request.param]


def build(size: DecoderSize, attention: str = "flash", dtype: torch.dtype = torch.float32) -> Decoder:
    def mixer() -> SelfAttention:
        position = RotaryEmbedding(size.embed_dim // size.num_heads) if size.rotary else None
        op = OPS[attention]()
        return SelfAttention(size.embed_dim, size.num_heads, num_kv_heads=size.num_kv_heads, op=op, position=position)

    return Decoder(size.vocab_size, size.embed_dim, size.num_layers, mixer).to(dtype)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())


def draw(size: DecoderSize, batch_size: int, seq_len: int) -> Tensor:
    return torch.randint(size.vocab_size, (batch_size, seq_len))


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Storages that the graph of the loss holds, each once, without parameters and tokens."""
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    others = {x.untyped_storage().data_ptr() for x in (tokens, *model.parameters())}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output with its history would hold its own node, and be held by it

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = loss_of(model, tokens)
    gc.collect()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    assert loss.requires_grad
    return sum(num_bytes for pointer, num_bytes in storages.items() if pointer not in others)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_weights_gradients_and_optimizer(case: tuple[DecoderSize, int, int], optimizer: str) -> None:
    size, batch_size, seq_len = case
    model = build(size)
    makers = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters()),
    }
    made = makers[optimizer]()
    loss_of(model, draw(size, batch_size, seq_len)).backward()
    made.step()
    predicted = predict_training_bytes(size, batch_size=batch_size, seq_len=seq_len, optimizer=optimizer)
    assert predicted.weights == sum(p.nbytes for p in model.parameters())
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters())
    kept = [t for state in made.state.values() for t in state.values() if isinstance(t, Tensor)]
    # AdamW also counts its steps, 4 bytes a parameter tensor
    assert predicted.optimizer == pytest.approx(sum(t.nbytes for t in kept), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["dense", "flash", "flash_tiled"])
def test_saved_tensors(case: tuple[DecoderSize, int, int], attention: str, dtype: torch.dtype) -> None:
    """To 2%: left out are masks of one byte a row. Chunks of "memory_efficient" hold what no hook sees."""
    size, batch_size, seq_len = case
    model = build(size, attention, dtype)
    predicted = predict_training_bytes(
        size, batch_size=batch_size, seq_len=seq_len, dtype=dtype, attention=attention
    ).activations
    assert predicted == pytest.approx(saved_bytes(model, draw(size, batch_size, seq_len)), rel=0.02)


def step_peak(model: nn.Module, tokens: Tensor) -> int:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, tokens).backward()

    return peak_memory_bytes(step, device="cpu")


@pytest.mark.parametrize("attention", OPS)
def test_peak_of_a_step(case: tuple[DecoderSize, int, int], attention: str) -> None:
    size, batch_size, seq_len = case
    measured = step_peak(build(size, attention), draw(size, batch_size, seq_len))
    predicted = predict_training_bytes(size, batch_size=batch_size, seq_len=seq_len, attention=attention)
    assert predicted.activations + predicted.scratch == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("every", [None, "sqrt"])
def test_peak_of_a_step_that_scores_fill(every: str | None) -> None:
    """Few channels at a length where the N x N matrices, and their gradients, are nearly all there is."""
    size = DecoderSize(4, 16, 4, 61)
    model = build(size, "dense")
    with nullcontext() if every is None else checkpoint_layers(model, every=every):
        measured = step_peak(model, draw(size, 1, 512))
    predicted = predict_training_bytes(size, batch_size=1, seq_len=512, attention="dense", checkpoint_every=every)
    assert predicted.activations + predicted.scratch == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("seq_len", [512, 1024])
@pytest.mark.parametrize("every", ["sqrt", 1, 2])
def test_peak_of_a_checkpointed_step(every: int, seq_len: int) -> None:
    """At lengths where the layers' gradients are small beside their activations."""
    size = DecoderSize(9, 16, 2, 61)
    model = build(size)
    with checkpoint_layers(model, every=every):
        measured = step_peak(model, draw(size, 2, seq_len))
    predicted = predict_training_bytes(size, batch_size=2, seq_len=seq_len, checkpoint_every=every)
    assert predicted.activations + predicted.scratch == pytest.approx(measured, rel=0.15)


def test_checkpointing_shrinks_activations_only() -> None:
    size = DecoderSize(16, 64, 4, 61)
    plain = predict_training_bytes(size, batch_size=4, seq_len=256)
    thrifty = predict_training_bytes(size, batch_size=4, seq_len=256, checkpoint_every="sqrt")
    assert thrifty.activations < 0.35 * plain.activations
    assert thrifty.total - thrifty.activations == plain.total - plain.activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(case: tuple[DecoderSize, int, int], dtype: torch.dtype) -> None:
    size, batch_size, seq_len = case
    model = build(size, dtype=dtype)
    with torch.no_grad():
        _, state = model.stream(draw(size, batch_size, seq_len), model.initial_state(batch_size))
    assert predict_cache_bytes(size, batch_size=batch_size, num_tokens=seq_len, dtype=dtype) == state.num_bytes


@pytest.mark.parametrize("num_tokens", [5, 64])
def test_cache_of_a_window_with_sinks(num_tokens: int) -> None:
    size, op = DecoderSize(2, 32, 4, 61), AttentionSinks(9, num_sinks=2)
    model = Decoder(61, 32, 2, lambda: SelfAttention(32, 4, op=op))
    with torch.no_grad():
        _, state = model.stream(draw(size, 2, num_tokens), model.initial_state(2))
    predicted = predict_cache_bytes(
        size, batch_size=2, num_tokens=num_tokens, lookback=op.lookback, num_sinks=op.num_sinks
    )
    assert predicted == state.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [5, 40, 41, 100])
def test_cache_in_few_bits(num_tokens: int, bits: int, dtype: torch.dtype) -> None:
    size = DecoderSize(2, 32, 4, 61, num_kv_heads=2)

    def cache(batch_size: int) -> QuantizedKVCache:
        return QuantizedKVCache.empty(batch_size, bits=bits, group_size=8, num_recent=16)

    model = Decoder(61, 32, 2, lambda: SelfAttention(32, 4, num_kv_heads=2, cache=cache)).to(dtype)
    state = model.initial_state(3)
    with torch.no_grad():
        for piece in draw(size, 3, num_tokens).split(7, dim=1):
            _, state = model.stream(piece, state)
    predicted = predict_rounded_cache_bytes(
        size, batch_size=3, num_tokens=num_tokens, dtype=dtype, bits=bits, group_size=8, num_recent=16
    )
    assert predicted == state.num_bytes


def test_a_case_on_paper() -> None:
    """One layer, C = 2, one head, V = 3, F = 8, one token: 4 x 4 + 4 x 8 + 8 + 10 + 6 + 4 parameters."""
    size = DecoderSize(1, 2, 1, 3)
    parameters = 16 + 32 + 8 + 10 + 6 + 4
    layer = (8 * 2 + 2 * 8) * 4 + 4 * 4 + 4
    head = 2 * 2 * 4 + 2 * 4 + 3 * 4
    expected = Footprint(parameters * 4, parameters * 4, parameters * 8, layer + head, (8 + 2) * 4)
    assert size.num_parameters == parameters
    assert predict_training_bytes(size, batch_size=1, seq_len=1) == expected
    assert predict_cache_bytes(size, batch_size=1, num_tokens=5) == 2 * 5 * 2 * 4


def test_wrong_arguments_are_refused() -> None:
    size = DecoderSize(1, 8, 2, 3)
    with pytest.raises(UnknownNameError, match="unknown attention 'flush'. Nearest: flash"):
        predict_training_bytes(size, batch_size=1, seq_len=1, attention="flush")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown optimizer 'adam'. Nearest: adamw"):
        predict_training_bytes(size, batch_size=1, seq_len=1, optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="seq_len must be positive; got 0"):
        predict_training_bytes(size, batch_size=1, seq_len=0)
    with pytest.raises(ArgumentError, match="seq_len must be a positive whole number; got 1.5"):
        predict_training_bytes(size, batch_size=1, seq_len=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_tokens must be a positive whole number; got 1.5"):
        predict_cache_bytes(size, batch_size=1, num_tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expansion must be a positive whole number; got '4'"):
        DecoderSize(1, 8, 2, 3, expansion="4")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_heads must be a multiple of num_kv_heads; got 2 and 3"):
        DecoderSize(1, 8, 2, 3, num_kv_heads=3)
