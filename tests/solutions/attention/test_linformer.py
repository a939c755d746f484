"""Linformer against the formula, its ways of sharing, and its fixed length."""

import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError, SequenceTooLongError
from transformer_problems.core.slots import PositionBias
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.linformer import Linformer
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.alibi import ALiBi

HEADS, DIM, LONGEST, SHORT = 4, 8, 101, 16


def build(**arguments: object) -> Linformer:
    torch.manual_seed(0)
    return Linformer(LONGEST, SHORT, dtype=torch.float64, **arguments)  # type: ignore[arg-type]


def draw(num_queries: int, num_keys: int, *, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads(num: int, length: int) -> Tensor:
        return torch.randn(2, num, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    return heads(HEADS, num_queries), heads(groups, num_keys), heads(groups, num_keys)


def naive(op: Linformer, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """Head by head; real: [B, M]."""
    groups, num_keys = k.shape[1:3]
    rows = []
    for b in range(q.shape[0]):
        for h in range(HEADS):
            g = h * groups // HEADS
            e, f = (p if p.dim() == 2 else p[g] for p in (op.key_projection, op.value_projection))
            keep = torch.ones(num_keys, 1, dtype=q.dtype) if real is None else real[b, :, None].to(q.dtype)
            projected_k, projected_v = e[:, :num_keys] @ (k[b, g] * keep), f[:, :num_keys] @ (v[b, g] * keep)
            rows.append((q[b, h] @ projected_k.T / DIM**0.5).softmax(-1) @ projected_v)
    return torch.stack(rows).view(q.shape)


SHARING = {
    "key-value": {},
    "headwise": {"share_key_value": False},
    "per head, keys as values": {"num_heads": HEADS},
    "per head": {"num_heads": HEADS, "share_key_value": False},
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_the_formula(length: int, sharing: str) -> None:
    op = build(**SHARING[sharing])
    q, k, v = draw(length, length)
    ours, theirs = op(q, k, v), naive(op, q, k, v)
    # float64 sums of about a hundred terms of order one
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    inputs = (q, k, v, *op.parameters())
    weight = torch.randn_like(ours)
    ours_grads, theirs_grads = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-11, rtol=0)


def test_other_queries_than_keys_and_grouped_heads() -> None:
    op = build(num_heads=2)
    q, k, v = draw(7, 50, groups=2)
    torch.testing.assert_close(op(q, k, v), naive(op, q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("sharing", "matrices"), list(zip(SHARING, [1, 2, HEADS, 2 * HEADS], strict=True)))
def test_number_of_parameters(sharing: str, matrices: int) -> None:
    parameters = list(build(**SHARING[sharing]).parameters())
    assert sum(p.numel() for p in parameters) == matrices * LONGEST * SHORT


def test_one_instance_in_every_layer_is_one_matrix() -> None:
    op = Linformer(LONGEST, SHORT)
    model = Encoder(10, 32, 3, lambda: SelfAttention(32, HEADS, op=op, is_causal=False))
    projections = [p for name, p in model.named_parameters() if "projection" in name]
    assert len(projections) == 1 and projections[0] is op.key_projection
    model(torch.zeros(1, 20, dtype=torch.long)).sum().backward()
    assert op.key_projection.grad is not None


def test_masked_tokens_count_as_zeros() -> None:
    op = build(share_key_value=False)
    q, k, v = draw(50, 50)
    real = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    y = op(q, k, v, mask=real[:, None, None, :])
    torch.testing.assert_close(y, naive(op, q, k, v, real), atol=1e-12, rtol=0)
    # rows whose padding is at the end are the same as shorter rows
    end = torch.arange(50) < 30
    padded = op(q, k, v, mask=end[None, None, None, :])
    torch.testing.assert_close(padded, op(q, k[:, :, :30], v[:, :, :30]), atol=1e-12, rtol=0)
    assert (op(q, k, v, mask=torch.zeros(1, 1, 1, 50, dtype=torch.bool)) == 0).all()


def test_projected_keys_keep_their_variance() -> None:
    torch.manual_seed(0)
    op = Linformer(1024, 256)
    keys = torch.randn(1024, 64)
    # the mean of 2^14 squares, correlated within rows of 1,024: a few percent off at most
    assert (op.key_projection @ keys).var().item() == pytest.approx(1.0, abs=0.1)


def test_gradcheck() -> None:
    op = Linformer(6, 3, share_key_value=False, dtype=torch.float64)
    inputs = tuple(torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).requires_grad_().unbind())
    e, f = op.key_projection, op.value_projection

    def run(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
        return torch.func.functional_call(op, {"key_projection": e, "value_projection": f}, (q, k, v))

    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(run, (*leaves, e, f))


def test_bfloat16() -> None:
    op = build()
    q, k, v = (x.detach() for x in draw(64, 64))
    half = op(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    # a bfloat16 step is 2^-8: inputs, projections, projected keys, scores, weights and output each add half a step
    torch.testing.assert_close(half.double(), op(q, k, v), atol=2**-5, rtol=0)


def test_too_long_is_refused_with_the_remedy() -> None:
    op = build()
    q, k, v = draw(LONGEST + 1, LONGEST + 1)
    with pytest.raises(SequenceTooLongError, match=r"max_seq_len=101; got 102.*max_seq_len=102 or more"):
        op(q, k, v)


def test_causality_bias_and_wrong_heads_are_refused() -> None:
    q, k, v = draw(5, 5)
    with pytest.raises(ArgumentError, match="is_causal must be False"):
        build()(q, k, v, is_causal=True)
    with pytest.raises(ArgumentError, match=r"bias must be None for Linformer.*ALiBi"):
        build()(q, k, v, bias=PositionBias(ALiBi(HEADS), q, torch.arange(5), torch.arange(5)))
    with pytest.raises(ArgumentError, match="num_heads must equal the number of key/value heads; got 2 and 4"):
        build(num_heads=2)(q, k, v)
    with pytest.raises(ArgumentError, match="mask must be a key mask"):
        build()(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(CombinationError, match="Linformer cannot be causal"):
        SelfAttention(32, HEADS, op=build())
    for wrong in ({"max_seq_len": 0}, {"projected_len": 0}, {"num_heads": 0}):
        with pytest.raises(ArgumentError, match="must be positive; got 0"):
            Linformer(**{"max_seq_len": 8, "projected_len": 4, **wrong})
