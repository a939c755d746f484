"""Transfer of weights and the linear probe: what is copied, what rests, what is undone."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.core.seeding import seeded
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.recipe import TrainingRecipe
from transformer_problems.solutions.training.transfer import linear_probe, transfer_weights


def build(num_outputs: int, *, seed: int = 0, layers: int = 2, dtype: torch.dtype | None = None) -> Encoder:
    with seeded(seed, "model"):
        return Encoder(
            11,
            8,
            layers,
            lambda: SelfAttention(8, 2, is_causal=False, dtype=dtype),
            num_outputs=num_outputs,
            dtype=dtype,
        )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_everything_but_another_head_is_copied() -> None:
    source, target = build(11), build(3, seed=1)
    given, before = state(source), state(target)
    report = transfer_weights(source, target)
    assert report.other_shape == ("head.weight", "head.bias")
    assert report.copied == tuple(name for name in before if name.startswith("body."))
    assert report.new == report.skipped == ()
    after = state(target)
    assert all(torch.equal(after[name], given[name]) for name in report.copied)
    assert all(torch.equal(after[name], before[name]) for name in report.other_shape)
    assert all(map(torch.equal, given.values(), state(source).values()))
    x = torch.arange(9)[None]
    assert torch.equal(source.body(x), target.body(x))


def test_layers_that_the_source_has_not_are_new() -> None:
    source, target = build(3), build(3, seed=1, layers=3)
    before = state(target)
    report = transfer_weights(source, target)
    assert report.new == tuple(name for name in before if name.startswith("body.blocks.2."))
    assert set(report.copied) | set(report.new) == set(before)
    assert all(torch.equal(state(target)[name], before[name]) for name in report.new)


@pytest.mark.parametrize("skip", [["head"], ["head.weight", "head.bias"], ("body.norm", "body.blocks.1", "head")])
def test_what_is_skipped_stays(skip: list[str]) -> None:
    source, target = build(3), build(3, seed=1)
    before = state(target)
    report = transfer_weights(source, target, skip=skip)
    assert report.skipped == tuple(n for n in before if any(n == s or n.startswith(f"{s}.") for s in skip))
    assert all(torch.equal(state(target)[name], before[name]) for name in report.skipped)
    assert all(torch.equal(state(target)[name], state(source)[name]) for name in report.copied)
    assert len(report.skipped) + len(report.copied) == len(before)


def test_a_name_is_skipped_whole() -> None:
    """`layer1` is not `layer10`."""
    source, target = (nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in (1, 10)}) for _ in range(2))
    report = transfer_weights(source, target, skip=["layer1"])
    assert report.copied == ("layer10.weight", "layer10.bias")


def test_buffers_are_copied_too() -> None:
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    report = transfer_weights(source, target)
    assert report.copied == ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert all(map(torch.equal, state(source).values(), state(target).values()))


def test_values_take_the_targets_dtype_and_memory_of_their_own() -> None:
    source, target = build(3, dtype=torch.float64), build(3, seed=1, dtype=torch.bfloat16)
    parameters = list(target.parameters())
    transfer_weights(source, target)
    assert all(p is q for p, q in zip(parameters, target.parameters(), strict=True))
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(parameters, source.parameters(), strict=True))
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    same = build(3, seed=2, dtype=torch.float64)
    transfer_weights(source, same)
    with torch.no_grad():
        same.head.bias.add_(1.0)
    assert not torch.equal(same.head.bias, source.head.bias)


def test_models_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(ArgumentError, match="source and target must share a name and shape; Linear and Encoder share"):
        transfer_weights(nn.Linear(2, 2), build(3))
    target = build(3)
    with pytest.raises(ArgumentError, match="share none that is not skipped"):
        transfer_weights(build(3), target, skip=["body", "head"])
    before = state(target)
    with pytest.raises(UnknownNameError, match=r"unknown part of the target 'body\.block'\. Nearest: body\.blocks"):
        transfer_weights(build(3, seed=1), target, skip=["body.block"])
    assert all(map(torch.equal, state(target).values(), before.values()))


class Convolutional(nn.Module):
    """Dropout and batch norm as modules, dropout in the forward pass itself, and a head with a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 2))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.features(x), 0.5, self.training))


def make() -> Convolutional:
    with seeded(0, "model"):
        return Convolutional()


def test_only_the_head_learns() -> None:
    model, x = make().train(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    before = state(model)
    with linear_probe(model, model.head):
        course = TrainingRecipe(adamw(0.1, weight_decay=0.5)).start(model, 5)
        for _ in range(5):
            model.train()  # as loops do at the start of an epoch
            course.step(model(x).square().mean())
            assert all(p.grad is None for p in model.body.parameters())
    after = state(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize("run", [lambda m, x: m.features(x), lambda m, x: m(x)], ids=["a part", "the whole"])
def test_frozen_parts_compute_as_in_evaluation(run: Callable[[Convolutional, Tensor], Tensor]) -> None:
    model, x = make(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    model.head[0].p = 0.0
    with torch.no_grad():
        expected, other = run(model.eval(), x), run(model.train(), x)
    assert not torch.equal(expected, other)
    model.body[1].reset_running_stats()
    with linear_probe(model, model.head):
        assert torch.equal(run(model.train(), x), expected)
        assert torch.equal(run(model.eval(), x), expected)


def test_the_heads_own_dropout_works_on_in_training() -> None:
    model, x = make(), torch.ones(2, 4)
    with linear_probe(model, model.head), seeded(0, "dropout"):
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("mode", [True, False])
def test_all_is_undone_also_after_an_error(mode: bool) -> None:
    model = make().train(mode)
    model.body[0].bias.requires_grad_(False)
    model.body[2].eval()
    before = ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    with pytest.raises(RuntimeError), linear_probe(model, model.head):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
        model(torch.ones(2, 5))  # of another width, so the pass ends within the body
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_mode_that_the_loop_sets_inside_is_kept() -> None:
    model = make().train()
    with linear_probe(model, model.head):
        model(torch.ones(2, 4))
        assert all(module.training for module in model.modules())
        model.eval()
    assert not any(module.training for module in model.modules())


def test_a_model_may_call_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = make(), nn.Linear(2, 2)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            if again:
                self(x, again=False)
            return self.head(nn.functional.dropout(self.inner(x), 0.5, self.training))

    model, x = Twice().train(), torch.ones(2, 4)
    with linear_probe(model, model.head):
        assert torch.equal(model(x), model(x))
    assert all(module.training for module in model.modules())


def test_what_is_no_head_is_refused() -> None:
    model = make()
    for head in (model, nn.Linear(8, 2)):
        with pytest.raises(ArgumentError, match="head must be a module inside the model"), linear_probe(model, head):
            pass
    with pytest.raises(ArgumentError, match="head must have param"), linear_probe(model, model.body[2]):
        pass
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_drops_out_again_and_stays_frozen(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = make().train(), torch.ones(2, 4)
    with linear_probe(model, model.head):
        other = duplicate(model)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    other.train()
    with seeded(0, "dropout"):
        assert not torch.equal(other.features(x), other.features(x))
