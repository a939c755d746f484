"""generate: with a cache it writes what it writes without, in as many passes as it says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.decoding.generate import LanguageModel, generate
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.recurrence.mamba import Mamba

VOCAB = 11
MIXERS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": lambda: SelfAttention(16, 4, position=RotaryEmbedding(4)),
    "grouped": lambda: SelfAttention(16, 4, num_kv_heads=2, position=RotaryEmbedding(4)),
    "windowed": lambda: SelfAttention(16, 4, op=SlidingWindow(3), position=RotaryEmbedding(4)),
    "sinks": lambda: SelfAttention(16, 4, op=AttentionSinks(3, num_sinks=2), position=RotaryEmbedding(4)),
    "mamba": lambda: Mamba(16, state_dim=4),
}


def build(mixer: str = "plain") -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, 16, 2, MIXERS[mixer], dtype=torch.float64).double()  # type: ignore[arg-type]


def draw_prompt(length: int) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


class Counted:
    """A model that remembers how many tokens each pass read."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.passes = model, list[int]()

    def __call__(self, tokens: Tensor) -> Tensor:
        self.passes.append(tokens.shape[1])
        return self.model(tokens)

    def initial_state(self, batch_size: int) -> object:
        return self.model.initial_state(batch_size)

    def stream(self, tokens: Tensor, state: object) -> tuple[Tensor, object]:
        self.passes.append(tokens.shape[1])
        return self.model.stream(tokens, state)


class Fixed:
    """A model whose logits are given; it must be shown tokens only."""

    def __init__(self, logits: list[list[float]]) -> None:
        self.logits = torch.tensor(logits)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]

    def initial_state(self, batch_size: int) -> None:
        return None

    def stream(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
        return self.logits[tokens], None


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_equals_uncached(mixer: str, length: int, temperature: float) -> None:
    model, prompt = build(mixer), draw_prompt(length)
    cached, uncached = (
        generate(
            model,
            prompt,
            20,
            temperature=temperature,
            generator=torch.Generator().manual_seed(1),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.equal(cached.tokens[:, :length], prompt) and cached.tokens.shape == (2, length + 20)
    if temperature == 0:
        tokens = prompt  # the definition, written out
        for _ in range(20):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached.tokens, tokens)


def test_passes_are_counted_and_read_what_they_must() -> None:
    for use_cache, expected in ((True, [5, 1, 1, 1]), (False, [5, 6, 7, 8])):
        model = Counted(build())
        assert generate(model, draw_prompt(5), 4, use_cache=use_cache).num_passes == 4
        assert model.passes == expected


def test_a_stop_token_ends_its_row_and_all_of_them_the_decoding() -> None:
    chain = Fixed([[0.0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9], [9, 0, 0, 0]])  # 0 -> 1 -> 2 -> 3 -> 0
    prompt = torch.tensor([[0], [2]])
    written = generate(chain, prompt, 10, stop_token=3)
    assert written.tokens.tolist() == [[0, 1, 2, 3], [2, 3, 3, 3]] and written.num_passes == 3
    assert generate(chain, prompt, 2, stop_token=3).tokens.tolist() == [[0, 1, 2], [2, 3, 3]]
    assert generate(chain, prompt, 5).tokens.tolist() == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]


def test_samples_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    model = Fixed([logits.tolist()] * 3)
    for temperature in (0.5, 1.0, 2.0):
        drawn = generate(
            model,
            torch.zeros(20_000, 1, dtype=torch.long),
            1,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        ).tokens[:, 1]
        expected = (logits / temperature).softmax(0)
        # five standard deviations of a share of 20,000 draws
        assert ((drawn.bincount(minlength=3) / 20_000 - expected).abs() < 5 * (0.25 / 20_000) ** 0.5).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("logits", [[0.0, 3.0, -5.0], [1e30, 2e30, float("-inf")], [-7.0, -6.9, -7.0]])
def test_the_coldest_samples_are_the_most_probable_tokens(temperature: float, logits: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    written = generate(Fixed([logits] * 3), torch.tensor([[0]]), 5, temperature=temperature, generator=generator)
    assert written.tokens.tolist() == [[0, 1, 1, 1, 1, 1]]


def test_no_gradients_are_kept() -> None:
    assert not generate(build(), draw_prompt(3), 2).tokens.requires_grad


def test_forbidden_tokens_are_allowed_to_be_so() -> None:
    model = Fixed([[float("-inf"), 0.0]] * 2)
    drawn = generate(
        model, torch.zeros(50, 1, dtype=torch.long), 3, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert bool((drawn.tokens[:, 1:] == 1).all())


def test_callers_mistakes_are_one_clear_error() -> None:
    model, prompt = build(), draw_prompt(3)
    for empty in (prompt[:, :0], prompt[:0]):
        with pytest.raises(ArgumentError, match=r"prompt must be \[B, N\] with at least one token.*start token"):
            generate(model, empty, 3)
    for shaped in (prompt[0], prompt[None]):
        with pytest.raises(ArgumentError, match=rf"prompt must be \[B, N\]; got .*{shaped.shape[-1]}\]. Pass one text"):
            generate(model, shaped, 3)
    for typed in (prompt.float(), prompt.bool(), prompt.to(torch.uint8)):
        with pytest.raises(ArgumentError, match=f"prompt must hold tokens as torch.int64 or .*; got {typed.dtype}"):
            generate(model, typed, 3)
    with pytest.raises(ArgumentError, match="max_new_tokens must be positive; got 0"):
        generate(model, prompt, 0)
    with pytest.raises(ArgumentError, match="max_new_tokens must be a positive whole number; got 2.5"):
        generate(model, prompt, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature must not be negative; got -1"):
        generate(model, prompt, 1, temperature=-1)
    with pytest.raises(ArgumentError, match="temperature 0.5 needs a generator"):
        generate(model, prompt, 1, temperature=0.5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model", [build(), Fixed([[0.0] * VOCAB] * VOCAB)], ids=["decoder", "table"])
def test_tokens_beyond_the_vocabulary_are_refused(model: LanguageModel, use_cache: bool) -> None:
    with pytest.raises(ArgumentError, match="prompt must hold tokens from 0 to 10, the model's vocabulary; got 11"):
        generate(model, torch.tensor([[3, VOCAB]]), 2, use_cache=use_cache)
    with pytest.raises(ArgumentError, match="prompt must hold tokens from 0 on; got -1"):
        generate(model, torch.tensor([[3, -1]]), 2, use_cache=use_cache)


def test_a_models_own_index_error_stays_what_it_is() -> None:
    model = Fixed([[0.0, 1.0]])  # its logits say two tokens, its table has one row
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[0]]), 2)


def test_prompts_may_be_int32() -> None:
    model, prompt = build(), draw_prompt(3)
    assert torch.equal(generate(model, prompt.int(), 4).tokens, generate(model, prompt, 4).tokens)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_step(bad: float, use_cache: bool) -> None:
    model = Fixed([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [bad, 0.0, 0.0]])  # 0 -> 1 -> 2 -> nothing
    with pytest.raises(ArgumentError, match="those of step 3 hold NaN"):
        generate(model, torch.tensor([[0]]), 5, use_cache=use_cache)
