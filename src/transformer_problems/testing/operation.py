"""The contract of the AttentionOp slot."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from transformer_problems.core.slots import AttentionOp, PositionBias, PositionEncoding
from transformer_problems.testing.contract import (
    ContractReport,
    NotApplicable,
    assert_close,
    run_checks,
    stray_tensors_on_meta,
)

_LENGTHS = (1, 7, 63, 64, 101)
_TOLERANCE = 1e-9  # float64: rounding of sums of some hundred terms stays a thousand times below this


def check_attention_op(
    op: AttentionOp,
    *,
    num_heads: int = 4,
    head_dim: int = 8,
    max_seq_len: int | None = None,
    grouped: bool = True,
    seed: int = 0,
) -> ContractReport:
    """Check an attention op: shapes, misfits, causality, cached decoding, masks, grouped heads, gradients, dtypes.

    Args:
        op: The callable under test; see `core.slots.AttentionOp`. Modules with parameters must be in float64.
        max_seq_len: Longest sequence it takes, for ops of fixed length.
        grouped: Whether it takes fewer key/value heads than query heads.

    Raises:
        ContractError: With the report, if any check is broken.
    """
    subject = _OpSubject(op, num_heads, head_dim, max_seq_len, grouped, seed)
    checks: dict[str, Callable[[], str | None]] = {
        "shape and dtype": subject.check_shape,
        "leading dimensions": subject.check_leading_dimensions,
        "causality": subject.check_causality,
        "last queries only": subject.check_last_queries,
        "mask obedience": subject.check_mask,
        "nothing to attend to": subject.check_empty_rows,
        "no queries": subject.check_no_queries,
        "values for every key": subject.check_misfits,
        "one dtype and device": subject.check_kinds,
        "bias of another dtype": subject.check_bias_dtype,
        "grouped heads": subject.check_grouped,
        "gradients": subject.check_gradients,
        "half precision": subject.check_half_precision,
        "device": subject.check_device,
    }
    return run_checks(f"{type(op).__name__} as AttentionOp", checks)


class _Distance(PositionEncoding):
    """A bias of a given dtype, in steps of 1/8 from -2 to 0, which every floating-point dtype holds exactly."""

    attends = biases = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        distance = (q_positions[..., :, None] - k_positions[..., None, :]).abs()
        return (distance.clamp(max=16) / -8).to(self.dtype).unsqueeze(-3)


class _OpSubject:
    def __init__(
        self, op: AttentionOp, num_heads: int, head_dim: int, max_len: int | None, grouped: bool, seed: int
    ) -> None:
        self.op, self.num_heads, self.head_dim, self.grouped = op, num_heads, head_dim, grouped
        self.lengths = [n for n in _LENGTHS if max_len is None or n <= max_len]
        self.generator = torch.Generator().manual_seed(seed)
        causal = [True] if getattr(op, "accepts_causal", True) else []
        bidirectional = [False] if getattr(op, "accepts_bidirectional", True) else []
        self.directions = bidirectional + causal

    def qkv(self, length: int, *, batch: tuple[int, ...] = (2,), groups: int | None = None) -> tuple[Tensor, ...]:
        def draw(heads: int) -> Tensor:
            shape = (*batch, heads, length, self.head_dim)
            return torch.randn(shape, dtype=torch.float64, generator=self.generator)

        groups = groups or self.num_heads
        return draw(self.num_heads), draw(groups), draw(groups)

    def check_shape(self) -> None:
        for length in self.lengths:
            q, k, v = self.qkv(length)
            for is_causal in self.directions:
                y = self.op(q, k, v, is_causal=is_causal)
                assert y.shape == q.shape, f"output {tuple(y.shape)} for queries {tuple(q.shape)}"
                assert y.dtype == q.dtype, f"output {y.dtype} for input {q.dtype}"
                assert y.isfinite().all(), f"output is not finite at length {length}"

    def check_leading_dimensions(self) -> None:
        q, k, v = self.qkv(self.lengths[-1], batch=(3, 2))
        for is_causal in self.directions:
            whole = self.op(q, k, v, is_causal=is_causal)
            part = self.op(q[1, 1:], k[1, 1:], v[1, 1:], is_causal=is_causal)
            assert_close(part, whole[1, 1:], "one batch row alone", tolerance=_TOLERANCE)

    def check_causality(self) -> None:
        self._needs_causal()
        for length in self.lengths:
            (q, k, v), (_, k2, v2) = self.qkv(length), self.qkv(length)
            cut = length // 2
            late = torch.arange(length)[:, None] >= cut
            y = self.op(q, k, v, is_causal=True)
            changed = self.op(q, torch.where(late, k2, k), torch.where(late, v2, v), is_causal=True)
            what = f"queries before {cut} of {length} when later keys change"
            assert_close(changed[..., :cut, :], y[..., :cut, :], what, tolerance=_TOLERANCE)

    def check_last_queries(self) -> None:
        self._needs_causal()
        for length in self.lengths:
            q, k, v = self.qkv(length)
            whole = self.op(q, k, v, is_causal=True)
            for last in {1, length // 2, length} - {0}:
                part = self.op(q[..., -last:, :], k, v, is_causal=True)
                assert_close(part, whole[..., -last:, :], f"the last {last} of {length}", tolerance=_TOLERANCE)

    def check_mask(self) -> None:
        for length in self.lengths:
            (q, k, v), (_, k2, v2) = self.qkv(length), self.qkv(length)
            keep = torch.rand(2, length, generator=self.generator) < 0.7
            keep[:, 0] = True
            mask, column = keep[:, None, None, :], keep[:, None, :, None]
            for is_causal in self.directions:
                y = self.op(q, k, v, mask=mask, is_causal=is_causal)
                k_noise, v_noise = torch.where(column, k, k2), torch.where(column, v, v2)
                noisy = self.op(q, k_noise, v_noise, mask=mask, is_causal=is_causal)
                assert_close(noisy, y, f"length {length} when masked keys change", tolerance=_TOLERANCE)

    def check_empty_rows(self) -> None:
        q, k, v = self.qkv(self.lengths[-1])
        mask = torch.zeros(2, 1, 1, k.shape[-2], dtype=torch.bool)
        y = self.op(q, k, v, mask=mask, is_causal=self.directions[0])
        assert (y == 0).all(), "queries that may attend to nothing must give zeros"

    def check_no_queries(self) -> None:
        for length in self.lengths:
            q, k, v = (x.requires_grad_() for x in self.qkv(length))
            everything = torch.ones(2, 1, 1, length, dtype=torch.bool)
            for is_causal, mask in product(self.directions, (None, everything)):
                y = self.op(q[..., :0, :], k, v, mask=mask, is_causal=is_causal)
                expected = q[..., :0, :].shape
                assert y.shape == expected, f"output {tuple(y.shape)} for queries {tuple(expected)}"
                assert y.dtype == q.dtype, f"output {y.dtype} for input {q.dtype}"
                grads = torch.autograd.grad(y.sum(), (k, v), allow_unused=True)
                zero = all(grad is not None and bool((grad == 0).all()) for grad in grads)
                assert zero, f"no queries must give zero gradients for {length} keys and values"

    def check_misfits(self) -> None:
        q, k, v = self.qkv(self.lengths[-1])
        misfits = {
            "a value less than keys": (k, v[..., 1:, :]),
            "a value more than keys": (k, torch.cat([v, v[..., :1, :]], dim=-2)),
            "keys of another head dimension than queries": (k[..., 1:], v),
        }
        for (what, (keys, values)), is_causal in product(misfits.items(), self.directions):
            self._refuses(what, partial(self.op, q, keys, values, is_causal=is_causal))

    def check_kinds(self) -> None:
        inputs = self.qkv(self.lengths[-1])
        q, k, v = inputs
        mask = torch.ones(2, 1, 1, self.lengths[-1], dtype=torch.bool, device="meta")
        for is_causal in self.directions:
            for place, name in enumerate("qkv"):
                x = inputs[place]
                for what, changed in (("on another device", x.to("meta")), ("of whole numbers", x.long())):
                    given = [*inputs[:place], changed, *inputs[place + 1 :]]
                    call = partial(self.op, given[0], given[1], given[2], is_causal=is_causal)
                    self._refuses(f"{name} {what}", call)
                other = (*inputs[:place], x.bfloat16(), *inputs[place + 1 :])
                self._check_mixed(f"{name} of another dtype", other, is_causal)
            self._refuses("a mask on another device", partial(self.op, q, k, v, mask=mask, is_causal=is_causal))

    def _check_mixed(self, what: str, inputs: tuple[Tensor, ...], is_causal: bool) -> None:
        """Several dtypes are refused, or answered as if all were of the widest."""
        q, k, v = inputs
        try:
            y = self.op(q, k, v, is_causal=is_causal)
        except ValueError:
            return
        except Exception as error:
            message = f"{what} must raise ValueError, or be answered; raised {type(error).__name__}: {error}"
            raise AssertionError(message) from error
        expected = self.op(q.double(), k.double(), v.double(), is_causal=is_causal)
        assert_close(y, expected, what, tolerance=2**-4)  # the output may be in bfloat16

    def check_bias_dtype(self) -> None:
        if not getattr(self.op, "accepts_bias", True):
            raise NotApplicable("the op takes no bias")
        inputs = self.qkv(self.lengths[-1])
        places = torch.arange(self.lengths[-1])
        tolerances = {torch.float64: _TOLERANCE, torch.float32: 2**-10, torch.bfloat16: 2**-4}
        for is_causal, dtype, other in product(self.directions, tolerances, tolerances):
            q, k, v = (x.to(dtype) for x in inputs)
            y = self.op(q, k, v, bias=PositionBias(_Distance(other), q, places, places), is_causal=is_causal)
            assert y.dtype == dtype, f"output {y.dtype} for {dtype} queries and a {other} bias"
            q, k, v = q.double(), k.double(), v.double()
            bias = PositionBias(_Distance(torch.float64), q, places, places)
            expected = self.op(q, k, v, bias=bias, is_causal=is_causal)
            assert_close(y, expected, f"a {other} bias for {dtype} queries", tolerance=tolerances[dtype])

    @staticmethod
    def _refuses(what: str, call: Callable[[], Tensor]) -> None:
        try:
            call()
        except ValueError:
            return
        except Exception as error:
            raise AssertionError(f"{what} must raise ValueError; raised {type(error).__name__}: {error}") from error
        raise AssertionError(f"{what} must raise ValueError; an output came back")

    def check_grouped(self) -> None:
        if not self.grouped:
            raise NotApplicable("the op is built for one key/value head a query head")
        q, k, v = self.qkv(self.lengths[-1], groups=self.num_heads // 2)
        repeated = k.repeat_interleave(2, dim=-3), v.repeat_interleave(2, dim=-3)
        for is_causal in self.directions:
            expected = self.op(q, *repeated, is_causal=is_causal)
            assert_close(self.op(q, k, v, is_causal=is_causal), expected, "grouped heads", tolerance=_TOLERANCE)

    def check_gradients(self) -> None:
        inputs = tuple(t.requires_grad_() for t in self.qkv(min(6, self.lengths[-1]), batch=(1,)))
        for is_causal in self.directions:
            assert torch.autograd.gradcheck(
                lambda q, k, v, causal=is_causal: self.op(q, k, v, is_causal=causal), inputs, fast_mode=True
            )

    def check_half_precision(self) -> None:
        q, k, v = self.qkv(self.lengths[-1])
        for is_causal in self.directions:
            half = self.op(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=is_causal)
            assert half.dtype == torch.bfloat16, f"output {half.dtype} for bfloat16 input"
            # bfloat16 keeps 8 bits (2^-8 a step) and several roundings add up between input and output
            expected = self.op(q, k, v, is_causal=is_causal)
            assert_close(half, expected, "bfloat16 against float64", tolerance=2**-4)

    def check_device(self) -> None:
        q, k, v = self.qkv(self.lengths[-1])
        for is_causal in self.directions:
            with stray_tensors_on_meta():
                assert self.op(q, k, v, is_causal=is_causal).device == q.device, "output is on another device"

    def _needs_causal(self) -> None:
        if True not in self.directions:
            raise NotApplicable("the op cannot be causal")
