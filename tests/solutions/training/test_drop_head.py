"""DropHead: the statistics of what it draws, what it keeps, and the schedule of its rate."""

import math

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.seeding import seeded
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.flash import FlashAttention
from transformer_problems.solutions.attention.packing import PackedAttention, run_packed
from transformer_problems.solutions.attention.performer import Performer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.drop_head import DropHead, DropHeadSchedule
from transformer_problems.solutions.training.recipe import TrainingRecipe
from transformer_problems.testing import check_attention_op, check_mixer

OPS = {"dense": DenseAttention, "flash": FlashAttention, "window": lambda: SlidingWindow(5)}
HEADS = 4
SIGMAS = 4.5  # a fair draw strays so far once in 150,000 tests


def draw(length: int, *, batch: int = 2, num_kv_heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(batch, HEADS, length, 8), (batch, num_kv_heads, length, 8), (batch, num_kv_heads, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def ones(rate: float, *, batch: int, num_heads: int = HEADS) -> Tensor:
    """What DropHead makes of heads whose output is one, [B, H]."""
    x = torch.ones(batch, num_heads, 1, 1, dtype=torch.float64)
    with seeded(0, "heads"):
        return DropHead(rate=rate)(x, x, x)[..., 0, 0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_whole_heads_times_factors_in_outputs_and_gradients(op: str, is_causal: bool, length: int) -> None:
    inner, inputs = OPS[op](), draw(length, batch=6)
    with seeded(3, "heads"):
        found = DropHead(inner, rate=0.5)(*inputs, is_causal=is_causal)
    plain = inner(*inputs, is_causal=is_causal)
    kept = (found != 0).flatten(-2).any(dim=-1)  # [B, H]
    assert (kept.sum(dim=-1) >= 1).all()
    assert (kept.sum(dim=-1) < HEADS).any()
    expected = plain * (kept * HEADS / kept.sum(dim=-1, keepdim=True))[..., None, None]
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (found, expected)]
    # float64 sums of 101 terms, in the same order
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_gradcheck_with_grouped_heads() -> None:
    inputs, op = draw(5, num_kv_heads=2), DropHead(rate=0.5)

    def run(*qkv: Tensor) -> Tensor:
        with seeded(0, "the same heads each time"):
            return op(*qkv)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("op", OPS)
def test_in_evaluation_it_is_the_op_inside_in_bits(op: str) -> None:
    inputs, inner = draw(33), OPS[op]()
    before = torch.get_rng_state()
    for wrapped in (DropHead(inner, rate=0.9).eval(), DropHead(inner, rate=0.0)):
        assert torch.equal(wrapped(*inputs), inner(*inputs))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is dropped"


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_each_head_is_dropped_at_the_rate(rate: float) -> None:
    """But for one in H of the examples that would lose all: rate - rate^H / H."""
    num_examples = 20_000
    dropped = (ones(rate, batch=num_examples) == 0).sum(dim=0)
    chance = rate - rate**HEADS / HEADS
    deviation = math.sqrt(num_examples * chance * (1 - chance))
    assert ((dropped - num_examples * chance).abs() < SIGMAS * deviation).all()


def test_heads_are_dropped_independently() -> None:
    """The number of dropped heads is binomial, where the few examples that would lose all are set aside."""
    num_examples, rate = 20_000, 0.3
    counts = (ones(rate, batch=num_examples) == 0).sum(dim=-1)
    chances = [math.comb(HEADS, n) * rate**n * (1 - rate) ** (HEADS - n) for n in range(HEADS + 1)]
    chances[HEADS - 1 :] = [sum(chances[HEADS - 1 :])]  # they keep one
    for number, chance in enumerate(chances):
        deviation = math.sqrt(num_examples * chance * (1 - chance))
        assert abs((counts == number).sum().item() - num_examples * chance) < SIGMAS * deviation


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_the_mean_output_of_each_head_is_what_it_is_in_evaluation(rate: float) -> None:
    outputs = ones(rate, batch=20_000)
    deviation = outputs.std(dim=0) / math.sqrt(len(outputs))
    assert ((outputs.mean(dim=0) - 1).abs() < SIGMAS * deviation).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_heads", [1, 2, 3, 8])
def test_the_sum_over_heads_keeps_its_size_in_every_example(rate: float, num_heads: int) -> None:
    sums = ones(rate, batch=500, num_heads=num_heads).sum(dim=-1)
    torch.testing.assert_close(sums, torch.full_like(sums, num_heads))


def test_at_rate_1_one_head_is_left_and_any_may_be() -> None:
    outputs = ones(1.0, batch=500)
    assert ((outputs == 0).sum(dim=-1) == HEADS - 1).all()
    assert (outputs > 0).any(dim=0).all()


def test_all_tokens_of_an_example_and_all_leading_dimensions_have_their_draws() -> None:
    q = torch.ones(3, 200, HEADS, 7, 2)
    with seeded(0, "heads"):
        y = DropHead(rate=0.5)(q, q, q)
    assert (y == y[..., :1, :1]).all()
    assert len(y[..., 0, 0].flatten(0, 1).unique(dim=0)) > 2**HEADS / 2


def test_draws_come_from_the_global_generator() -> None:
    inputs, op = draw(9, batch=50), DropHead(rate=0.5)

    def run(seed: int) -> Tensor:
        with seeded(seed, "heads"):
            return op(*inputs)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(op(*inputs), op(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    x = torch.ones(64, HEADS, 3, 8, dtype=dtype)
    y = DropHead(rate=0.5)(x, x, x)
    assert y.dtype == dtype
    # the factors 4/3, 2 and 4, rounded to the dtype's step at 1
    known = torch.tensor([0, 1, 4 / 3, 2, 4], dtype=dtype)
    assert set(y.unique().tolist()) <= set(known.tolist())


def test_it_streams_in_evaluation_and_drops_in_training() -> None:
    op = DropHead(Performer(8, num_features=16), rate=0.5)
    check_attention_op(DropHead(Performer(8, num_features=16), rate=0.5).eval())
    check_mixer(SelfAttention(32, 4, op=op), embed_dim=32)
    q, k, v = draw(9, batch=20)
    with seeded(0, "heads"):
        y, _ = op.stream(q, k, v, op.initial_state(20))
    kept = (y != 0).flatten(-2).any(dim=-1)
    assert not kept.all()
    assert (kept.sum(dim=-1) >= 1).all()


def test_inside_packing_each_sequence_has_its_own_draws() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, op=PackedAttention(DropHead(rate=0.9)), is_causal=False)
    key_mask = torch.ones(50, 3, dtype=torch.bool)
    x = torch.randn(1, 3, 16).expand(50, 3, 16)
    assert len(run_packed(layer, x, key_mask=key_mask)[:, 0].unique(dim=0)) > 1


PEAK = 0.4


@pytest.mark.parametrize(
    ("num_warmup_steps", "num_steps", "rates"),
    [
        (20, 101, {0: 0.4, 5: 0.3, 10: 0.2, 20: 0.0, 40: 0.1, 60: 0.2, 100: 0.4, 101: 0.4, 500: 0.4}),
        (None, 201, {0: 0.4, 10: 0.2, 20: 0.0, 110: 0.2, 200: 0.4}),  # a tenth
        (0, 12, {0: 0.4, 1: 0.0, 6: 0.2, 11: 0.4}),  # a fall within one step
        (None, 7, {0: 0.4, 1: 0.0, 6: 0.4}),  # of which a tenth is less than a step
        (8, 5, {0: 0.4, 2: 0.2, 3: 0.1, 4: 0.4, 100: 0.4}),  # a training shorter than its warmup
        (4, 5, {0: 0.4, 2: 0.2, 4: 0.4, 5: 0.4}),
        (None, 2, {0: 0.4, 1: 0.4}),
        (None, 1, {0: 0.4, 1: 0.4}),
    ],
)
def test_known_rates(num_warmup_steps: int | None, num_steps: int, rates: dict[int, float]) -> None:
    schedule = DropHeadSchedule(PEAK, num_warmup_steps)
    # one division and one product in float64
    assert {step: schedule.rate(step, num_steps) for step in rates} == pytest.approx(rates, abs=1e-15)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(8, 2, op=DropHead()) for _ in range(3))
        self.plain = SelfAttention(8, 2)

    def rates(self) -> list[float]:
        return [layer.op.rate for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.plain):
            x = x + layer(x)
        return x


def test_a_course_sets_the_rate_of_every_layer_at_every_step() -> None:
    torch.manual_seed(0)
    model, schedule = Model(), DropHeadSchedule(PEAK, 3)
    course = TrainingRecipe(adam(1e-3), regulators=(schedule,)).start(model, num_steps=9)
    for step in range(11):
        assert model.rates() == [schedule.rate(step, 9)] * 3
        course.step(model(torch.randn(2, 5, 8)).square().mean())


def test_a_resumed_course_has_the_rate_of_its_step() -> None:
    torch.manual_seed(0)
    recipe = TrainingRecipe(adam(1e-3), regulators=(DropHeadSchedule(PEAK, 3),))
    model, other = Model(), Model()
    course = recipe.start(model, num_steps=9)
    course.step(model(torch.randn(2, 5, 8)).square().mean())
    recipe.start(other, num_steps=9).load_state_dict(course.state_dict())
    assert other.rates() == model.rates() == pytest.approx([PEAK * 2 / 3] * 3)


def test_a_whole_decoder_trains_with_it() -> None:
    torch.manual_seed(0)
    model = Decoder(11, 16, 2, lambda: SelfAttention(16, 4, op=DropHead()))
    course = TrainingRecipe(adam(1e-2), regulators=(DropHeadSchedule(0.5, 5),)).start(model, num_steps=40)
    tokens = torch.arange(11).repeat(8, 2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        course.step(loss)
    assert losses[-1] < losses[0] / 2
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_bad_arguments_are_refused() -> None:
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ArgumentError, match=f"rate must be a share from 0 to 1; got {rate}"):
            DropHead(rate=rate)
        with pytest.raises(ArgumentError, match=f"peak must be a share from 0 to 1; got {rate}"):
            DropHeadSchedule(rate)
    with pytest.raises(ArgumentError, match="num_warmup_steps must not be negative; got -1"):
        DropHeadSchedule(0.2, -1)
    with pytest.raises(CombinationError, match=r"Linear has no DropHead whose rate could be set. Build .*op=DropHead"):
        DropHeadSchedule(0.2)(nn.Linear(2, 2), 0, 10)
