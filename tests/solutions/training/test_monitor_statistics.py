"""What a training monitor measures, against answers known on paper, naive formulas and PyTorch's own weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.slots import PositionBias
from transformer_problems.solutions.attention.dense import DenseAttention
from transformer_problems.solutions.attention.packing import PackedAttention
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi
from transformer_problems.solutions.position.shaw import ShawRelative
from transformer_problems.solutions.training.monitor_statistics import (
    AttentionStatistics,
    attention_readers,
    holds_tokens,
    multihead_statistics,
    op_statistics,
    token_similarity,
    total_norm,
)

LENGTHS = [1, 63, 64, 100, 101]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def known(scores: Tensor, allowed: Tensor, bias: Tensor | float = 0.0) -> AttentionStatistics:
    """By definition, one query at a time. scores, allowed: [R, M], and what is added to the scores."""
    entropies, shares, added = [], [], torch.as_tensor(bias).expand_as(scores)
    for row, visible, term in zip(scores, allowed, added, strict=True):
        weights = (row + term)[visible].softmax(-1)
        if len(weights) > 1:
            entropies.append(-sum(w * math.log(w) for w in weights.tolist() if w > 0))
            shares.append(entropies[-1] / math.log(len(weights)))
    mean = [sum(x) / len(x) if x else None for x in (entropies, shares)]
    return AttentionStatistics(float(scores[allowed].abs().max()), *mean)


def agree(found: AttentionStatistics | None, expected: AttentionStatistics, rel: float = 1e-10) -> bool:
    """Float64 rounds at 1e-16 of each of some thousand terms."""
    assert found is not None
    pairs = ((found.largest_logit, expected.largest_logit), (found.entropy, expected.entropy))
    pairs += ((found.entropy_share, expected.entropy_share),)
    return all(a == b if b is None else a == pytest.approx(b, rel=rel) for a, b in pairs)


def test_norm_of_several_tensors() -> None:
    assert total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == 5.0
    assert total_norm([]) == 0.0
    half = torch.full((4,), 60_000.0, dtype=torch.float16)
    assert total_norm([half]) == 2 * half[0].item()  # beyond what float16 can hold
    assert total_norm([torch.tensor([float("inf"), 1.0])]) == math.inf


def test_identical_tokens_are_of_similarity_one() -> None:
    assert token_similarity(draw(1, 1, 8).expand(2, 9, 8)) == pytest.approx(1.0, rel=1e-12)


def test_orthogonal_and_opposite_tokens() -> None:
    assert token_similarity(torch.eye(6)[None]) == pytest.approx(0.0, abs=1e-6)  # float32
    assert token_similarity(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])) == -1.0


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_similarity_is_the_mean_cosine_of_pairs_of_the_first_example(length: int) -> None:
    hidden = draw(3, length, 5) + 1.0
    pairs = nn.functional.cosine_similarity(hidden[0, :, None], hidden[0, None, :], dim=-1)
    expected = float(pairs[~torch.eye(length, dtype=torch.bool)].mean())
    assert token_similarity(hidden) == pytest.approx(expected, rel=1e-10)
    assert token_similarity((hidden, None)) == pytest.approx(expected, rel=1e-10)
    assert token_similarity(hidden.transpose(0, 1), batch_first=False) == pytest.approx(expected, rel=1e-10)
    assert token_similarity(hidden[0]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "output", [draw(2, 1, 4), draw(2, 4, 3, 3), draw(0, 4, 3), torch.ones(2, 3, 4, dtype=torch.long), {}, (), None]
)
def test_what_holds_no_two_tokens_has_no_similarity(output: object) -> None:
    assert token_similarity(output) is None


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_op_statistics_are_those_of_the_naive_formula(length: int, is_causal: bool) -> None:
    """Grouped heads, a key mask, and two examples of three; up to 64 tokens every query counts, beyond every second."""
    q, k = draw(3, 4, length, 8), draw(3, 2, length, 8, seed=1)
    mask = torch.rand(3, 1, 1, length, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[..., 0] = True
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    allowed = mask.expand_as(scores)
    if is_causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    rows = slice(None) if length <= 64 else slice((length - 1) % 2, None, 2)
    expected = known(scores[:2, :, rows].flatten(0, 2), allowed[:2, :, rows].flatten(0, 2))
    assert agree(op_statistics(q, k, k, mask=mask, is_causal=is_causal), expected)


def test_queries_may_be_the_last_of_more_keys() -> None:
    q, k = draw(1, 1, 3, 4), draw(1, 1, 7, 4, seed=1)
    allowed = torch.ones(3, 7, dtype=torch.bool).tril(4)
    assert agree(op_statistics(q, k, k, is_causal=True), known((q @ k.mT / 2)[0, 0], allowed))


@pytest.mark.parametrize("length", [9, 101])
@pytest.mark.parametrize("make", [lambda: ALiBi(2), lambda: ShawRelative(4, max_distance=3, dtype=torch.float64)])
def test_a_bias_changes_the_entropy_and_not_the_logit(make, length: int) -> None:
    q, k, positions = draw(3, 2, length, 4), draw(3, 2, length, 4, seed=1), torch.arange(length)
    with torch.no_grad():
        bias = PositionBias(make(), q, positions, positions)
    dense = bias.dense().detach().expand(3, 2, length, length)
    rows = slice((length - 1) % 2 if length > 64 else 0, None, 2 if length > 64 else 1)
    expected = known(
        (q @ k.mT / 2)[:2, :, rows].flatten(0, 2),
        torch.ones(length, length, dtype=torch.bool).tril()[rows].repeat(4, 1),
        dense[:2, :, rows].flatten(0, 2),
    )
    found = op_statistics(q, k, k, bias=bias, is_causal=True)
    assert agree(found, expected, rel=1e-5)  # ALiBi's slopes are float32
    assert not agree(found, op_statistics(q, k, k, is_causal=True), rel=1e-5)


def test_uniform_attention_has_the_entropy_log_n() -> None:
    found = op_statistics(torch.zeros(1, 2, 10, 4), draw(1, 2, 10, 4).float(), torch.zeros(1, 2, 10, 4))
    assert found == AttentionStatistics(0.0, pytest.approx(math.log(10)), pytest.approx(1.0))


def test_one_hot_attention_has_no_entropy() -> None:
    x = 100 * torch.eye(5).repeat(1, 1, 1, 1)
    found = op_statistics(x, x, x)
    assert found == AttentionStatistics(pytest.approx(1e4 / math.sqrt(5)), 0.0, 0.0)


def test_the_largest_logit_is_one_that_may_be_attended_to() -> None:
    q, k = torch.ones(1, 1, 3, 1), torch.tensor([1.0, -7.0, 9.0]).view(1, 1, 3, 1)
    assert op_statistics(q, k, k).largest_logit == 9.0
    assert op_statistics(q, k, k, mask=torch.tensor([True, True, False])).largest_logit == 7.0
    assert op_statistics(q[..., :2, :], k[..., :2, :], k[..., :2, :], is_causal=True).largest_logit == 7.0
    assert op_statistics(q, k, k, mask=torch.zeros(3, dtype=torch.bool)) is None
    assert op_statistics(q[..., :1, :], k[..., :1, :], k, is_causal=True) == AttentionStatistics(1.0, None, None)


def by_hand(module: nn.MultiheadAttention, query: Tensor, key: Tensor, **keywords: Tensor) -> tuple[float, float]:
    """Entropy in nats and as a share from the weights that PyTorch's module returns."""
    with torch.no_grad():
        weights = module(query, key, key[..., : module.vdim], average_attn_weights=False, **keywords)[1]
    entropies = torch.special.entr(weights).sum(-1)
    num_keys = (weights > 0).sum(-1)
    seen = num_keys > 1
    return float(entropies[seen].mean()), float((entropies[seen] / num_keys[seen].double().log()).mean())


def causal(length: int, *, as_float: bool) -> Tensor:
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, float("-inf")) if as_float else hidden


@pytest.mark.parametrize("masked", ["none", "bool", "float", "heads", "padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_statistics_are_those_of_its_own_weights(masked: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    nn.init.normal_(module.in_proj_bias)
    x, padding = draw(2, 11, 8), torch.zeros(2, 11, dtype=torch.bool)
    padding[0, 8:] = True
    masks = {
        "none": {},
        "bool": {"attn_mask": causal(11, as_float=False)},
        "float": {"attn_mask": causal(11, as_float=True) + 0.5 * draw(11, 11, seed=3)},
        "heads": {"attn_mask": causal(11, as_float=False).repeat(4, 1, 1)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal(11, as_float=False), "key_padding_mask": padding},
    }[masked]
    x = x if batch_first else x.transpose(0, 1)
    found = multihead_statistics(module, x, x, x, **masks)
    assert (found.entropy, found.entropy_share) == pytest.approx(by_hand(module, x, x, **masks), rel=1e-10)


def test_multihead_logits_are_those_of_its_projections() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = draw(1, 5, 8)
    weight = module.in_proj_weight.detach()
    q, k = ((x[0] @ w.T).view(5, 2, 4).transpose(0, 1) for w in (weight[:8], weight[8:16]))
    expected = float((q @ k.mT / 2).abs().max())
    assert multihead_statistics(module, x, x, x).largest_logit == pytest.approx(expected, rel=1e-12)


def test_multihead_with_keys_of_another_width_and_without_a_batch() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False, batch_first=True, dtype=torch.float64)
    query, key = draw(7, 8), draw(4, 6, seed=1)
    found = multihead_statistics(module, query, key, key[:, :5])
    assert (found.entropy, found.entropy_share) == pytest.approx(by_hand(module, query, key), rel=1e-10)


def test_a_large_negative_number_hides_a_key_too() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = draw(2, 5, 8).float()
    mask = torch.zeros(5, 5).masked_fill(causal(5, as_float=False), torch.finfo(torch.float32).min)
    expected = multihead_statistics(module, x, x, x, attn_mask=causal(5, as_float=False))
    assert agree(multihead_statistics(module, x, x, x, attn_mask=mask), expected, rel=1e-5)  # float32


def test_autocast_does_not_round_them() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), draw(1, 5, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = multihead_statistics(module, x, x, x), op_statistics(x, x, x)
    assert rounded == (multihead_statistics(module, x, x, x), op_statistics(x, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_may_be_of_the_models_dtype(dtype: torch.dtype) -> None:
    """Under autocast, queries are bfloat16 and an encoding's weights float32; without it, both are of one dtype."""
    q, positions = draw(1, 2, 6, 4).bfloat16(), torch.arange(6)
    torch.manual_seed(0)
    encoding = ShawRelative(4, max_distance=3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        found = op_statistics(q, q, q, bias=PositionBias(encoding, q, positions, positions))
    with torch.no_grad():
        bias = PositionBias(encoding.double(), q.double(), positions, positions).dense().flatten(0, 2)
    expected = known((q.double() @ q.double().mT / 2).flatten(0, 2), torch.ones(12, 6, dtype=torch.bool), bias)
    assert agree(found, expected, rel=2**-7)  # the bias is rounded to bfloat16


def test_readers_are_found_and_what_is_no_attention_is_not() -> None:
    op = DenseAttention()
    layer = nn.ModuleList([SelfAttention(8, 2, op=op), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    assert [module for module, _ in attention_readers(layer)] == [op, layer[1]]
    nested = SelfAttention(8, 2, op=PackedAttention(op=op))
    assert [module for module, _ in attention_readers(nested)] == [op]
    other = nn.Module()
    other.op = nn.Linear(8, 8)
    adds_keys = nn.MultiheadAttention(8, 2, add_zero_attn=True), nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert not [*attention_readers(other), *attention_readers(nn.ModuleList(adds_keys))]


@pytest.mark.parametrize(
    ("layer", "output", "expected"),
    [
        (nn.Linear(8, 8), (2, 9, 8), True),
        (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), (2, 9, 8), True),
        (nn.Linear(8, 8), (9, 8), False),  # of examples
        (nn.Conv1d(8, 8, 3, padding=1), (2, 8, 9), False),  # of channels
        (nn.Conv1d(8, 8, 8), (2, 8, 8), False),
        (nn.ReLU(), (2, 9, 8), False),
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), (9, 8), True),
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), (2, 9, 8), True),
        (SelfAttention(8, 2), (2, 9, 8), True),
    ],
)
def test_tokens_are_where_there_is_evidence_of_them(layer: nn.Module, output: tuple[int, ...], expected: bool) -> None:
    assert holds_tokens(layer, draw(*output)) is expected
    assert holds_tokens(layer, (draw(*output), None)) is expected
