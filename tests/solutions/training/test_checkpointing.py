"""checkpoint_layers: the plain model's numbers from fewer saved bytes, and no trace left behind."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import token_positions
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.chunked import ChunkedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

WIDTH, HEADS, VOCAB = 16, 2, 11
EVERY = ["sqrt", 1, 2, 3, 100]


def build(num_layers: int = 7, *, is_causal: bool = True, width: int = WIDTH) -> Decoder | Encoder:
    torch.manual_seed(0)
    model = Decoder if is_causal else Encoder
    position = RotaryEmbedding(width // HEADS)
    return model(VOCAB, width, num_layers, lambda: SelfAttention(width, HEADS, position=position, is_causal=is_causal))


def draw(length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, tokens: Tensor, **keywords: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    y = model(tokens, **keywords)
    y.square().mean().backward()
    return y.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("every", EVERY)
def test_outputs_and_gradients_are_the_same_bits(every: int, is_causal: bool) -> None:
    model, tokens = build(is_causal=is_causal), draw()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    plain, plain_grads = gradients(model, tokens, key_mask=mask)
    with checkpoint_layers(model, every=every):
        y, grads = gradients(model, tokens, key_mask=mask)
    assert torch.equal(y, plain)
    assert all(map(torch.equal, grads, plain_grads))


@pytest.mark.parametrize(("every", "num_segments"), [(1, 6), (2, 3), (3, 2)])
def test_equals_checkpoint_sequential_of_torch(every: int, num_segments: int) -> None:
    """PyTorch's own helper over the same layers: the same gradients, and as many runs of each layer."""
    model, tokens = build(6), draw()
    runs: list[nn.Module] = []
    for block in model.body.blocks:
        block.feed_forward_residual.norm.register_forward_hook(lambda module, *_: runs.append(module))
    with checkpoint_layers(model, every=every):
        y, grads = gradients(model, tokens)
    ours = sorted(runs.count(block.feed_forward_residual.norm) for block in model.body.blocks)
    runs.clear()
    model.zero_grad(set_to_none=True)
    x = model.body.embed(tokens, token_positions(tokens.shape[1], tokens.device))
    hidden = checkpoint_sequential(model.body.blocks, num_segments, x, use_reentrant=False)
    theirs = nn.functional.linear(model.body.norm(hidden), model.body.embedding.weight)
    theirs.square().mean().backward()
    assert torch.equal(y, theirs)
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))
    # PyTorch leaves its last segment without a checkpoint
    assert sum(ours) - every == sum(runs.count(block.feed_forward_residual.norm) for block in model.body.blocks)


def test_dropout_draws_the_same_numbers_again() -> None:
    model, tokens = build(), draw()
    for block in model.body.blocks:
        block.feed_forward = nn.Sequential(block.feed_forward, nn.Dropout(0.5))
    torch.manual_seed(3)
    plain, plain_grads = gradients(model, tokens)
    torch.manual_seed(3)
    with checkpoint_layers(model):
        y, grads = gradients(model, tokens)
    assert torch.equal(y, plain)
    assert all(map(torch.equal, grads, plain_grads))


@pytest.mark.parametrize("every", EVERY)
def test_chunk_sizes_are_drawn_the_same_again(every: int) -> None:
    def mixer() -> ChunkedAttention:
        return ChunkedAttention(WIDTH, HEADS, chunk_size=4, left_chunks=1, dynamic_chunk_sizes=(1, 6))

    model, tokens = Encoder(VOCAB, WIDTH, 5, mixer), draw()
    torch.manual_seed(3)
    plain, plain_grads = gradients(model, tokens)
    torch.manual_seed(3)
    with checkpoint_layers(model, every=every):
        y, grads = gradients(model, tokens)
    assert torch.equal(y, plain)
    assert all(map(torch.equal, grads, plain_grads))


def layer_runs(model: nn.Module, action: Callable[[], object]) -> list[int]:
    """How often each layer's own mixer runs."""
    runs = [0] * len(model.body.blocks)

    def count(i: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[i] += 1

        return hook

    hooks = [block.mixer.register_forward_hook(count(i)) for i, block in enumerate(model.body.blocks)]
    action()
    for hook in hooks:
        hook.remove()
    return runs


@pytest.mark.parametrize("every", EVERY)
def test_every_layer_runs_once_more_in_training_and_once_without(every: int) -> None:
    model, tokens = build(), draw()
    with checkpoint_layers(model, every=every):
        assert layer_runs(model, lambda: gradients(model, tokens)) == [2] * 7
        with torch.no_grad():
            assert layer_runs(model, lambda: model(tokens)) == [1] * 7


def test_recomputing_costs_one_forward_pass_of_the_layers() -> None:
    model, tokens = build(9), draw()

    def flops(action: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            action()
        return counter.get_total_flops()

    forward, plain = flops(lambda: model(tokens)), flops(lambda: gradients(model, tokens))
    head = 2 * tokens.numel() * WIDTH * VOCAB
    with checkpoint_layers(model):
        more = flops(lambda: gradients(model, tokens)) - plain
    # recomputing stops at the last tensor that a segment saves, before its last product
    last = 3 * 2 * tokens.numel() * WIDTH * 4 * WIDTH
    assert forward - head - last <= more <= forward - head


def held(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without the parameters."""
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output with its history would hold its own node, and be held by it

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(tokens).square().mean()
    gc.collect()
    storages = [saved.tensor.untyped_storage() for saved in alive]
    total = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())
    assert loss.requires_grad
    return total


def test_peak_of_a_step_grows_as_the_square_root_of_depth() -> None:
    def peak(num_layers: int, *, checkpointed: bool) -> int:
        model, tokens = build(num_layers, width=8), draw(256)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(tokens).mean().backward()

        if not checkpointed:
            return peak_memory_bytes(step, device="cpu")
        with checkpoint_layers(model):
            return peak_memory_bytes(step, device="cpu")

    plain = peak(16, checkpointed=False) / peak(4, checkpointed=False)
    thrifty = peak(16, checkpointed=True) / peak(4, checkpointed=True)
    # four times the depth, beside what does not depend on it: between a half and all of the growth by 4, or by 2
    assert 3 < plain <= 4
    assert 1.5 < thrifty <= 2.2


def test_nothing_but_segment_inputs_and_the_head_is_held() -> None:
    model, tokens = build(9), draw(64)
    with checkpoint_layers(model):
        checkpointed = held(model, tokens)
    # three segments' inputs; the last norm's input, output and statistics; the logits that `square` saves; tokens
    t = tokens.numel()
    assert checkpointed <= (3 * WIDTH + 2 * WIDTH + 2 + VOCAB) * t * 4 + t * 8
    assert held(model, tokens) > 9 * 10 * t * WIDTH * 4


def test_the_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = build()
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), checkpoint_layers(model):
        assert list(model.state_dict()) == names
        raise RuntimeError("stop")
    assert all(vars(block).keys().isdisjoint({"forward", "stream"}) for block in model.body.blocks)


def test_contexts_may_be_nested_and_streaming_goes_on_inside() -> None:
    model, tokens = build(), draw()
    plain, plain_grads = gradients(model, tokens)
    with checkpoint_layers(model, every=3):
        with checkpoint_layers(model, every=2):
            y, grads = gradients(model, tokens)
        with torch.no_grad():
            streamed, _ = model.stream(tokens, model.initial_state(2))
        again, _ = gradients(model, tokens)
    assert torch.equal(y, plain) and torch.equal(again, plain)
    assert all(map(torch.equal, grads, plain_grads))
    torch.testing.assert_close(streamed, plain)  # another order of float32 sums
    assert all(vars(block).keys().isdisjoint({"forward", "stream"}) for block in model.body.blocks)


def test_streams_with_gradients_are_refused() -> None:
    model, tokens = build(), draw()
    with (
        checkpoint_layers(model, every=3),
        checkpoint_layers(model, every=2),
        pytest.raises(CombinationError, match=r"got a stream with gradients.*inside torch\.no_grad"),
    ):
        model.stream(tokens, model.initial_state(2))
    streamed, _ = model.stream(tokens, model.initial_state(2))
    assert streamed.requires_grad


def test_a_compiled_model_stays_one_graph() -> None:
    model, tokens = build(2), draw()
    _, plain_grads = gradients(model, tokens)
    with checkpoint_layers(model):
        _, grads = gradients(torch.compile(model, backend="eager", fullgraph=True), tokens)
    assert all(map(torch.equal, grads, plain_grads))


def test_a_pass_begun_inside_may_end_outside() -> None:
    model, tokens = build(), draw()
    _, plain_grads = gradients(model, tokens)
    model.zero_grad(set_to_none=True)
    with checkpoint_layers(model):
        loss = model(tokens).square().mean()
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain_grads, strict=True))


def test_models_that_do_something_between_layers_are_refused() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = build(4).body.blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = 2 * block(x, positions=token_positions(x.shape[1], x.device))
            return x

    model, x = Doubling(), torch.randn(1, 5, WIDTH)
    with (
        checkpoint_layers(model),
        pytest.raises(CombinationError, match=r"does something between them\. Use every=1"),
    ):
        model(x)
    plain = model(x)
    with checkpoint_layers(model, every=1):
        assert torch.equal(model(x), plain)


def test_wrong_arguments_are_refused() -> None:
    for every in (0, -1, "log", 1.5):
        with (
            pytest.raises(ArgumentError, match="every must be a positive number of layers or 'sqrt'"),
            checkpoint_layers(build(), every=every),  # type: ignore[arg-type]
        ):
            pass
    with (
        pytest.raises(ArgumentError, match="model must have a ModuleList `blocks` of layers; Linear has none"),
        checkpoint_layers(nn.Linear(2, 2)),
    ):
        pass
