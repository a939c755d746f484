"""speculative_decode: greedy text is the target's, samples are distributed as the target's, passes are counted."""

import itertools

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.stack import StackState
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.decoding.generate import generate
from transformer_problems.solutions.decoding.speculative import (
    Draft,
    PromptLookup,
    SpeculativeGeneration,
    predicted_speedup,
    speculative_decode,
)
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.recurrence.mamba import Mamba

VOCAB = 7
OPS = {"plain": None, "windowed": SlidingWindow(3), "sinks": AttentionSinks(3, num_sinks=2)}


def build(seed: int = 0, *, op: str = "plain", vocab_size: int = VOCAB, num_layers: int = 2) -> Decoder:
    torch.manual_seed(seed)

    def mixer() -> SelfAttention:
        return SelfAttention(16, 4, num_kv_heads=2, op=OPS[op], position=RotaryEmbedding(4))

    return Decoder(vocab_size, 16, num_layers, mixer).double()


def draw_prompt(batch_size: int, length: int, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(length))


class Chain:
    """A model whose next token depends on the last alone, so the distribution of its text is known on paper."""

    def __init__(self, probabilities: Tensor) -> None:
        self.logits = probabilities.log()

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]

    def initial_state(self, batch_size: int) -> StackState:
        return StackState(())

    def stream(self, tokens: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        return self.logits[tokens], StackState((), state.num_seen + tokens.shape[1])


def draw_chain(seed: int, vocab_size: int = 3) -> Tensor:
    draws = torch.rand(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * draws).softmax(-1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (1, 9), (3, 5)])
@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_greedy_text_is_exactly_the_targets(op: str, batch_size: int, length: int, num_draft_tokens: int) -> None:
    target, prompt = build(op=op), draw_prompt(batch_size, length)
    expected = generate(target, prompt, 25).tokens
    drafts = (target, build(1, num_layers=1), build(2, op="windowed"), PromptLookup(2))
    for draft in drafts:
        written = speculative_decode(target, draft, prompt, 25, num_draft_tokens=num_draft_tokens)
        assert torch.equal(written.tokens, expected)


@pytest.mark.parametrize("stop_token", range(VOCAB))
@pytest.mark.parametrize(("batch_size", "length"), [(1, 9), (3, 5)])
def test_greedy_text_stops_exactly_where_the_targets_does(stop_token: int, batch_size: int, length: int) -> None:
    target, prompt = build(), draw_prompt(batch_size, length)
    for num_tokens in (1, 6, 25):
        expected = generate(target, prompt, num_tokens, stop_token=stop_token).tokens
        for draft in (target, build(1, num_layers=1), PromptLookup(2)):
            written = speculative_decode(target, draft, prompt, num_tokens, stop_token=stop_token)
            assert torch.equal(written.tokens, expected)


def test_rows_that_stopped_hold_no_other_up_and_count_no_more() -> None:
    target = Chain(torch.eye(5, dtype=torch.float64).roll(1, dims=1))  # 0 -> 1 -> ... -> 4 -> 0

    def draft(tokens: Tensor, num_tokens: int) -> Tensor:
        """Right for the second row, wrong for the first."""
        right = tokens[1, -1] + 1 + torch.arange(num_tokens)
        return torch.stack([torch.zeros_like(right), right % 5])

    prompt = torch.tensor([[3], [0]])
    written = speculative_decode(target, draft, prompt, 20, stop_token=4)
    assert written.tokens.tolist() == [[3, 4, 4, 4, 4], [0, 1, 2, 3, 4]]
    # the prompt's pass ends the first row; the next one drafts four for both, of which the second row's all pass
    assert (written.num_passes, written.num_drafted, written.num_tested, written.num_accepted) == (2, 4, 4, 4)


def test_sampled_texts_stop_as_the_targets_do() -> None:
    """A stop is part of what is drawn: the share of texts that have stopped is that of the target's chain."""
    transitions = draw_chain(0)
    prompt, generator = torch.zeros(3000, 1, dtype=torch.long), torch.Generator().manual_seed(0)
    texts = speculative_decode(
        Chain(transitions), Chain(draw_chain(1)), prompt, 4, temperature=1.0, generator=generator, stop_token=2
    ).tokens[:, 1:]
    stopping = transitions.clone()
    stopping[2] = torch.tensor([0.0, 0.0, 1.0])  # what fills up is certain
    stopped = (texts == 2).long()
    assert bool((stopped.diff(dim=1) >= 0).all())
    expected = stopping.matrix_power(4)[0, 2]  # stopped after four tokens
    # five standard deviations of a share of 3000 texts
    assert abs(stopped[:, -1].double().mean() - expected) < 5 * (0.25 / 3000) ** 0.5


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_the_coldest_samples_are_the_greedy_text(temperature: float) -> None:
    target, prompt, generator = build(), draw_prompt(2, 5), torch.Generator().manual_seed(0)
    written = speculative_decode(target, build(1), prompt, 9, temperature=temperature, generator=generator)
    assert torch.equal(written.tokens, generate(target, prompt, 9).tokens)


def test_a_draft_may_keep_any_state() -> None:
    torch.manual_seed(1)
    draft = Decoder(VOCAB, 16, 1, lambda: Mamba(16, state_dim=4)).double()
    target, prompt = build(), draw_prompt(2, 4)
    assert torch.equal(speculative_decode(target, draft, prompt, 15).tokens, generate(target, prompt, 15).tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_tokens", "passes"), [(1, 1), (2, 2), (6, 2), (7, 3), (21, 5)])
def test_a_perfect_draft_is_always_accepted(num_tokens: int, passes: int, temperature: float) -> None:
    """The prompt's pass brings one token, each later one g + 1 = 5."""
    model, generator = build(), torch.Generator().manual_seed(0)
    written = speculative_decode(
        model, model, draw_prompt(1, 3), num_tokens, temperature=temperature, generator=generator
    )
    assert written.tokens.shape == (1, 3 + num_tokens) and written.num_passes == passes
    drafted = num_tokens - passes  # each pass brings one token of its own
    assert (written.num_drafted, written.num_tested, written.num_accepted) == (drafted, drafted, drafted)
    assert written.num_draft_passes == drafted + 1  # and one that asks for its vocabulary
    assert written.acceptance_rate == (1.0 if drafted else 0.0)


def test_a_draft_that_is_always_wrong_costs_a_pass_a_token() -> None:
    certain = torch.eye(3, dtype=torch.float64)
    target, draft = Chain(certain.roll(1, dims=1)), Chain(certain.roll(2, dims=1))  # 0 -> 1 -> 2 and 0 -> 2 -> 1
    written = speculative_decode(target, draft, torch.tensor([[0]]), 10, num_draft_tokens=3)
    assert written.tokens.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]]
    assert written.num_passes == 10 and written.num_accepted == 0
    assert written.num_drafted == 3 * 6 + 2 + 1 and written.num_tested == 8  # none is drafted for the last token
    assert written.acceptance_rate == 0.0


def sampled(target: Chain, draft: Chain | Draft, num_tokens: int, runs: int, batch_size: int) -> Tensor:
    """What follows token 0 in many short texts, [runs * batch_size, num_tokens]."""
    generator, prompt = torch.Generator().manual_seed(0), torch.zeros(batch_size, 1, dtype=torch.long)
    texts = [
        speculative_decode(
            target, draft, prompt, num_tokens, num_draft_tokens=2, temperature=1.0, generator=generator
        ).tokens[:, 1:]
        for _ in range(runs)
    ]
    return torch.cat(texts)


def chi_square_p_value(samples: Tensor, transitions: Tensor) -> float:
    """How likely counts at least as uneven are if texts follow the transitions from token 0."""
    vocab_size, length = len(transitions), samples.shape[1]
    texts = list(itertools.product(range(vocab_size), repeat=length))
    probabilities = torch.tensor(
        [float(torch.tensor([transitions[a, b] for a, b in itertools.pairwise((0, *text))]).prod()) for text in texts],
        dtype=torch.float64,
    )
    expected = probabilities * len(samples)
    weights = torch.tensor([vocab_size ** (length - 1 - i) for i in range(length)])
    counts = (samples * weights).sum(1).bincount(minlength=len(texts))
    rare = expected < 5  # pooled, as usual, for the statistic to follow its distribution
    if bool(rare.any()):
        expected, counts = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, counts))
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def always_one(tokens: Tensor, num_tokens: int) -> Tensor:
    return torch.ones(len(tokens), num_tokens, dtype=torch.long)


@pytest.mark.parametrize(("runs", "batch_size"), [(1000, 1), (500, 3), (1, 3000)])
@pytest.mark.parametrize("draft", [Chain(draw_chain(1)), always_one], ids=["model", "guess"])
def test_samples_follow_the_targets_distribution(draft: Chain | Draft, runs: int, batch_size: int) -> None:
    transitions = draw_chain(0)
    samples = sampled(Chain(transitions), draft, 4, runs, batch_size)
    # seeds are fixed, so this passes or fails for good; a right sampler passes for all but one seed in a thousand
    assert chi_square_p_value(samples, transitions) > 1e-3


def test_the_statistical_test_would_notice_the_drafts_distribution() -> None:
    transitions, others = draw_chain(0), draw_chain(1)
    samples = sampled(Chain(others), Chain(others), 4, 1000, 1)
    assert chi_square_p_value(samples, others) > 1e-3
    assert chi_square_p_value(samples, transitions) < 1e-9


def test_the_acceptance_rate_is_the_overlap_of_the_distributions() -> None:
    """Leviathan et al., corollary 3.6: the mean over contexts of sum_x min(p(x), q(x))."""
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    written = speculative_decode(
        Chain(p.expand(3, 3)),
        Chain(q.expand(3, 3)),
        torch.zeros(1, 1, dtype=torch.long),
        3000,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    overlap = float(torch.minimum(p, q).sum())
    deviation = (overlap * (1 - overlap) / written.num_tested) ** 0.5
    assert abs(written.acceptance_rate - overlap) < 4 * deviation
    tokens_per_pass = 2999 / (written.num_passes - 1)
    # cost 0 makes the predicted speed-up the expected tokens per pass; 1,500 passes of 1 to 5 tokens each
    assert abs(tokens_per_pass - predicted_speedup(overlap, 4, 0)) < 4 * 2 / (written.num_passes - 1) ** 0.5


def test_prompt_lookup_continues_what_it_finds() -> None:
    lookup = PromptLookup(2)

    def proposal(text: list[int], num_tokens: int = 3) -> list[int]:
        return lookup(torch.tensor([text]), num_tokens)[0].tolist()

    assert proposal([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert proposal([1, 2, 3, 9, 9, 2, 4, 5, 6, 1, 2]) == [3, 9, 9]  # two tokens count for more than one nearer
    assert proposal([2, 3, 3, 3, 2, 4, 4, 4, 7, 2]) == [4, 4, 4]  # the latest place of the token
    assert proposal([1, 2, 7, 8, 9, 1, 2, 1, 2]) == [7, 8, 9]  # the latest with three tokens after it
    assert proposal([5, 5]) == [5] and proposal([1, 2, 3]) == [] and proposal([1]) == []
    both = torch.tensor([[1, 2, 3, 4, 1, 2], [5, 6, 7, 8, 9, 5]])
    assert lookup(both, 9).tolist() == [[3, 4, 1, 2], [6, 7, 8, 9]]
    assert lookup(torch.tensor([[1, 2, 1], [1, 2, 3]]), 3).shape == (2, 0)  # one row found nothing


def test_prompt_lookup_saves_passes_where_text_repeats_itself() -> None:
    cycle = Chain(torch.eye(5, dtype=torch.float64).roll(1, dims=1))  # 0 -> 1 -> ... -> 4 -> 0
    written = speculative_decode(cycle, PromptLookup(3), torch.arange(5)[None], 21)
    assert written.tokens[0].tolist() == [i % 5 for i in range(26)]
    assert (written.num_passes, written.num_draft_passes) == (5, 0) and written.acceptance_rate == 1.0


def test_predicted_speedup_is_the_papers_formula() -> None:
    for a, g, c in ((0.8, 4, 0.05), (0.5, 1, 0.0), (0.0, 3, 0.1)):
        assert predicted_speedup(a, g, c) == pytest.approx((1 - a ** (g + 1)) / ((1 - a) * (g * c + 1)), rel=1e-12)
    assert predicted_speedup(1.0, 4, 0.25) == 5 / 2
    with pytest.raises(ArgumentError, match="acceptance must be a probability; got 1.2"):
        predicted_speedup(1.2, 4, 0.1)
    with pytest.raises(ArgumentError, match="cost_ratio must not be negative; got -1"):
        predicted_speedup(0.5, 4, -1)
    with pytest.raises(ArgumentError, match="num_draft_tokens must be positive"):
        predicted_speedup(0.5, 0, 0.1)


def test_nothing_tested_is_a_rate_of_zero() -> None:
    assert SpeculativeGeneration(torch.zeros(1, 1), 1, 0, 0, 0, 0).acceptance_rate == 0.0


@pytest.mark.parametrize("vocab_size", [VOCAB - 4, VOCAB + 4])
def test_another_vocabulary_is_refused(vocab_size: int) -> None:
    draft = build(vocab_size=vocab_size)
    with pytest.raises(
        ArgumentError, match=f"draft must have the target's vocabulary of 7 tokens; it has {vocab_size}"
    ):
        speculative_decode(build(), draft, draw_prompt(1, 9), 5)


@pytest.mark.parametrize(
    ("guess", "got"),
    [
        (lambda tokens, num: torch.zeros(1, num + 1, dtype=torch.long), r"\[1, 5\]"),
        (lambda tokens, num: torch.zeros(2, num, dtype=torch.long), r"\[2, 4\]"),
        (lambda tokens, num: torch.zeros(num, dtype=torch.long), r"\[4\]"),
        (lambda tokens, num: torch.zeros(1, num, VOCAB), r"\[1, 4, 7\]"),
        (lambda tokens, num: torch.zeros(1, num), "torch.float32 on cpu"),
        (lambda tokens, num: torch.zeros(1, num, dtype=torch.long, device="meta"), "torch.int64 on meta"),
        (lambda tokens, num: torch.full((1, 2), VOCAB), "tokens from 7 to 7"),
        (lambda tokens, num: torch.tensor([[1, -1]]), "tokens from -1 to 1"),
        (lambda tokens, num: [1, 2], "a list"),
    ],
)
def test_a_guess_that_is_none_is_refused(guess: Draft, got: str) -> None:
    needed = r"tokens from 0 to 6, the target's vocabulary, as torch.int64 \[1, g\] on cpu with g at most 4"
    with pytest.raises(ArgumentError, match=f"draft must guess {needed}; got {got}\\. Return"):
        speculative_decode(build(), guess, draw_prompt(1, 5), 9)


def test_a_draft_may_guess_nothing() -> None:
    target, prompt = build(), draw_prompt(2, 5)
    written = speculative_decode(target, lambda tokens, num: tokens[:, :0], prompt, 6)
    assert torch.equal(written.tokens, generate(target, prompt, 6).tokens)
    assert (written.num_passes, written.num_drafted) == (6, 0)


def test_a_target_that_cannot_give_tokens_back_is_refused() -> None:
    torch.manual_seed(0)
    target = Decoder(VOCAB, 16, 1, lambda: Mamba(16, state_dim=4)).double()
    with pytest.raises(CombinationError, match="target must have a state that gives rejected tokens back; .* cannot"):
        speculative_decode(target, build(), draw_prompt(1, 5), 30)


def test_callers_mistakes_are_one_clear_error() -> None:
    model, prompt = build(), draw_prompt(1, 3)
    with pytest.raises(ArgumentError, match="prompt must be"):
        speculative_decode(model, model, prompt[:, :0], 3)
    with pytest.raises(ArgumentError, match="prompt must hold tokens from 0 to 6, the model's vocabulary; got 7"):
        speculative_decode(model, model, prompt.new_tensor([[1, VOCAB]]), 3)
    with pytest.raises(ArgumentError, match="num_draft_tokens must be a positive whole number; got 1.5"):
        speculative_decode(model, model, prompt, 3, num_draft_tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_draft_tokens must be positive; got 0"):
        speculative_decode(model, model, prompt, 3, num_draft_tokens=0)
    with pytest.raises(ArgumentError, match="temperature 1 needs a generator"):
        speculative_decode(model, model, prompt, 3, temperature=1)
    with pytest.raises(ArgumentError, match="ngram_size must be positive"):
        PromptLookup(0)
    with pytest.raises(ArgumentError, match="ngram_size must be a positive whole number; got '3'"):
        PromptLookup("3")  # type: ignore[arg-type]
    broken = Chain(torch.full((VOCAB, VOCAB), float("nan")))
    with pytest.raises(ArgumentError, match="those of the prompt hold NaN"):
        speculative_decode(broken, model, prompt, 3)
    with pytest.raises(ArgumentError, match="those of the draft's pass 2 hold NaN"):
        speculative_decode(model, broken, prompt, 3)
