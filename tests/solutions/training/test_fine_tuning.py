"""Layer-wise rates and gradual unfreezing: which parameter learns how fast, and from which step on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import seeded
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.models.vision import Pool, VisionTransformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.learned import LearnedPositions
from transformer_problems.solutions.residual.unet_skips import UNetSkips
from transformer_problems.solutions.tokens.patch_embedding import PatchEmbedding
from transformer_problems.solutions.training.adam import adam
from transformer_problems.solutions.training.adamw import adamw
from transformer_problems.solutions.training.fine_tuning import GradualUnfreezing, layerwise_learning_rates
from transformer_problems.solutions.training.recipe import TrainingCourse, TrainingRecipe
from transformer_problems.solutions.training.warmup import Warmup

LAYERS = 3
VOCAB, WIDTH = 7, 8


class PlainVision(nn.Module):
    """Of PyTorch's layers; its embedding is a convolution and two bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token, self.positions = (nn.Parameter(torch.randn(1, n, WIDTH)) for n in (1, 5))
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def encoder() -> Encoder:
    def mixer() -> SelfAttention:
        return SelfAttention(WIDTH, 2, is_causal=False)

    return Encoder(VOCAB, WIDTH, LAYERS, mixer, num_outputs=2, position=LearnedPositions(9, WIDTH))


def decoder() -> Decoder:
    return Decoder(VOCAB, WIDTH, LAYERS, lambda: SelfAttention(WIDTH, 2))


def vision(pool: Pool = "class") -> VisionTransformer:
    patches = PatchEmbedding(WIDTH, 2, in_channels=1)
    return VisionTransformer(patches, (4, 4), LAYERS, lambda: SelfAttention(WIDTH, 2, is_causal=False), 2, pool=pool)


def llama(*, tied: bool) -> LlamaDecoder:
    return LlamaDecoder(LlamaConfig(VOCAB, WIDTH, LAYERS, 2, 16, tie_embeddings=tied))


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {  # with what begins embedding and head
    "encoder": (encoder, {"body.embedding", "body.position"}, {"body.norm", "head"}),
    "decoder": (decoder, {"body.embedding"}, {"body.norm"}),
    "llama": (lambda: llama(tied=False), {"embedding"}, {"norm", "head"}),
    "tied llama": (lambda: llama(tied=True), {"embedding"}, {"norm"}),
    "vision": (vision, {"class_tokens", "positions", "patches"}, {"norm", "head"}),
    "pooled vision": (lambda: vision(pool="attention"), {"positions", "patches"}, {"norm", "head", "score"}),
    "plain vision": (PlainVision, {"class_token", "positions", "patches"}, {"norm", "head"}),
}


def build(name: str) -> nn.Module:
    with seeded(0, "model"):
        return MODELS[name][0]()


def example(name: str) -> Tensor:
    return torch.randn(2, 1, 4, 4) if "vision" in name else torch.arange(6).view(2, 3)


def depths(name: str, model: nn.Module) -> dict[str, int]:
    """Each parameter's distance from the top, by its name."""
    _, below, above = MODELS[name]
    found = {}
    for parameter, _ in model.named_parameters():
        if any(parameter.startswith(start) for start in below):
            found[parameter] = LAYERS + 1
        elif any(parameter.startswith(start) for start in above):
            found[parameter] = 0
        else:
            found[parameter] = LAYERS - int(parameter.partition("blocks.")[2].partition(".")[0])
    return found


def rates(model: nn.Module, course: TrainingCourse) -> dict[str, float]:
    by_id = {id(p): group["lr"] for group in course.optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("decay", [1.0, 0.75, 1 / 2.6])
@pytest.mark.parametrize("name", MODELS)
def test_the_rate_falls_by_layer_from_the_top(name: str, decay: float) -> None:
    model = build(name)
    course = TrainingRecipe(adamw(0.01, groups=layerwise_learning_rates(decay))).start(model, 10)
    expected = {parameter: 0.01 * decay**depth for parameter, depth in depths(name, model).items()}
    assert rates(model, course) == pytest.approx(expected, rel=1e-14)  # a product of at most five factors
    held = [p for group in course.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))


def test_the_schedule_multiplies_every_rate() -> None:
    model = build("encoder")
    recipe = TrainingRecipe(adamw(0.01, groups=layerwise_learning_rates(0.5)), schedule=Warmup(4, "constant"))
    course = recipe.start(model, 10)
    at_first = rates(model, course)
    course.step(model(example("encoder")).square().mean())
    assert rates(model, course) == pytest.approx({name: 2 * rate for name, rate in at_first.items()}, rel=1e-14)


def test_the_first_step_of_adam_is_as_long_as_the_rate() -> None:
    """m / sqrt(v) of one gradient is its sign, so each parameter moves by its own rate."""
    model = build("vision").double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    course = TrainingRecipe(adam(0.01, groups=layerwise_learning_rates(0.5))).start(model, 10)
    course.step(model(example("vision").double()).square().sum())
    for name, depth in depths("vision", model).items():
        moved = (model.get_parameter(name).detach() - before[name]).abs().max()
        # epsilon, 1e-8, beside the largest gradients, which are above 1e-4
        assert float(moved) == pytest.approx(0.01 * 0.5**depth, rel=1e-4), name


def test_long_skips_are_not_taken_for_layers() -> None:
    """UNetSkips holds a ModuleList of its own, which follows the layers."""
    model = Encoder(
        VOCAB, WIDTH, 5, lambda: SelfAttention(WIDTH, 2, is_causal=False), skips=UNetSkips(WIDTH, num_layers=5)
    )
    found = rates(model, TrainingRecipe(adamw(1.0, groups=layerwise_learning_rates(0.5))).start(model, 10))
    assert found["body.embedding.weight"] == 0.5**6
    assert found["body.blocks.0.mixer.q_proj.weight"] == 0.5**5
    assert found["body.skips.joins.0.weight"] == found["head.weight"] == 1.0


def test_layers_may_be_named() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    groups = layerwise_learning_rates(0.5, layers=(model[i] for i in (1, 2)))
    for _ in range(2):  # a second model would do as well, were these layers its own
        found = rates(model, TrainingRecipe(adamw(1.0, groups=groups)).start(model, 10))
        assert [found[f"{i}.weight"] for i in range(4)] == [0.125, 0.25, 0.5, 1.0]


def test_a_parameter_of_the_models_own_counts_as_embedding_wherever_it_stands() -> None:
    """PyTorch keeps no order between parameters and modules."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    model.scale = nn.Parameter(torch.ones(()))
    found = rates(model, TrainingRecipe(adamw(1.0, groups=layerwise_learning_rates(0.5))).start(model, 10))
    assert found["scale"] == 0.5**3


def test_layer_1_is_not_layer_10() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(11))})
    found = rates(model, TrainingRecipe(adamw(1.0, groups=layerwise_learning_rates(0.5))).start(model, 10))
    assert [found[f"blocks.{i}.weight"] for i in range(11)] == [0.5 ** (11 - i) for i in range(11)]


def test_layers_that_share_weights_count_as_the_lowest() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"blocks": nn.ModuleList([shared, nn.Linear(3, 3), shared])})
    found = rates(model, TrainingRecipe(adamw(1.0, groups=layerwise_learning_rates(0.5))).start(model, 10))
    assert found["blocks.0.weight"] < found["blocks.1.weight"]


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_more_learns_after_every_so_many_steps(name: str) -> None:
    model, x, depth = build(name), example(name), depths(name, build(name))
    course = TrainingRecipe(adamw(0.01), regulators=(GradualUnfreezing(2),)).start(model, 20)
    reached: set[str] = set()
    course.optimizer.register_step_pre_hook(
        lambda *_: reached.update(n for n, p in model.named_parameters() if p.grad is not None and p.grad.any())
    )
    for step in range(2 * LAYERS + 6):
        reached.clear()
        expected = {parameter for parameter in depth if depth[parameter] <= step // 2}
        assert learning(model) == expected
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        course.step(model(x).square().mean())
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        # the bias of keys shifts all scores of a query alike, which softmax does not notice; weight decay moves it
        assert moved == {n for n in expected if before[n].any() or n in reached}
    assert expected == set(depth)


def test_where_nothing_follows_the_layers_the_last_one_is_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    course = TrainingRecipe(adamw(0.01), regulators=(GradualUnfreezing(1),)).start(model, 20)
    assert learning(model) == {"1.weight", "1.bias"}
    course.step(model(torch.ones(2, 3)).square().mean())
    assert learning(model) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_frozen_layer_has_no_state_until_it_learns() -> None:
    """Adam's averages and its count of steps begin with a layer's first gradient."""
    model, x = build("encoder"), example("encoder")
    course = TrainingRecipe(adamw(0.01), regulators=(GradualUnfreezing(3),)).start(model, 20)
    for _ in range(4):
        course.step(model(x).square().mean())
    state = course.optimizer.state
    counts = {n: int(state[p]["step"]) for n, p in model.named_parameters() if p in state}
    assert {count for name, count in counts.items() if name.startswith("head")} == {4}
    assert {count for name, count in counts.items() if name.startswith("body.blocks.2")} == {1}
    assert not any(name.startswith("body.blocks.1") for name in counts)
    assert len(course.optimizer.state) == len(counts)


def test_gradients_of_zero_would_let_adam_move_frozen_layers_on() -> None:
    """Why they have none: an optimizer whose gradients are zeroed, not cleared, follows its averages and decays."""
    model, x = build("encoder"), example("encoder")
    optimizer, regulate = torch.optim.AdamW(model.parameters(), lr=0.01), GradualUnfreezing(3)

    def steps(*, set_to_none: bool) -> bool:
        """Whether two steps with the head alone move the embedding."""
        before = model.body.embedding.weight.detach().clone()
        for step in range(2):
            regulate(model, step, 20)
            optimizer.zero_grad(set_to_none=set_to_none)
            model(x).square().mean().backward()
            optimizer.step()
        return not torch.equal(model.body.embedding.weight, before)

    regulate(model, 1000, 20)
    model(x).square().mean().backward()
    optimizer.step()
    assert steps(set_to_none=False)
    assert not steps(set_to_none=True)


def test_a_resumed_course_unfreezes_on(tmp_path: Path) -> None:
    """Layer-wise rates and unfreezing together, through a file, bit by bit."""
    groups = layerwise_learning_rates(0.5)
    recipe = TrainingRecipe(adamw(0.01, groups=groups), schedule=Warmup(3), regulators=(GradualUnfreezing(2),))
    straight, resumed, x = build("encoder"), build("encoder"), example("encoder")
    course = recipe.start(straight, 8)
    for step in range(8):
        if step == 5:
            torch.save([straight.state_dict(), course.state_dict()], tmp_path / "course.pt")
        course.step(straight(x).square().mean())
    course = recipe.start(resumed, 8)
    weights, state = torch.load(tmp_path / "course.pt", weights_only=True)
    resumed.load_state_dict(weights)
    course.load_state_dict(state)
    for _ in range(3):
        course.step(resumed(x).square().mean())
    assert learning(resumed) == learning(straight)
    assert all(map(torch.equal, resumed.parameters(), straight.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layerwise_learning_rates(0.0), "decay must be positive; got 0.0"),
        (lambda: layerwise_learning_rates(1.1), "decay must be a share from 0 to 1; got 1.1"),
        (lambda: GradualUnfreezing(0), "steps_per_layer must be positive; got 0"),
        (lambda: GradualUnfreezing(1.5), "steps_per_layer must be a positive whole number; got 1.5"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_model_without_layers_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="model must have a ModuleList"):
        TrainingRecipe(adamw(0.01, groups=layerwise_learning_rates())).start(model, 10)
    with pytest.raises(ArgumentError, match="model must have a ModuleList"):
        TrainingRecipe(adamw(0.01), regulators=(GradualUnfreezing(5),)).start(model, 10)
    with pytest.raises(ArgumentError, match="layers must be modules of the model"):
        GradualUnfreezing(5, layers=[nn.Linear(2, 2)])(model, 0, 10)
