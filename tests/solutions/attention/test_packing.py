"""Packed sequences give what padded ones give, for the sum of their own costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.slots import AttentionOp, PositionEncoding
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.attention_sinks import AttentionSinks
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.packing import PackedAttention, pack, run_packed, unpack
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.attention.sliding_window import SlidingWindow
from transformer_problems.solutions.attention.sparse import SparseAttention
from transformer_problems.solutions.attention.topk import TopKAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.training.checkpointing import checkpoint_layers
from transformer_problems.testing import check_attention_op

POSITIONS = {"none": None, "rotary": RotaryEmbedding(4), "alibi": ALiBi(4)}


def masks(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def encoder(position: PositionEncoding | None = None, op: AttentionOp | None = None) -> Encoder:
    torch.manual_seed(0)

    def mixer() -> SelfAttention:
        return SelfAttention(16, 4, num_kv_heads=2, op=PackedAttention(op), position=position, is_causal=False)

    return Encoder(11, 16, 2, mixer, position=SinusoidalEncoding(16)).double()


def flops(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_unpack_undoes_pack(rows: list[list[bool]]) -> None:
    key_mask = torch.tensor(rows)
    for x in (torch.randn(*key_mask.shape, 3), torch.randint(1, 9, key_mask.shape)):
        packed, lengths = pack(x, key_mask)
        assert packed.shape[:2] == (1, sum(map(sum, rows)))
        assert lengths.tolist() == [sum(row) for row in rows]
        kept = key_mask.view(*key_mask.shape, *[1] * (x.dim() - 2))
        assert torch.equal(unpack(packed, key_mask), x * kept)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [9, 1, 64, 9, 30]])
def test_packed_equals_padded_in_outputs_and_gradients(position: str, lengths: list[int]) -> None:
    model, key_mask = encoder(POSITIONS[position]), masks(lengths)
    tokens = torch.randint(11, key_mask.shape)
    padded, packed = model(tokens, key_mask=key_mask), run_packed(model, tokens, key_mask=key_mask)
    torch.testing.assert_close(packed[key_mask], padded[key_mask])
    assert (packed[~key_mask] == 0).all()
    weight = torch.randn_like(packed) * key_mask[..., None]
    parameters = list(model.parameters())
    for mine, reference in zip(
        torch.autograd.grad((packed * weight).sum(), parameters),
        torch.autograd.grad((padded * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


PLACE_COUNTING = {
    "dense": DenseAttention,
    "window": lambda: SlidingWindow(2),
    "sinks": lambda: AttentionSinks(1, num_sinks=2),
    "sparse": lambda: SparseAttention(4, pattern="fixed", num_summary=1),
    "linformer": lambda: Linformer(20, 5),
}


@pytest.mark.parametrize("op", PLACE_COUNTING)
def test_padding_may_stand_anywhere(op: str) -> None:
    position = None if op == "linformer" else POSITIONS["alibi"]
    model = encoder(position, PLACE_COUNTING[op]())
    key_mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    key_mask[0] = torch.arange(20) >= 7  # padding in front only
    key_mask[1] = False
    tokens = torch.randint(11, key_mask.shape)
    padded, packed = model(tokens, key_mask=key_mask), run_packed(model, tokens, key_mask=key_mask)
    torch.testing.assert_close(packed[key_mask], padded[key_mask])
    assert (packed[~key_mask] == 0).all()


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_layers_are_recomputed_packed(every: int) -> None:
    model, key_mask = encoder(POSITIONS["rotary"]), masks([9, 1, 30])
    tokens = torch.randint(11, key_mask.shape)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run_packed(model, tokens, key_mask=key_mask).square().sum(), [*model.parameters()])

    plain = gradients()
    with checkpoint_layers(model, every=every):
        assert all(map(torch.equal, gradients(), plain))
        later = run_packed(model, tokens, key_mask=key_mask).square().sum()
        run_packed(model, tokens[:1, :2], key_mask=masks([2]))  # other lengths come before the first are recomputed
    assert all(map(torch.equal, torch.autograd.grad(later, [*model.parameters()]), plain))


def test_decoders_stay_causal_within_each_sequence() -> None:
    torch.manual_seed(0)
    op = PackedAttention(TopKAttention(3))  # one op may serve all layers
    model = Decoder(11, 16, 2, lambda: SelfAttention(16, 4, op=op, position=RotaryEmbedding(4))).double()
    key_mask = masks([3, 17, 8])
    tokens = torch.randint(11, key_mask.shape)
    padded, packed = model(tokens, key_mask=key_mask), run_packed(model, tokens, key_mask=key_mask)
    torch.testing.assert_close(packed[key_mask], padded[key_mask])


def test_a_key_mask_still_holds_when_packed() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    op, mask = PackedAttention(), torch.rand(1, 1, 1, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    with op.packed(torch.tensor([4, 0, 5])):
        y = op(q, k, v, mask=mask)
    parts = [op(*(x[:, :, s] for x in (q, k, v)), mask=mask[..., s]) for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(y, torch.cat(parts, dim=2))


def test_gradcheck() -> None:
    op, q, k, v = PackedAttention(), *torch.randn(3, 1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    with op.packed(torch.tensor([2, 1, 2, 1])):
        assert torch.autograd.gradcheck(op, (q, k, v))


def test_flops_are_the_sum_over_the_sequences() -> None:
    op, lengths = PackedAttention(), torch.tensor([3, 50, 3, 17])
    q, k, v = torch.randn(3, 1, 2, int(lengths.sum()), 8)
    with op.packed(lengths):
        assert flops(lambda: op(q, k, v)) == sum(4 * 2 * 8 * n * n for n in lengths.tolist())


def test_padding_costs_nothing_in_any_layer() -> None:
    model, lengths = encoder(), [4, 4, 30]
    key_mask = masks(lengths)
    tokens = torch.randint(11, key_mask.shape)
    alone = sum(flops(lambda n=n: model(tokens[:1, :n])) for n in lengths)
    assert flops(lambda: run_packed(model, tokens, key_mask=key_mask)) == alone
    assert flops(lambda: model(tokens, key_mask=key_mask)) == 3 * flops(lambda: model(tokens[:1]))


def test_unpacked_it_is_the_op_inside() -> None:
    check_attention_op(PackedAttention())


def test_models_that_would_mix_sequences_are_refused() -> None:
    model = Encoder(11, 16, 1, lambda: SelfAttention(16, 4, is_causal=False))
    with pytest.raises(CombinationError, match="SelfAttention would mix tokens of different sequences"):
        run_packed(model, torch.zeros(1, 2, dtype=torch.long), key_mask=torch.ones(1, 2, dtype=torch.bool))


def test_lengths_that_do_not_add_up_are_refused() -> None:
    op, q = PackedAttention(), torch.randn(1, 2, 6, 4)
    with op.packed(torch.tensor([2, 3])), pytest.raises(ArgumentError, match="one row of 5 tokens"):
        op(q, q, q)
    torch.testing.assert_close(op(q, q, q), nn.functional.scaled_dot_product_attention(q, q, q))  # and left no trace
