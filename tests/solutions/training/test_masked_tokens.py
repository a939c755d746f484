"""Masked tokens: what is hidden and how, in exact rules and in the shares that were promised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency, chisquare
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import seeded
from transformer_problems.solutions.training.masked_tokens import mask_tokens

MASK, VOCAB, PAD = 50, 50, 0
RARE = 1e-3  # chance of a wrong alarm, were the seed another; each seed below gives the same answer every time


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(*shape: int, seed: int = 9) -> Tensor:
    return torch.randint(VOCAB, shape, generator=draws(seed))


def masked(tokens: Tensor, seed: int = 0, **keywords) -> tuple[Tensor, Tensor]:
    return mask_tokens(tokens, mask_token=MASK, vocab_size=VOCAB, generator=draws(seed), **keywords)


@given(
    st.sampled_from([(1, 1), (3, 63), (2, 64), (1, 100), (101,), (2, 3, 5)]),
    st.floats(0.01, 1.0),
    st.sets(st.integers(0, VOCAB - 1), max_size=5),
    st.integers(0, 2**31),
)
def test_what_always_holds(shape: tuple[int, ...], share: float, special: set[int], seed: int) -> None:
    tokens = text(*shape, seed=seed)
    special -= {int(tokens.flatten()[0])}  # one token at least is not special
    inputs, targets = masked(tokens, seed, share=share, special=special)
    chosen = targets != -100
    assert chosen.any()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert not torch.isin(tokens[chosen], torch.tensor(list(special), dtype=torch.int64)).any()
    assert inputs.shape == targets.shape == tokens.shape
    assert inputs.dtype == targets.dtype == torch.int64
    assert 0 <= int(inputs.min()) <= int(inputs.max()) <= MASK


def test_the_same_generator_gives_the_same_batch_and_the_input_stays() -> None:
    tokens = text(4, 100)
    before = tokens.clone()
    assert all(map(torch.equal, masked(tokens), masked(tokens)))
    assert not torch.equal(masked(tokens)[0], masked(tokens, seed=1)[0])
    assert torch.equal(tokens, before)


def test_bytes_become_wide_enough_for_the_mask() -> None:
    inputs, targets = mask_tokens(
        text(2, 100).to(torch.uint8), mask_token=256, vocab_size=256, share=1.0, generator=draws()
    )
    assert (inputs == 256).any()
    assert torch.equal(targets, text(2, 100))


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_shares_are_binomial(share: float) -> None:
    """One of `share` chosen; of these 80% masked, and 10% replaced, of which 1 in V is what it was."""
    tokens = text(200, 500)
    inputs, targets = masked(tokens, share=share)
    chosen = targets != -100
    num_chosen, num_masked = int(chosen.sum()), int((inputs == MASK).sum())
    num_other = int((chosen & (inputs != MASK) & (inputs != tokens)).sum())
    assert binomtest(num_chosen, tokens.numel(), share).pvalue > RARE
    assert binomtest(num_masked, num_chosen, 0.8).pvalue > RARE
    assert binomtest(num_other, num_chosen, 0.1 * (1 - 1 / VOCAB)).pvalue > RARE


def test_every_place_and_every_random_token_is_as_likely_as_another() -> None:
    tokens = torch.full((4000, 10), 7)
    inputs, targets = masked(tokens, share=0.5)
    chosen = targets != -100
    assert chisquare(chosen.sum(dim=0)).pvalue > RARE
    replaced = inputs[chosen & (inputs != MASK) & (inputs != 7)]
    counts = torch.bincount(replaced, minlength=VOCAB)
    assert counts[7] == 0
    assert chisquare(counts[torch.arange(VOCAB) != 7]).pvalue > RARE


def test_each_token_is_chosen_by_itself() -> None:
    """The number of targets in a row is binomial; were it fixed, its variance would be 0."""
    _, targets = masked(text(4000, 20), share=0.25)
    counts = (targets != -100).sum(dim=1).double()
    # mean n p, variance n p q; its relative error over 4000 rows is about sqrt(2 / 4000) = 0.022
    assert float(counts.var()) == pytest.approx(20 * 0.25 * 0.75, rel=4 * 0.022)


def test_the_least_share_still_has_a_target_somewhere() -> None:
    places = []
    for seed in range(200):
        _, targets = masked(torch.tensor([[PAD, 1, 2, 3, 4, PAD]]), seed, share=1e-9, special=[PAD])
        (place,) = (targets[0] != -100).nonzero().flatten().tolist()
        places.append(place)
    assert chisquare([places.count(i) for i in (1, 2, 3, 4)]).pvalue > RARE


@pytest.mark.peer
def test_it_is_what_transformers_does_in_distribution() -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {**{f"w{i}": i for i in range(VOCAB)}, "[MASK]": MASK}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words)), mask_token="[MASK]", pad_token="w0"
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    tokens = text(400, 500)
    with seeded(0, "collator"):
        theirs = collator.torch_mask_tokens(tokens.clone(), special_tokens_mask=tokens == PAD)
    # it draws random words from all of its vocabulary, the mask included
    ours = mask_tokens(tokens, mask_token=MASK, vocab_size=VOCAB + 1, special=[PAD], generator=draws())

    def kinds(inputs: Tensor, targets: Tensor) -> list[int]:
        chosen, hidden, same = targets != -100, inputs == MASK, inputs == tokens
        return [int(k.sum()) for k in (~chosen, chosen & hidden, chosen & same, chosen & ~hidden & ~same)]

    assert chi2_contingency([kinds(*ours), kinds(*theirs)]).pvalue > RARE
    words = [torch.bincount(i[(t != -100) & (i != MASK) & (i != tokens)], minlength=VOCAB) for i, t in (ours, theirs)]
    assert chi2_contingency(torch.stack(words)).pvalue > RARE


def test_a_model_learns_what_is_hidden() -> None:
    """Every token is its place's: what is hidden can be told, and is after training."""
    places = nn.functional.one_hot(torch.arange(8)).double()
    tokens = torch.arange(8).repeat(16, 1)
    model = nn.Linear(8, 8, dtype=torch.float64)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=2.0), draws()
    for _ in range(300):
        _, targets = mask_tokens(tokens, mask_token=8, vocab_size=8, generator=generator)
        loss = nn.functional.cross_entropy(model(places).expand(16, 8, 8).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(places).argmax(dim=1), torch.arange(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.ones(2, 3)}, "tokens must be whole numbers; got torch.float32"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, "tokens must hold at least one that is not special; got"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, "tokens must hold at least one that is not special; got"),
        ({"mask_token": -1}, "mask_token must not be negative; got -1"),
        ({"vocab_size": 0}, "vocab_size must be positive; got 0"),
        ({"share": 0.0}, "share must be positive; got 0.0"),
        ({"share": 1.5}, "share must be a share from 0 to 1; got 1.5"),
    ],
)
def test_bad_arguments_are_refused(changes, message: str) -> None:
    keywords = {"tokens": text(2, 3) + 1, "mask_token": MASK, "vocab_size": VOCAB, "special": [0], **changes}
    with pytest.raises(ArgumentError, match=message):
        mask_tokens(keywords.pop("tokens"), **keywords, generator=draws())
