"""The three forms of clipping against PyTorch and the formula, and under planted spikes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.solutions.training.clipping import ClippingMethod, GradientClipping
from transformer_problems.solutions.training.recipe import Clipping, no_clipping

METHODS: tuple[ClippingMethod, ...] = ("norm", "value", "adaptive")
SHAPES = [(), (5,), (4, 3), (64, 1), (2, 3, 4, 5)]


def draw(scale: float) -> list[nn.Parameter]:
    """Parameters of all kinds of shapes, with gradients of about that size; one has none."""
    draws = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=draws)) for s in SHAPES]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, dtype=torch.float64, generator=draws)
    return [*parameters, nn.Parameter(torch.ones(2, dtype=torch.float64))]


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def by_the_formula(parameters: list[nn.Parameter], limit: float) -> list[Tensor]:
    """Brock et al., equation 3, unit by unit: G_i limit max(|W_i|, eps) / |G_i| where |G_i| is above that."""
    clipped = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient, weights = parameter.grad.clone(), parameter.detach()
        units = [(gradient[i], weights[i]) for i in range(len(weights))] if weights.dim() > 1 else [(gradient, weights)]
        for g, w in units:
            largest = limit * max(float(w.square().sum().sqrt()), 1e-3)
            size = float(g.square().sum().sqrt())
            if size > largest:
                g.mul_(largest / size)
        clipped.append(gradient)
    return clipped


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("limit", [0.01, 1.0])
@pytest.mark.parametrize(
    ("method", "reference"),
    [("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)],
)
def test_equals_pytorchs(method: ClippingMethod, reference: Callable, limit: float, scale: float) -> None:
    ours, theirs = draw(scale), draw(scale)
    whole = torch.cat([g.flatten() for g in gradients(ours)]).norm()
    norm = GradientClipping(limit, method)(ours)
    reference(theirs, limit)
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))
    torch.testing.assert_close(norm, whole, atol=0, rtol=1e-14)  # the same float64 sum in another order


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_adaptive_equals_the_formula(limit: float, scale: float) -> None:
    parameters = draw(scale)
    expected = by_the_formula(parameters, limit)
    whole = torch.cat([g.flatten() for g in gradients(parameters)]).norm()
    norm = GradientClipping(limit, "adaptive")(parameters)
    # float64 rounding, relative to numbers of any size
    torch.testing.assert_close(gradients(parameters), expected, atol=0, rtol=1e-14)
    torch.testing.assert_close(norm, whole, atol=0, rtol=1e-14)


def test_adaptive_lets_weights_of_zero_learn() -> None:
    zeros = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    zeros.grad = torch.ones(2, 3, dtype=torch.float64)
    GradientClipping(0.1, "adaptive")([zeros])
    # 0.1 times the smallest norm that limits, 1e-3
    torch.testing.assert_close(zeros.grad.norm(dim=1), torch.full((2,), 1e-4, dtype=torch.float64), atol=0, rtol=1e-14)


def test_adaptive_holds_down_the_spiked_unit_alone() -> None:
    (parameter,) = draw(1e-3)[2:3]
    before = parameter.grad.clone()
    parameter.grad[1] *= 1e6
    GradientClipping(0.05, "adaptive")([parameter])
    assert torch.equal(parameter.grad[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(parameter.grad[1].norm(), 0.05 * parameter.detach()[1].norm(), atol=0, rtol=1e-14)
    assert torch.nn.functional.cosine_similarity(parameter.grad[1], before[1], dim=0) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_within_the_limit_stays_as_it_is(method: ClippingMethod) -> None:
    parameters = draw(1e-6)
    before = gradients(parameters)
    GradientClipping(1.0, method)(parameters)
    assert all(map(torch.equal, gradients(parameters), before))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_where_it_is(method: ClippingMethod, value: float) -> None:
    parameters = draw(1.0)
    parameters[2].grad[1, 1] = value
    before = gradients(parameters)
    assert not GradientClipping(0.01, method)(parameters).isfinite()
    torch.testing.assert_close(gradients(parameters), before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_gradients_have_none_to_clip(method: ClippingMethod) -> None:
    assert GradientClipping(1.0, method)([nn.Parameter(torch.ones(2))]) == 0


def train(clipping: Clipping) -> float:
    """Error at the end of gradient descent on a line, where every tenth gradient is a thousand times too large."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 1, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(200):
        x = torch.randn(32, 4, dtype=torch.float64, generator=draws)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        (1000 * loss if step % 10 == 9 else loss).backward()
        clipping(list(model.parameters()))
        optimizer.step()
    return float((model.weight.detach() - 1).norm())


@pytest.mark.parametrize("method", METHODS)
def test_planted_spikes_no_longer_throw_the_model_off(method: ClippingMethod) -> None:
    start, unclipped = 1.0, train(no_clipping)  # four weights of 0.5 that should be 1
    assert unclipped > 100 * start
    assert train(GradientClipping(0.5, method)) < 0.1 * start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "limit must be positive; got 0.0"),
        ((-1.0,), "limit must be positive; got -1.0"),
        (("1",), "limit must be a positive number; got '1'"),
        ((1.0, "norms"), "unknown clipping method 'norms'. Nearest: norm"),
    ],
)
def test_bad_arguments_are_refused(arguments, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GradientClipping(*arguments)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e25), (torch.float32, 1e37), (torch.float16, 1e4)])
@pytest.mark.parametrize("method", METHODS)
def test_finite_gradients_whose_norm_overflows_are_clipped(
    method: ClippingMethod, dtype: torch.dtype, scale: float
) -> None:
    """As in float64, where nothing overflows."""
    parameters, exact = [nn.Parameter(torch.ones(20, 20, dtype=dtype))], [nn.Parameter(torch.ones(20, 20).double())]
    signs = torch.randint(0, 2, (20, 20), generator=torch.Generator().manual_seed(0)) * 2 - 1
    parameters[0].grad = (scale * signs).to(dtype)
    exact[0].grad = parameters[0].grad.double()
    assert not nn.utils.get_total_norm(gradients(parameters)).isfinite()
    norm = GradientClipping(0.5, method)(parameters)
    torch.testing.assert_close(norm, GradientClipping(0.5, method)(exact), atol=0, rtol=1e-14)
    # one rounding to the dtype
    step = float(torch.finfo(dtype).eps)
    torch.testing.assert_close(parameters[0].grad.double(), exact[0].grad, atol=0, rtol=step)
