"""ReducingEncoder: an encoder's own outputs without reducers, less work with them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.token_slots import TokenReducer
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.reducing_encoder import ReducingEncoder
from transformer_problems.solutions.attention.gated import GatedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.watched import WatchedAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.tokens.merging import TokenMerging
from transformer_problems.solutions.tokens.pruning import LearnedTokenPruning, TokenPruning, pruning_penalty
from transformer_problems.solutions.training.checkpointing import checkpoint_layers

WIDTH, LAYERS, OUTPUTS = 16, 3, 5
REDUCERS = {
    "pruning": lambda: TokenPruning(0.5),
    "learned": lambda: LearnedTokenPruning(0.04),
    "merging": lambda: TokenMerging(0.4),
}


def encoder(*, gated: bool = False) -> Encoder:
    torch.manual_seed(0)

    def mixer() -> SelfAttention | GatedAttention:
        layer = SelfAttention(WIDTH, 4, op=WatchedAttention(), position=RotaryEmbedding(4), is_causal=False)
        return GatedAttention(layer) if gated else layer

    return Encoder(11, WIDTH, LAYERS, mixer, num_outputs=OUTPUTS).double()


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor]:
    key_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(11, key_mask.shape, generator=torch.Generator().manual_seed(0)), key_mask


@pytest.mark.parametrize("gated", [False, True])
def test_without_reducers_it_is_the_encoder(gated: bool) -> None:
    model = encoder(gated=gated)
    tokens, key_mask = inputs([20, 7])
    y = ReducingEncoder(model, [None] * LAYERS)(tokens, key_mask=key_mask)
    torch.testing.assert_close(y[key_mask], model(tokens, key_mask=key_mask)[key_mask])
    assert (y[~key_mask] == 0).all()


@pytest.mark.parametrize("name", REDUCERS)
def test_rows_alone_give_what_they_give_in_a_padded_batch(name: str) -> None:
    model = ReducingEncoder(encoder(), [REDUCERS[name]() for _ in range(LAYERS)]).eval()
    lengths = [30, 8, 17]
    tokens, key_mask = inputs(lengths)
    together = model(tokens, key_mask=key_mask)
    assert together.shape == (3, 30, OUTPUTS)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(together[b, :length], model(tokens[b : b + 1, :length])[0])


@pytest.mark.parametrize("name", REDUCERS)
def test_gradients_reach_every_parameter_that_can_learn(name: str) -> None:
    model = ReducingEncoder(encoder(), [REDUCERS[name]() for _ in range(LAYERS)])
    tokens, key_mask = inputs([30, 8])
    (model(tokens, key_mask=key_mask).square().sum()).backward()
    # the last layer's threshold acts on attention after it, of which there is none
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert idle == (["reducer_modules.2.threshold"] if name == "learned" else [])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if name == "learned":
        penalty = pruning_penalty(model.trace(tokens, key_mask=key_mask))
        assert 0 < penalty < 1
        penalty.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_soft_and_hard_learned_pruning_agree_when_the_step_is_sharp() -> None:
    """Weights of 0 or 1 are the mask that hard pruning leaves, as far as the protected token sees."""
    reducers = [LearnedTokenPruning(0.05, temperature=1e-7) for _ in range(LAYERS)]
    model = ReducingEncoder(encoder(), [reducers[0], None, None])
    tokens, _ = inputs([20])
    soft = model.train()(tokens)
    hard = model.eval()(tokens)
    kept = hard.abs().sum(-1) > 0
    assert 1 < kept.sum() < 20
    torch.testing.assert_close(soft[kept], hard[kept])


def test_flops_fall_to_those_of_the_tokens_left() -> None:
    tokens, _ = inputs([64, 64])

    def flops(reducers: list[TokenReducer | None]) -> int:
        model = ReducingEncoder(encoder(), reducers).eval()
        with FlopCounterMode(display=False) as counter:
            model(tokens)
        return counter.get_total_flops()

    def expected(lengths: list[int]) -> int:
        """lengths[i]: tokens that enter layer i; the last entry is what the head sees."""
        total = 0
        for entering, leaving in pairwise(lengths):
            total += 2 * 4 * WIDTH * WIDTH * entering + 4 * WIDTH * entering**2 + 2 * 8 * WIDTH * WIDTH * leaving
        return 2 * (total + 2 * WIDTH * OUTPUTS * lengths[-1])

    assert flops([None] * LAYERS) == expected([64, 64, 64, 64])
    assert flops([TokenPruning(0.5) for _ in range(LAYERS)]) == expected([64, 32, 16, 8])
    similarity = sum(2 * 2 * (n // 2) ** 2 * 4 for n in (64, 48, 36))
    assert flops([TokenMerging(0.25) for _ in range(LAYERS)]) == expected([64, 48, 36, 27]) + similarity


def test_merging_identical_tokens_changes_nothing() -> None:
    """A token of size two counts as exactly two equal tokens, where no position tells them apart."""
    torch.manual_seed(0)

    def mixer() -> SelfAttention:
        return SelfAttention(WIDTH, 4, op=WatchedAttention(), is_causal=False)

    model = Encoder(11, WIDTH, LAYERS, mixer).double()
    tokens = torch.arange(10).repeat_interleave(2)[None]
    merging = ReducingEncoder(model, [TokenMerging(10, num_protected=0), None, None])
    assert merging.trace(tokens)[0].x.shape[1] == 10
    torch.testing.assert_close(merging(tokens), model(tokens))


def test_trains_in_the_usual_way() -> None:
    model = ReducingEncoder(encoder(), [TokenPruning(0.7), TokenMerging(0.3), None]).float()
    tokens, key_mask = inputs([24, 24, 24])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(tokens, key_mask=key_mask)[:, 0], torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="reducers must have one entry for each of 3 layers; got 2"):
        ReducingEncoder(encoder(), [None, None])
    plain = Encoder(11, WIDTH, 1, lambda: SelfAttention(WIDTH, 4, is_causal=False))
    with pytest.raises(CombinationError, match="SelfAttention has 0. Build it with op=WatchedAttention"):
        ReducingEncoder(plain, [None])


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("batch_size", [0, 2])
def test_no_tokens_give_no_output(name: str, batch_size: int) -> None:
    model = ReducingEncoder(encoder(), [REDUCERS[name]() for _ in range(LAYERS)]).eval()
    nothing = torch.zeros(batch_size, 0, dtype=torch.int64)
    for key_mask in (None, nothing > 0):
        assert model(nothing, key_mask=key_mask).shape == (batch_size, 0, OUTPUTS)
        assert len(model.trace(nothing, key_mask=key_mask)) == LAYERS


def test_wrong_inputs_are_named() -> None:
    model = ReducingEncoder(encoder(), [None] * LAYERS)
    tokens, key_mask = inputs([20, 7])
    for wrong in (tokens[0], tokens[None], tokens.float()):
        with pytest.raises(ArgumentError, match=r"tokens must be whole numbers \[B, N\]; got"):
            model(wrong)
    for wrong in (key_mask[:, :19], key_mask[:1], key_mask.long(), torch.ones(2, 25) > 0):
        for call in (model, model.trace):
            with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 20\], True for real tokens; got"):
                call(tokens, key_mask=wrong)


def test_checkpoints_that_would_save_nothing_are_refused() -> None:
    model = ReducingEncoder(encoder(), [TokenPruning(0.5), None, None])
    tokens, _ = inputs([9])
    plain = model(tokens)
    with checkpoint_layers(model):
        with pytest.raises(CombinationError, match="nothing would be recomputed. Leave checkpoint_layers out"):
            model(tokens)
        with torch.no_grad():
            assert torch.equal(model(tokens), plain)
    assert torch.equal(model(tokens), plain)
