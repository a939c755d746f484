"""What an encoder knows of order: nothing without positions, and how much with each encoding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_problems.core.records import Measurement, Scale
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.core.summaries import Arm, Chart, Column
from transformer_problems.lab.data.sentences import NUM_ANSWERS, VOCAB_SIZE, Questions, which_comes_first, who_did_what
from transformer_problems.lab.data.text import held_out_windows, load_text, sample_windows
from transformer_problems.lab.effects import Effect
from transformer_problems.lab.experiment import Bench
from transformer_problems.lab.masking import MASK_TOKEN, mask_bytes, masked_bits_per_byte
from transformer_problems.lab.results import Results
from transformer_problems.lab.training import TrainingPlan, plain_recipe, train
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.stack import TransformerStack
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.learned import LearnedPositions
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.position.t5 import T5RelativeBias

_WIDTH, _HEADS, _LAYERS = 64, 4, 2
_HEAD_DIM = _WIDTH // _HEADS
_TEXT_LEN = 64
_TASKS: dict[str, Callable[[int, torch.Generator], Questions]] = {
    "who_did_what": who_did_what,
    "which_comes_first": which_comes_first,
}

_IN_EMBEDDING: dict[str, Callable[[], PositionEncoding]] = {
    "sinusoidal": lambda: SinusoidalEncoding(_WIDTH),
    "learned": lambda: LearnedPositions(_TEXT_LEN, _WIDTH),
}
_IN_ATTENTION: dict[str, Callable[[], PositionEncoding]] = {
    "shaw": lambda: ShawRelative(_HEAD_DIM, max_distance=16),
    "t5": lambda: T5RelativeBias(_HEADS, is_causal=False),
    "rope": lambda: RotaryEmbedding(_HEAD_DIM),
    "alibi": lambda: ALiBi(_HEADS),
}


class CausalWithoutPositions(nn.Module):
    """The trap: a stack that sees only backwards tells order without any encoding, from what it cannot see."""

    def __init__(self, vocab_size: int, num_outputs: int) -> None:
        super().__init__()
        self.body = TransformerStack(
            vocab_size, _WIDTH, _LAYERS, lambda: SelfAttention(_WIDTH, _HEADS, is_causal=True), is_causal=True
        )
        self.head = nn.Linear(_WIDTH, num_outputs)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.body(tokens, key_mask=key_mask))
        return y


def build_model(arm: str, vocab_size: int, num_outputs: int) -> nn.Module:
    """The same small model with the arm's encoding."""
    if arm == "causal":
        return CausalWithoutPositions(vocab_size, num_outputs)
    in_embedding, in_attention = _IN_EMBEDDING.get(arm), _IN_ATTENTION.get(arm)

    def mixer() -> SelfAttention:
        position = in_attention() if in_attention else None
        return SelfAttention(_WIDTH, _HEADS, position=position, is_causal=False)

    position = in_embedding() if in_embedding else None
    return Encoder(vocab_size, _WIDTH, _LAYERS, mixer, num_outputs=num_outputs, position=position)


@dataclass(frozen=True, slots=True)
class _Size:
    """What a scale means here."""

    order_steps: int
    text_steps: int
    batch_size: int
    num_questions: int  # held out, of each task
    num_windows: int
    seeds: int


_SIZES: dict[Scale, _Size] = {
    "quick": _Size(order_steps=180, text_steps=30, batch_size=32, num_questions=128, num_windows=32, seeds=1),
    "standard": _Size(order_steps=400, text_steps=200, batch_size=32, num_questions=256, num_windows=128, seeds=3),
    "full": _Size(order_steps=5000, text_steps=10_000, batch_size=128, num_questions=2048, num_windows=512, seeds=5),
}
_CURVE_POINTS = 6


class NoPositionalAwareness:
    """Questions about word order, the permutation test, and masked bytes of real text."""

    problem = 2
    arms = (
        Arm("none", "no positions"),
        Arm("sinusoidal", "Sinusoidal", "sinusoidal-pe", lead=True),
        Arm("learned", "Learned", "learnable-pe", lead=True),
        Arm("shaw", "Relative (Shaw)", "relative-pe", lead=True),
        Arm("t5", "Relative (T5)", "relative-pe"),
        Arm("rope", "RoPE", "rope", lead=True),
        Arm("alibi", "ALiBi, symmetric", "alibi", lead=True),
        Arm("causal", "no positions, causal (the trap)"),
    )
    chart = Chart(
        metric="order_accuracy",
        problem_title="Questions about word order, without positions",
        solutions_title="The same with each encoding",
        x_label="training steps",
        y_label="answered correctly (chance 0.5)",
        better="higher",
    )
    columns = (
        Column("order_accuracy", "order questions", at="last", better="higher"),
        Column("who_did_what", "who did what", better="higher"),
        Column("which_comes_first", "which comes first", better="higher"),
        Column("equivariance_error", "permutation error", better="higher", digits=2),
        Column("masked_bits", "bits/masked byte", better="lower"),
        Column("parameters", "parameters", better="lower"),
    )
    gains = (
        Effect(
            "order_accuracy",
            "difference",
            ("points fewer right answers", "points more right answers"),
            "last",
            scale=100,
        ),
    )
    costs = (
        Effect("step_s", "ratio", ("less time a step", "more time a step")),
        Effect("masked_bits", "difference", ("bits/masked byte less", "bits/masked byte more")),
    )
    shared_examples = frozenset({"order_accuracy", "who_did_what", "which_comes_first", "masked_bits"})

    def num_seeds(self, scale: Scale) -> int:
        return _SIZES[scale].seeds

    def measure(self, bench: Bench) -> Iterator[Measurement]:
        size = _SIZES[bench.cell.scale]
        yield from _order(bench, size)
        yield from _text(bench, size)

    def finding(self, results: Results) -> str:
        accuracy = results.samples("none", "order_accuracy", max(results.xs("none", "order_accuracy")))
        error = results.samples("none", "equivariance_error")
        assert accuracy is not None
        assert error is not None
        return (
            f"Without positions an encoder answers {accuracy.mean():.0%} of questions about word order, as a coin "
            f"would: shuffling its input shuffles its output and changes nothing else (error {error.max():.0e})."
        )


def _order(bench: Bench, size: _Size) -> Iterator[Measurement]:
    """Train on both kinds of questions at once; accuracy along the way and at the end."""
    seed, device = bench.cell.seed, bench.device
    with seeded(seed, "model"):
        model = build_model(bench.cell.arm, VOCAB_SIZE, NUM_ANSWERS).to(device)
    held_out = {name: task(size.num_questions, generator(0, "held out", name)) for name, task in _TASKS.items()}
    yield Measurement("parameters", "1", sum(p.numel() for p in model.parameters()))
    yield Measurement("equivariance_error", "1", permutation_error(model, seed, device))

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "questions", step)
        losses = [_answer_loss(model, task(size.batch_size, draws), device) for task in _TASKS.values()]
        return torch.stack(losses).mean()

    curve: list[Measurement] = []

    def examine(done: float) -> None:
        if round(done * size.order_steps) % (size.order_steps // _CURVE_POINTS) == 0:
            curve.extend(_accuracies(model.eval(), held_out, round(done * size.order_steps), device))
            model.train()
        bench.progress(done * 0.6)

    log = train(model, batch_loss, TrainingPlan(size.order_steps, plain_recipe(2e-3)), progress=examine)
    yield from curve
    yield Measurement("step_s", "s", log.train_s / log.steps)
    for name, questions in held_out.items():
        for repeat, value in enumerate(_correct(model, questions, device).tolist()):
            yield Measurement(name, "1", value, repeat=repeat)


def _answer_loss(model: nn.Module, questions: Questions, device: torch.device) -> Tensor:
    outputs = model(questions.tokens.to(device), key_mask=questions.key_mask.to(device))
    return nn.functional.cross_entropy(questions.read(outputs), questions.answers.to(device))


def _correct(model: nn.Module, questions: Questions, device: torch.device) -> Tensor:
    """Whether the right one of the two candidates is preferred, one value a question."""
    with torch.no_grad():
        outputs = model(questions.tokens.to(device), key_mask=questions.key_mask.to(device))
    scores = questions.read(outputs).cpu()
    chosen = questions.candidates.gather(1, scores.gather(1, questions.candidates).argmax(1, keepdim=True))
    return (chosen.squeeze(1) == questions.answers).double()


def _accuracies(
    model: nn.Module, held_out: dict[str, Questions], step: int, device: torch.device
) -> Iterator[Measurement]:
    """Both tasks, question by question."""
    values = torch.stack([_correct(model, questions, device) for questions in held_out.values()]).mean(0)
    for repeat, value in enumerate(values.tolist()):
        yield Measurement("order_accuracy", "1", value, x=step, x_unit="steps", repeat=repeat)


def permutation_error(model: nn.Module, seed: int, device: torch.device) -> float:
    """|f(Px) - P f(x)| / |f(x)| of a random permutation of random tokens: 0 for a model blind to order."""
    draws = generator(seed, "permutation")
    tokens = torch.randint(1, VOCAB_SIZE, (8, _TEXT_LEN), generator=draws).to(device)
    order = torch.randperm(_TEXT_LEN, generator=draws).to(device)
    with torch.no_grad():
        straight, shuffled = model(tokens), model(tokens[:, order])
    return float((shuffled - straight[:, order]).norm() / straight.norm())


def _text(bench: Bench, size: _Size) -> Iterator[Measurement]:
    """Masked bytes of real text: what order is worth where it matters less than in questions about it."""
    seed, device = bench.cell.seed, bench.device
    text = load_text()
    with seeded(seed, "text model"):
        model = build_model(bench.cell.arm, MASK_TOKEN + 1, MASK_TOKEN + 1).to(device)

    def bits(model: nn.Module, batch: Tensor, draws: torch.Generator) -> Tensor:
        batch = batch.to(device)
        corrupted, chosen = mask_bytes(batch, draws)
        return masked_bits_per_byte(model(corrupted), batch, chosen)

    def batch_loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "text", step)
        return bits(
            model, sample_windows(text.train, num=size.batch_size, length=_TEXT_LEN, generator=draws), draws
        ).mean()

    plan = TrainingPlan(steps=size.text_steps)
    train(model, batch_loss, plan, progress=lambda fraction: bench.progress(0.6 + 0.4 * fraction))
    held_out = held_out_windows(text.test, num=size.num_windows, length=_TEXT_LEN)
    with torch.no_grad():
        values = bits(model, held_out, generator(0, "held out"))
    for repeat, value in enumerate(values.tolist()):
        yield Measurement("masked_bits", "bit", value, repeat=repeat)


EXPERIMENT = NoPositionalAwareness()
