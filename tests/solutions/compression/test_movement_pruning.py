"""Movement pruning: its scores on paper, the gradients of its masks, its schedule, and what magnitude gets wrong."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int8 import QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.movement_pruning import MovementPruning
from transformer_problems.solutions.compression.sparse_linear import SparseLinear
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.recipe import TrainingRecipe

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False))


def doubles(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one_layer(row: list[float]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(len(row), 1, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(doubles(*row))
    return model


def sgd(learning_rate: float) -> TrainingRecipe:
    return TrainingRecipe(lambda model: torch.optim.SGD(model.parameters(), lr=learning_rate))


def test_scores_on_paper() -> None:
    """L = w x with x = (1, -2, 4), so dL/dW' = x always; half of the four weights leave after the first of two steps.

    Step 1, none left out: S = -0.1 * x * w and w goes to w - 0.1 x. Step 2, the lowest two of S left out: they stay,
    while all scores go on with the weights as they are.
    """
    x = doubles(1.0, -2.0, 4.0, 1.0)
    pruning = MovementPruning(0.5, warmup=0.0, cooldown=0.5)
    model = pruning(one_layer([2.0, 1.0, -1.0, -3.0]))
    recipe = TrainingRecipe(sgd(0.1).optimizer, regulators=(pruning.regulate,))
    course = recipe.start(model, num_steps=2)
    layer = model[0]
    assert layer.keep.all()
    course.step(model(x).sum())
    # float64 sums of a few products
    close = {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(layer.scores, doubles(-0.2, 0.2, 0.4, 0.3), **close)
    torch.testing.assert_close(layer.weight, doubles(1.9, 1.2, -1.4, -3.1), **close)
    assert layer.keep.tolist() == [[False, False, True, True]]
    course.step(model(x).sum())
    # -0.2 - 0.1 * 1.9, 0.2 + 0.2 * 1.2, 0.4 + 0.4 * 1.4, 0.3 + 0.1 * 3.1
    torch.testing.assert_close(layer.scores, doubles(-0.39, 0.44, 0.96, 0.61), **close)
    torch.testing.assert_close(layer.weight, doubles(1.9, 1.2, -1.8, -3.2), **close)
    torch.testing.assert_close(pruning.finish(model)[0].weight, doubles(0.0, 0.0, -1.8, -3.2), **close)


def test_gradients_follow_the_straight_through_rule() -> None:
    torch.manual_seed(0)
    model = MovementPruning(0.5)(nn.Sequential(nn.Linear(6, 5).double(), nn.Tanh(), nn.Linear(5, 3).double()))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.scores)
        layer.select(0.5)
        assert layer.keep.sum() == layer.keep.numel() - layer.keep.numel() // 2
        assert layer.scores[~layer.keep].max() < layer.scores[layer.keep].min()
    x = torch.randn(4, 6, dtype=torch.float64)
    used = [(layer.weight * layer.keep).detach().requires_grad_() for layer in (model[0], model[2])]
    expected = torch.tanh(x @ used[0].T + model[0].bias) @ used[1].T + model[2].bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(expected)
    by_used = torch.autograd.grad((expected * cotangent).sum(), used)
    (model(x) * cotangent).sum().backward()
    for layer, gradient in zip((model[0], model[2]), by_used, strict=True):
        torch.testing.assert_close(layer.scores.grad, gradient * layer.weight, rtol=0, atol=1e-13)
        torch.testing.assert_close(layer.weight.grad, gradient * layer.keep, rtol=0, atol=1e-13)


def test_what_was_left_out_comes_back() -> None:
    pruning = MovementPruning(0.5)
    model = pruning(one_layer([1.0, 1.0]))
    layer = model[0]
    with torch.no_grad():
        layer.scores.copy_(doubles(0.5, 0.0))
    pruning.regulate(model, 100, 100)
    assert layer.keep.tolist() == [[True, False]]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(doubles(1.0, -1.0)).sum().backward()  # the first shrinks, the second would grow
    optimizer.step()
    pruning.regulate(model, 101, 100)
    assert layer.keep.tolist() == [[False, True]]


def test_large_weights_that_shrink_leave_and_small_ones_that_grow_stay() -> None:
    """The task before needed the first half of the inputs; the new one needs the second half, and has little time."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 8, dtype=torch.float64)
    targets = inputs @ torch.tensor([0.0] * 4 + [0.5] * 4, dtype=torch.float64)[:, None]
    trained = one_layer([1.0] * 4 + [0.05] * 4)

    def loss(model: nn.Module) -> Tensor:
        return (model(inputs) - targets).square().mean()

    pruning = MovementPruning(0.5, warmup=0.5)
    model = pruning(trained)
    course = TrainingRecipe(sgd(0.01).optimizer, regulators=(pruning.regulate,)).start(model, num_steps=40)
    for _ in range(40):
        course.step(loss(model))
    by_movement = pruning.finish(model)
    tuned = one_layer([1.0] * 4 + [0.05] * 4)
    plain = sgd(0.01).start(tuned, num_steps=40)
    for _ in range(40):
        plain.step(loss(tuned))
    by_magnitude = MagnitudePruning(0.5)(tuned)
    assert by_movement[0].keep.tolist() == [[False] * 4 + [True] * 4]
    assert by_magnitude[0].keep.tolist() == [[True] * 4 + [False] * 4]
    assert loss(by_movement) < loss(by_magnitude) / 4


@pytest.mark.parametrize(
    ("warmup", "cooldown", "shares"),
    [
        (0.1, 0.2, {0: 0.0, 10: 0.0, 45: 0.7, 80: 0.8, 99: 0.8, 100: 0.8, 300: 0.8}),  # 0.8 * (1 - 1 / 8) half-way
        (0.0, 0.0, {0: 0.0, 50: 0.7, 75: 0.7875, 100: 0.8}),
        (0.5, 0.0, {0: 0.0, 50: 0.0, 75: 0.7, 100: 0.8}),
    ],
)
def test_known_shares(warmup: float, cooldown: float, shares: dict[int, float]) -> None:
    pruning = MovementPruning(0.8, warmup=warmup, cooldown=cooldown)
    # a few roundings in float64
    assert {step: pruning.sparsity_at(step, 100) for step in shares} == pytest.approx(shares, abs=1e-15)


def test_a_course_raises_the_share_and_the_finished_model_holds_real_zeros(tmp_path: Path) -> None:
    trained = encoder()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    pruning = MovementPruning(0.7, skip=("head",))
    model = pruning(trained)
    course = TrainingRecipe(adam(1e-2), regulators=(pruning.regulate,)).start(model, num_steps=20)
    layer = model.body.blocks[1].feed_forward.up
    losses = []
    for step in range(20):
        assert (~layer.keep).sum() == int(pruning.sparsity_at(step, 20) * layer.keep.numel())
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        losses.append(loss.item())
        course.step(loss)
    assert losses[-1] < losses[0]
    finished = pruning.finish(model)
    assert torch.equal(finished(TOKENS), model(TOKENS)), "the last steps were made with the full share"
    for part in finished.modules():
        if isinstance(part, SparseLinear):
            assert (part.weight == 0).sum() == int(0.7 * part.weight.numel())
    assert isinstance(finished.body.blocks[0].mixer.q_proj, SparseLinear)
    assert not isinstance(finished.head, SparseLinear)
    assert not any("scores" in name for name in finished.state_dict())
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)
    for number, made in enumerate((model, finished)):
        save_treated(made, tmp_path / f"{number}.safetensors")
        assert torch.equal(load_treated(tmp_path / f"{number}.safetensors", encoder(1), pruning)(TOKENS), made(TOKENS))


def test_finishing_early_gives_the_full_share() -> None:
    pruning = MovementPruning(0.7)
    model = pruning(encoder())
    course = TrainingRecipe(adam(1e-2), regulators=(pruning.regulate,)).start(model, num_steps=100)
    course.step(model(TOKENS).logsumexp(-1).mean())
    layer, scores = pruning.finish(model).head, model.head.scores
    assert model.head.keep.all()
    assert (~layer.keep).sum() == int(0.7 * layer.keep.numel())
    assert scores[~layer.keep].max() <= scores[layer.keep].min()


def test_a_resumed_course_goes_on_in_bits() -> None:
    pruning = MovementPruning(0.7)
    recipe = TrainingRecipe(adam(1e-2), regulators=(pruning.regulate,))

    def steps(course, number: int) -> None:
        for _ in range(number):
            course.step(course.model(TOKENS).logsumexp(-1).mean())

    whole = recipe.start(pruning(encoder()), num_steps=12)
    steps(whole, 12)
    first = recipe.start(pruning(encoder()), num_steps=12)
    steps(first, 5)
    second = recipe.start(pruning(encoder(1)), num_steps=12)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    steps(second, 7)
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_scores_of_half_precision_weights_are_float32() -> None:
    model = MovementPruning(0.5)(nn.Sequential(nn.Linear(8, 4, dtype=torch.bfloat16)))
    y = model(torch.randn(3, 8, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert (y.dtype, model[0].scores.dtype, model[0].weight.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )


def test_a_shared_layer_learns_one_choice() -> None:
    layer = nn.Linear(4, 4)
    pruning = MovementPruning(0.5)
    model = pruning(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert model["a"] is model["b"][0]
    nn.init.normal_(model["a"].scores)
    finished = pruning.finish(model)
    assert finished["a"] is finished["b"][0]


def test_transforms_of_weights_do_not_take_what_still_learns() -> None:
    model = MovementPruning(0.5)(nn.Sequential(nn.Linear(4, 4)))
    for transform in (MagnitudePruning(0.5), QuantizeInt8(), LoRA(rank=2), MovementPruning(0.5)):
        with pytest.raises(ArgumentError, match=r"model must hold (a torch.nn.Linear|linear layers)"):
            transform(model)


def test_bad_arguments_are_refused() -> None:
    for share in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match=f"sparsity must be a share from 0 to below 1; got {share}"):
            MovementPruning(share)
    with pytest.raises(ArgumentError, match="warmup must be a share from 0 to 1; got -0.1"):
        MovementPruning(0.5, warmup=-0.1)
    with pytest.raises(ArgumentError, match="warmup and cooldown must leave steps between them; got 0.5 and 0.5"):
        MovementPruning(0.5, warmup=0.5, cooldown=0.5)
    with pytest.raises(ArgumentError, match="must hold a torch.nn.Linear"):
        MovementPruning(0.5)(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(ArgumentError, match="unknown layer to skip 'head'. Known: 0."):
        MovementPruning(0.5, skip=("head",))(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ArgumentError, match="weights must be finite; 0.weight holds NaN"):
        MovementPruning(0.5)(one_layer([1.0, float("nan")]))
    tied = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ArgumentError, match="head and embedding share theirs"):
        MovementPruning(0.5)(tied)
    with pytest.raises(CombinationError, match="codes keep no float weights to rank"):
        MovementPruning(0.5)(QuantizeInt8()(nn.Sequential(nn.Linear(4, 4))))
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ArgumentError, match="model must have been trained, .* all of them are zero. Make the optimizer"
    ):
        MovementPruning(0.5).finish(MovementPruning(0.5)(plain))
    for call in (lambda: MovementPruning(0.5).regulate(plain, 0, 10), lambda: MovementPruning(0.5).finish(plain)):
        with pytest.raises(
            CombinationError, match="Sequential learns no scores for its weights. Train and finish what"
        ):
            call()
