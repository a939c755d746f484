"""mask_predict: passes, the schedule of masks, fixed tokens, and a model whose text is known."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.decoding.mask_predict import mask_predict
from transformer_problems.solutions.position.rotary import RotaryEmbedding

VOCAB, MASK = 9, 8


class Watched:
    """A random masked model that remembers what it was shown."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Encoder(VOCAB, 16, 1, lambda: SelfAttention(16, 4, position=RotaryEmbedding(4), is_causal=False))
        self.shown: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens)
        logits: Tensor = self.model(tokens)
        return logits


@pytest.mark.parametrize(("length", "num_passes"), [(1, 1), (10, 1), (10, 3), (10, 10), (63, 4), (5, 20)])
def test_masks_decay_linearly_over_the_passes(length: int, num_passes: int) -> None:
    model = Watched()
    written = mask_predict(model, torch.full((2, length), MASK), num_passes=num_passes, mask_token=MASK)
    schedule = [length * (num_passes - t) // num_passes for t in range(num_passes)]
    schedule = [n for n in schedule if n]
    assert [int((shown == MASK).sum()) for shown in model.shown] == [2 * n for n in schedule]
    assert written.num_passes == len(model.shown) == len(schedule)
    assert written.tokens.shape == (2, length) and not bool((written.tokens == MASK).any())


def test_given_tokens_stay_and_rows_keep_their_own_schedule() -> None:
    model, template = Watched(), torch.tensor([[1, 2, MASK, MASK, MASK, MASK], [1, 2, 3, 4, MASK, MASK]])
    written = mask_predict(model, template, num_passes=2, mask_token=MASK)
    given = template != MASK
    for shown in (*model.shown, written.tokens):
        assert torch.equal(shown[given], template[given])
    assert [(shown == MASK).sum(1).tolist() for shown in model.shown] == [[4, 2], [2, 1]]
    alone = mask_predict(Watched(), template[1:], num_passes=2, mask_token=MASK)
    assert torch.equal(alone.tokens, written.tokens[1:])


def test_equals_the_algorithm_written_out() -> None:
    model, length, num_passes = Watched(), 12, 4
    tokens, sure = [MASK] * length, [0.0] * length
    for t in range(num_passes):
        hidden = sorted(range(length), key=lambda i: sure[i])[: length * (num_passes - t) // num_passes]
        shown = [MASK if i in hidden else token for i, token in enumerate(tokens)]
        probabilities = model(torch.tensor([shown]))[0].detach().softmax(-1)[:, :MASK]
        for i in hidden:
            sure[i], tokens[i] = float(probabilities[i].max()), int(probabilities[i].argmax())
    written = mask_predict(model, torch.full((1, length), MASK), num_passes=num_passes, mask_token=MASK)
    assert written.tokens[0].tolist() == tokens


def test_the_least_certain_token_is_predicted_again_in_the_light_of_the_rest() -> None:
    def model(tokens: Tensor) -> Tensor:
        """Sure of token 1 in the first place; in the second unsure until it sees the first."""
        logits = torch.zeros(1, 2, 4)
        logits[0, 0, 1] = 5.0
        logits[0, 1, 2 if tokens[0, 0] == 1 else 0] = 1.0
        return logits

    template = torch.full((1, 2), 3)
    assert mask_predict(model, template, num_passes=1, mask_token=3).tokens.tolist() == [[1, 0]]
    assert mask_predict(model, template, num_passes=2, mask_token=3).tokens.tolist() == [[1, 2]]


def test_the_mask_itself_is_never_written() -> None:
    def model(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full(tokens.shape, MASK), VOCAB) * 50.0

    assert not bool((mask_predict(model, torch.full((1, 5), MASK), num_passes=3, mask_token=MASK).tokens == MASK).any())


def test_callers_mistakes_are_one_clear_error() -> None:
    with pytest.raises(ArgumentError, match="template must hold mask_token=8"):
        mask_predict(Watched(), torch.tensor([[1, 2]]), num_passes=2, mask_token=MASK)
    with pytest.raises(ArgumentError, match="num_passes must be positive; got 0"):
        mask_predict(Watched(), torch.tensor([[MASK]]), num_passes=0, mask_token=MASK)
    with pytest.raises(ArgumentError, match="num_passes must be a positive whole number; got 1.5"):
        mask_predict(Watched(), torch.tensor([[MASK]]), num_passes=1.5, mask_token=MASK)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="those of pass 1 hold NaN"):
        mask_predict(
            lambda tokens: torch.full((1, 1, VOCAB), float("nan")),
            torch.tensor([[MASK]]),
            num_passes=1,
            mask_token=MASK,
        )


def test_templates_that_the_model_cannot_read_are_refused() -> None:
    model = Watched()
    for shaped, told in (
        (torch.tensor([MASK]), r"template must be \[B, N\]; got \[1\]"),
        (torch.zeros(2, 0, dtype=torch.long), "with at least one token in each row"),
        (torch.full((1, 2), float(MASK)), "template must hold tokens as torch.int64 or .*; got torch.float32"),
        (torch.tensor([[MASK, -1]]), "template must hold tokens from 0 on; got -1"),
        (torch.tensor([[MASK, VOCAB]]), f"template must hold tokens from 0 to 8, the model's vocabulary; got {VOCAB}"),
    ):
        with pytest.raises(ArgumentError, match=told):
            mask_predict(model, shaped, num_passes=2, mask_token=MASK)
    with pytest.raises(ArgumentError, match="template must hold tokens from 0 to 8, the model's vocabulary; got 30"):
        mask_predict(model, torch.full((1, 2), 30), num_passes=2, mask_token=30)
    for logits in (torch.zeros(1, VOCAB), torch.zeros(1, 3, VOCAB)):
        with pytest.raises(ArgumentError, match=r"model must give logits \[1, 2, V\]; got \[1, "):
            mask_predict(lambda tokens, y=logits: y, torch.full((1, 2), MASK), num_passes=1, mask_token=MASK)


def test_a_head_may_know_no_mask() -> None:
    torch.manual_seed(0)
    model = Encoder(VOCAB, 16, 1, lambda: SelfAttention(16, 4, is_causal=False), num_outputs=MASK)
    written = mask_predict(model, torch.full((2, 5), MASK), num_passes=3, mask_token=MASK)
    assert bool((written.tokens < MASK).all()) and written.num_passes == 3
