"""TrainingMonitor: what it records of a training, and that the training does not notice."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers
from transformer_problems.solutions.training.monitor import TrainingMonitor
from transformer_problems.solutions.training.monitor_statistics import (
    multihead_statistics,
    op_statistics,
    token_similarity,
)

VOCAB, WIDTH, HEADS, LAYERS = 13, 16, 2, 3
NAMES = tuple(f"body.blocks.{i}" for i in range(LAYERS))


def decoder(*, op: nn.Module | None = None, num_layers: int = LAYERS, width: int = WIDTH) -> Decoder:
    torch.manual_seed(0)
    position = RotaryEmbedding(width // HEADS)
    return Decoder(VOCAB, width, num_layers, lambda: SelfAttention(width, HEADS, op=op, position=position))


def encoder(*, batch_first: bool = True, num_layers: int = LAYERS) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first)  # with dropout
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def tokens(step: int, *, num: int = 2, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (num, length), generator=torch.Generator().manual_seed(step))


def vectors(step: int) -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> None:
    batch = tokens(step) if isinstance(model, Decoder) else vectors(step)
    model(batch).square().mean().backward()


def train(model: nn.Module, optimizer: optim.Optimizer, num_steps: int) -> None:
    for step in range(num_steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def norm(numbers: Iterator[Tensor]) -> float:
    return float(torch.cat([x.detach().flatten() for x in numbers]).norm())


def test_gradient_norms_and_update_ratios_of_sgd_are_those_on_paper() -> None:
    """A step of SGD changes the weights by lr * g, so the ratio is lr * |g| / |w|."""
    model = decoder().double()
    optimizer = optim.SGD(model.parameters(), lr=0.03)
    before = {name: norm(model.get_submodule(name).parameters()) for name in NAMES}
    with TrainingMonitor(model, optimizer) as monitor:
        train(model, optimizer, 1)
    assert [record.layer for record in monitor.records] == list(NAMES)
    for record in monitor.records:
        gradient = norm(parameter.grad for parameter in model.get_submodule(record.layer).parameters())
        # float64, but the difference of the weights keeps fewer digits than they have
        assert record.gradient_norm == pytest.approx(gradient, rel=1e-12)
        assert record.update_ratio == pytest.approx(0.03 * gradient / before[record.layer], rel=1e-9)


def test_every_twentieth_step_is_sampled_from_the_first_on() -> None:
    model = decoder(num_layers=1)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with TrainingMonitor(model, optimizer) as monitor:
        train(model, optimizer, 41)
    assert [record.step for record in monitor.records] == [0, 20, 40]


def test_attention_and_similarity_of_each_layer_are_those_of_its_own_pass() -> None:
    model = decoder(op=DenseAttention())
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    expected, x = {}, model.body.embed(tokens(0), torch.arange(9))
    with torch.no_grad():
        for name, block in zip(NAMES, model.body.blocks, strict=True):
            h, mixer = block.mixer_residual.norm(x), block.mixer
            q, k, v = (p(h).view(2, 9, HEADS, -1).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            q, k = mixer.position.rotate(q, k, torch.arange(9), torch.arange(9))
            x = block(x)
            expected[name] = op_statistics(q, k, v, is_causal=True), token_similarity(x)
    with TrainingMonitor(model, optimizer) as monitor:
        train(model, optimizer, 1)
    for record in monitor.records:
        attention, similarity = expected[record.layer]
        assert record.largest_logit == pytest.approx(attention.largest_logit, rel=1e-5)  # float32
        assert record.attention_entropy == pytest.approx(attention.entropy, rel=1e-5)
        assert record.attention_entropy_share == pytest.approx(attention.entropy_share, rel=1e-5)
        assert record.token_similarity == pytest.approx(similarity, rel=1e-4)  # differences of sums


def figures(model: nn.Module, loop: Callable[[optim.Optimizer], None] | None = None, **keywords: object) -> list[list]:
    """The records of a training without randomness, but for the layers' names."""
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with TrainingMonitor(model, optimizer, **keywords) as monitor:
        if loop is None:
            train(model, optimizer, 1)
        else:
            loop(optimizer)
    return [
        [r.gradient_norm, r.update_ratio, r.largest_logit, r.attention_entropy, r.token_similarity]
        for r in monitor.records
    ]


def near(expected: list[list]) -> list:
    return [pytest.approx(row, rel=1e-4) for row in expected]  # float32, summed in another order


def test_an_op_that_all_layers_share_is_told_apart_by_layer() -> None:
    ops = [DenseAttention() for _ in range(LAYERS)]
    separate = decoder()
    for block, op in zip(separate.body.blocks, ops, strict=True):
        block.mixer.op = op
    assert figures(decoder(op=ops[0])) == near(figures(separate))


def test_examples_are_found_where_the_tokens_come_first() -> None:
    def loop(model: nn.Module, batch: Tensor) -> Callable[[optim.Optimizer], None]:
        def run(optimizer: optim.Optimizer) -> None:
            model(batch).square().mean().backward()
            optimizer.step()

        return run

    first, last = encoder(), encoder(batch_first=False)
    for module in [*first.modules(), *last.modules()]:
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.p = module.dropout = 0.0  # whose draws would differ between the layouts
    expected = figures(first, loop(first, vectors(0)))
    assert figures(last, loop(last, vectors(0).transpose(0, 1))) == near(expected)
    query = vectors(0)
    assert expected[0][2] == multihead_statistics(encoder().layers[0].self_attn, query, query, query).largest_logit


def test_of_several_calls_of_attention_in_a_layer_the_largest_logit_counts() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model, memory = nn.TransformerDecoder(layer, 1), 50 * vectors(1)  # logits of the second attention are large
    seen = []
    layer = model.layers[0]
    for part in (layer.self_attn, layer.multihead_attn):
        part.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(multihead_statistics(module, *args, **kwargs)), with_kwargs=True
        )

    def loop(optimizer: optim.Optimizer) -> None:
        model(vectors(0), memory).square().mean().backward()
        optimizer.step()

    ((_, _, logit, entropy, _),) = figures(model, loop)
    assert logit == seen[1].largest_logit > seen[0].largest_logit
    assert entropy == (seen[0].entropy + seen[1].entropy) / 2


def test_a_sample_looks_at_the_first_pass_with_gradients_and_at_the_whole_gradient() -> None:
    """An evaluation before the step and a second part of the batch add no attention of their own."""

    def accumulated(optimizer: optim.Optimizer) -> None:
        with torch.no_grad():
            model(tokens(9))
        backward(model, 0)
        backward(model, 1)
        optimizer.step()

    model = decoder()
    found, plain = figures(model, accumulated), figures(decoder())
    assert [row[2:] for row in found] == [row[2:] for row in plain]
    total = [norm(parameter.grad for parameter in model.get_submodule(name).parameters()) for name in NAMES]
    assert [row[0] for row in found] == pytest.approx(total, rel=1e-5)
    assert [row[0] for row in plain] != pytest.approx(total, rel=0.1)


def test_recomputed_layers_are_seen_once() -> None:
    model = decoder()

    def loop(optimizer: optim.Optimizer) -> None:
        with checkpoint_layers(model, every=2):
            train(model, optimizer, 1)

    assert [row[:4] for row in figures(model, loop)] == near([row[:4] for row in figures(decoder())])


def test_what_a_layer_lacks_is_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].requires_grad_(False)  # frozen: no gradient, and nothing that a step could change
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)  # an update of no weights has no ratio
    frozen, zero, plain = figures(model)
    assert frozen[:2] == [None, None]
    assert zero[0] is not None and zero[1] is None
    assert plain[0] > 0 and plain[1] > 0
    assert all(row[2:4] == [None, None] for row in (frozen, zero, plain))


def test_a_layer_that_is_not_called_has_only_weights() -> None:
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def loop(optimizer: optim.Optimizer) -> None:
        model[1](vectors(0)).square().mean().backward()
        optimizer.step()

    skipped, called = figures(model, loop)
    assert skipped == [None, 0.0, None, None, None]
    assert called[4] is not None


@pytest.mark.parametrize("make", [decoder, encoder])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_bit_for_bit(make: Callable[[], nn.Module], every: int) -> None:
    def run(*, monitored: bool) -> tuple[list[Tensor], Tensor]:
        model = make()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)  # of the dropout
        if monitored:
            with TrainingMonitor(model, optimizer, every=every) as monitor:
                train(model, optimizer, 7)
            assert monitor.records
        else:
            train(model, optimizer, 7)
        return list(model.parameters()), torch.get_rng_state()

    (plain, plain_state), (watched, watched_state) = run(monitored=False), run(monitored=True)
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(plain_state, watched_state)


def hooks_of(model: nn.Module, optimizer: optim.Optimizer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) + sum(
        map(len, (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))
    )


@pytest.mark.parametrize("make", [decoder, encoder])
def test_no_hook_is_left_after_the_end_nor_after_an_error(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    before = hooks_of(model, optimizer)
    with pytest.raises(RuntimeError, match="stop"), TrainingMonitor(model, optimizer) as monitor:
        train(model, optimizer, 1)
        assert hooks_of(model, optimizer) > before
        raise RuntimeError("stop")
    assert hooks_of(model, optimizer) == before
    num_records = len(monitor.records)
    monitor.close()  # a second time
    train(model, optimizer, 30)
    assert len(monitor.records) == num_records > 0


def test_copies_of_the_weights_live_for_one_step_only() -> None:
    model = decoder()
    optimizer = optim.SGD(model.parameters(), lr=0.01)

    def alive() -> int:
        train(model, optimizer, 1)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = alive()
    with TrainingMonitor(model, optimizer, every=1):
        assert alive() == before


class Work(TorchDispatchMode):
    """Counts calls of PyTorch's operations, and the numbers they write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.written = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.calls += 1
        self.written += sum(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor))
        return output


def work_of_steps(num_steps: int, *, every: int | None) -> list[tuple[int, int, int]]:
    """Of each step of training a decoder: operations, numbers written, floating-point operations of products."""
    model = decoder(width=64)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    monitor = None if every is None else TrainingMonitor(model, optimizer, every=every)
    steps = []
    for step in range(num_steps):
        with FlopCounterMode(display=False) as flops, Work() as work:
            model(tokens(step, num=8, length=64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append((work.calls, work.written, flops.get_total_flops()))
    if monitor is not None:
        monitor.close()
    return steps


def test_steps_that_are_not_sampled_do_no_work_at_all() -> None:
    plain, watched = work_of_steps(7, every=None), work_of_steps(7, every=3)
    assert [a == b for a, b in zip(plain, watched, strict=True)] == [False, True, True, False, True, True, False]


def test_a_sample_costs_less_than_a_step_so_that_one_in_twenty_costs_less_than_a_twentieth() -> None:
    (_, plain_written, plain_flops), *_ = work_of_steps(1, every=None)
    (_, written, flops), *_ = work_of_steps(1, every=20)
    assert plain_written < written < 2 * plain_written
    assert plain_flops < flops < 1.05 * plain_flops  # products are far rarer still


@pytest.mark.peer
def test_a_model_of_transformers_is_watched_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=HEADS))
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    with TrainingMonitor(model, optimizer) as monitor:
        model(tokens(0), labels=tokens(0)).loss.backward()
        optimizer.step()
    assert monitor.layers == ("transformer.h.0", "transformer.h.1")
    for record in monitor.records:
        assert record.gradient_norm > 0 and record.update_ratio > 0 and abs(record.token_similarity) < 1
        assert record.largest_logit is None


def test_a_biased_op_is_read_with_its_bias() -> None:
    """Equal scores leave ALiBi's own weights, which fall with the distance by the slope of each head."""
    torch.manual_seed(0)
    model = Decoder(VOCAB, WIDTH, 1, lambda: SelfAttention(WIDTH, HEADS, position=ALiBi(HEADS)))
    nn.init.zeros_(model.body.blocks[0].mixer.q_proj.weight)
    ((_, _, logit, entropy, _),) = figures(model)
    weights = [(-slope * torch.arange(n)).softmax(0) for slope in (2**-4, 2**-8) for n in range(2, 10)]
    assert logit == 0
    assert entropy == pytest.approx(sum(float(torch.special.entr(w).sum()) for w in weights) / len(weights), rel=1e-5)


def test_wrong_arguments_are_refused() -> None:
    model = decoder()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    before = hooks_of(model, optimizer)
    with pytest.raises(ArgumentError, match=r"model and optimizer must be.*got SGD and Decoder\. Pass TrainingMonitor"):
        TrainingMonitor(optimizer, model)
    with pytest.raises(ArgumentError, match="every must be positive; got 0"):
        TrainingMonitor(model, optimizer, every=0)
    with pytest.raises(CombinationError, match="optimizer must hold parameters of the model"):
        TrainingMonitor(model, optim.SGD(encoder().parameters(), lr=0.01))
    with pytest.raises(ArgumentError, match=r"layers must hold at least one module; got none"):
        TrainingMonitor(model, optimizer, layers=[])
    with pytest.raises(ArgumentError, match=r"layers must be modules of the model; got a str that is none"):
        TrainingMonitor(model, optimizer, layers=["body.blocks.0"])
    with pytest.raises(ArgumentError, match=r"layers must be modules of the model; got a Linear that is none"):
        TrainingMonitor(model, optimizer, layers=[nn.Linear(2, 2)])
    single = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"Linear has none\. Pass layers=\[\.\.\.\]"):
        TrainingMonitor(single, optim.SGD(single.parameters(), lr=0.01))
    assert hooks_of(model, optimizer) == before


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_not_watched(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """One that runs with gradients before the model itself leaves no trace, and can be copied again."""
    model = decoder()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with TrainingMonitor(model, optimizer, every=1) as monitor:
        other = duplicate(model)
        backward(other, 7)
        assert all(map(torch.equal, saved(other).parameters(), model.parameters()))
        train(model, optimizer, 1)
    assert [record.largest_logit for record in monitor.records] == [row[2] for row in figures(decoder())]
