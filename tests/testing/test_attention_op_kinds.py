"""What the contract of attention ops asks of dtypes and devices fires on ops that are broken in just that way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_problems import DenseAttention
from transformer_problems.core.errors import ContractError
from transformer_problems.testing import check_attention_op


class Unchecked(DenseAttention):
    """Answers without a check, after something was done to its inputs."""

    def __init__(self, prepare: Callable) -> None:
        super().__init__()
        self.prepare = prepare

    def forward(self, q, k, v, *, bias=None, mask=None, is_causal=False):
        if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
            raise ValueError("misfits")
        q, k, v, bias, mask = self.prepare(q, k, v, bias, mask)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias.dense()
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
            mask = causal if mask is None else mask & causal
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num().to(v.dtype) @ v


def here(x: Tensor | None) -> Tensor | None:
    return torch.zeros_like(x, device="cpu") if x is not None and x.is_meta else x


def as_they_come(q, k, v, bias, mask):
    return q, k, v, bias, mask


def all_here(q, k, v, bias, mask):
    return here(q), here(k), here(v), bias, here(mask)


def no_integers(q, k, v, bias, mask):
    if not all(x.is_floating_point() for x in (q, k, v)) or any(x is not None and x.is_meta for x in (q, k, v, mask)):
        raise ValueError("not these")
    return q, k, v, bias, mask


def widened(q, k, v, bias, mask):
    no_integers(q, k, v, bias, mask)
    widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(widest), k.to(widest), v.to(widest), bias, mask


def forgetful(q, k, v, bias, mask):
    wide = widened(q, k, v, bias, mask)
    return (wide[0], 0 * wide[1], *wide[2:]) if k.dtype != q.dtype else wide


def only_here(q, k, v, bias, mask):
    if any(x is not None and x.is_meta for x in (q, k, v, mask)):
        raise RuntimeError("another device")
    return q, k, v, bias, mask


KINDS = {
    "unseen": (as_they_come, "q on another device must raise ValueError; an output came back"),
    "raw": (only_here, "q on another device must raise ValueError; raised RuntimeError: another device"),
    "moved": (all_here, "q on another device must raise ValueError; an output came back"),
    "several dtypes": (no_integers, "q of another dtype must raise ValueError, or be answered; raised RuntimeError"),
    "wrong answer": (forgetful, "q of another dtype: differs by"),
}


@pytest.mark.parametrize("fault", KINDS)
def test_check_attention_op_finds_other_dtypes_and_devices_that_are_not_refused(fault: str) -> None:
    prepare, found = KINDS[fault]
    with pytest.raises(ContractError, match=f"one dtype and device +broken: {found}"):
        check_attention_op(Unchecked(prepare), grouped=False)


def test_check_attention_op_takes_several_dtypes_answered_in_the_widest() -> None:
    report = check_attention_op(Unchecked(widened), grouped=False)
    assert next(check.outcome for check in report.checks if check.name == "one dtype and device") == "holds"


class Told(DenseAttention):
    """Lets a bias decide."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, q, k, v, *, bias=None, mask=None, is_causal=False):
        kind = q.dtype if bias is None else bias.dense().dtype
        if self.fault == "refuses" and kind != q.dtype:
            raise RuntimeError("expected one dtype")
        y = super().forward(q, k, v, bias=bias, mask=mask, is_causal=is_causal)
        return y.to(kind) if self.fault == "dtype" else y


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("refuses", "raised RuntimeError: expected one dtype"),
        ("dtype", "output torch.float32 for torch.float64 queries and a torch.float32 bias"),
    ],
)
def test_check_attention_op_finds_a_bias_whose_dtype_decides(fault: str, found: str) -> None:
    with pytest.raises(ContractError, match=f"bias of another dtype +broken: {found}"):
        check_attention_op(Told(fault))
