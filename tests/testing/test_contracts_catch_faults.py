"""Every check of every contract fires on a module that is broken in just that way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from transformer_problems import (
    DenseAttention,
    KNNMemoryAttention,
    RotaryEmbedding,
    SelfAttention,
    SlidingWindow,
    TransformerXL,
)
from transformer_problems.core.errors import ContractError
from transformer_problems.core.slots import PositionEncoding
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.testing import check_attention_op, check_mixer, check_position


class Faulty(SelfAttention):
    """Causal self-attention with one hook for a fault."""

    def __init__(self, **hooks: Callable) -> None:
        super().__init__(16, 2)
        self.hooks = hooks

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if "input" in self.hooks:
            x = self.hooks["input"](x)
        if "mask" in self.hooks:
            key_mask = self.hooks["mask"](key_mask)
        y = super().forward(x, key_mask=key_mask, positions=positions)
        return self.hooks["output"](y) if "output" in self.hooks else y

    def stream(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        return super().stream(x, self.hooks["state"](state) if "state" in self.hooks else state)


def forget_one(state: KVCache) -> KVCache:
    return replace(state, lookback=len(state) - 1).trimmed() if len(state) > 1 else state


FAULTS = {
    "shape and dtype": {"output": lambda y: y.float()},
    "causality": {"input": lambda x: x + x.mean(dim=1, keepdim=True)},
    "mask obedience": {"mask": lambda mask: None},
    "batch independence": {"output": lambda y: y + y.mean(dim=0, keepdim=True)},
    "streamed equals whole": {"state": forget_one},
    "gradients": {"output": lambda y: y.detach() + 0 * y},
    "half precision": {"output": lambda y: y.float()},
    "device": {"output": lambda y: y + torch.ones(y.shape[-1], dtype=y.dtype)},
}


@pytest.mark.parametrize(("check", "hooks"), FAULTS.items(), ids=FAULTS)
def test_check_mixer_finds(check: str, hooks: dict[str, Callable]) -> None:
    with pytest.raises(ContractError, match=rf"{check} +broken"):
        check_mixer(Faulty(**hooks), embed_dim=16)


@pytest.mark.parametrize("claimed", [None, 4])
def test_check_mixer_finds_gradients_that_stop_elsewhere_than_said(claimed: int | None) -> None:
    torch.manual_seed(0)  # gradcheck looks along one direction, in which one start in twelve loses next to nothing
    mixer = TransformerXL(16, 2, segment_len=3, memory_len=2)
    mixer.gradient_segment = claimed
    with pytest.raises(ContractError, match="gradients +broken"):
        check_mixer(mixer, embed_dim=16)


def test_check_mixer_finds_gradients_that_do_not_stop_as_said() -> None:
    mixer = SelfAttention(16, 2)
    mixer.gradient_segment = 3
    with pytest.raises(ContractError, match="gradients +broken: gradients pass the segment of gradient_segment=3"):
        check_mixer(mixer, embed_dim=16)


def test_check_mixer_forgives_turned_choices_in_half_precision_and_nothing_else() -> None:
    torch.manual_seed(0)
    mixer = KNNMemoryAttention(16, 2, segment_len=3, memory_len=9, num_neighbors=1)
    report = check_mixer(mixer, embed_dim=16)
    assert "half precision" in str(report) and "rounding may turn the choice of keys" in str(report)
    mixer.chooses_keys = False
    with pytest.raises(ContractError, match="half precision +broken: bfloat16 against float64"):
        check_mixer(mixer, embed_dim=16)

    class Coarse(KNNMemoryAttention):
        def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
            y = super().forward(x, key_mask=key_mask, positions=positions)
            return 1.2 * y if y.dtype == torch.bfloat16 else y

    with pytest.raises(ContractError, match="half precision +broken: bfloat16 against float64"):
        check_mixer(Coarse(16, 2, segment_len=3, memory_len=9, num_neighbors=1), embed_dim=16)


def test_check_mixer_finds_a_parameter_that_never_learns() -> None:
    mixer = SelfAttention(16, 2)
    mixer.idle = nn.Parameter(torch.zeros(3))
    with pytest.raises(ContractError, match="idle"):
        check_mixer(mixer, embed_dim=16)


def test_check_mixer_finds_a_parameter_that_counts_for_nothing() -> None:
    class Uncounted(SelfAttention):
        def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
            return super().forward(x, key_mask=key_mask, positions=positions) + 0 * self.idle.sum()

    mixer = Uncounted(16, 2)
    mixer.idle = nn.Parameter(torch.zeros(3))
    with pytest.raises(ContractError, match="every parameter learns +broken: gradient of idle is zero"):
        check_mixer(mixer, embed_dim=16)


class Scaled(SelfAttention):
    """Chooses a number when it is built."""

    def __init__(self, *, saved: bool) -> None:
        super().__init__(16, 2)
        scale = torch.rand((), dtype=torch.float64) + 1
        if saved:
            self.register_buffer("scale", scale)
        else:
            self.scale = float(scale)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return super().forward(x, key_mask=key_mask, positions=positions) * self.scale

    def stream(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        y, state = super().stream(x, state)
        return y * self.scale, state


def test_check_mixer_finds_what_is_not_saved_given_what_makes_a_mixer() -> None:
    with pytest.raises(ContractError, match="state dict round trip +broken: after loading"):
        check_mixer(lambda: Scaled(saved=False), embed_dim=16)
    complete = check_mixer(lambda: Scaled(saved=True), embed_dim=16)
    assert next(c.detail for c in complete.checks if c.name == "state dict round trip") == ""
    copied = check_mixer(Scaled(saved=False), embed_dim=16)
    assert "pass what makes a mixer" in str(copied)


def test_check_mixer_finds_one_that_cannot_take_no_tokens() -> None:
    with pytest.raises(ContractError, match="no tokens +broken"):
        check_mixer(Faulty(input=lambda x: x - x[:, -1:] if x.amax() else x), embed_dim=16)


def test_check_mixer_finds_a_state_that_an_empty_chunk_changes() -> None:
    with pytest.raises(ContractError, match="no tokens +broken.*empty chunk"):
        check_mixer(Faulty(state=forget_one), embed_dim=16)


def test_check_mixer_finds_a_state_that_changes_under_its_holder() -> None:
    class Shared(SelfAttention):
        def initial_state(self, batch_size: int) -> list[KVCache]:
            self.held = super().initial_state(batch_size)
            return self.held

        def stream(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
            y, self.held = super().stream(x, self.held)
            return y, self.held

    with pytest.raises(ContractError, match="state stays valid +broken"):
        check_mixer(Shared(16, 2), embed_dim=16)


def test_check_mixer_finds_a_mask_of_another_length_that_is_taken() -> None:
    class TakesAnyMask(SelfAttention):
        def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
            if key_mask is not None:
                longer = nn.functional.pad(key_mask, (0, x.shape[1]), value=True)
                key_mask = longer[:, : x.shape[1]]
            return super().forward(x, key_mask=key_mask, positions=positions)

    with pytest.raises(ContractError, match="masks of other lengths +broken: a mask of 1 for 101 tokens .*came back"):
        check_mixer(TakesAnyMask(16, 2), embed_dim=16)


def test_check_mixer_finds_a_mask_that_is_refused_without_a_word() -> None:
    class Careless(SelfAttention):
        def forward(self, x: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
            if key_mask is not None and key_mask.shape[1] > x.shape[1]:
                raise IndexError("out of range")
            return super().forward(x, key_mask=key_mask, positions=positions)

    with pytest.raises(ContractError, match="a mask of 102 for 101 tokens must .*; raised IndexError: out of"):
        check_mixer(Careless(16, 2), embed_dim=16)


class Held(SelfAttention):
    """Streams with a window of five tokens, through states of a given kind."""

    def __init__(self, kind: type[KVCache]) -> None:
        super().__init__(16, 2, op=SlidingWindow(5), cache=lambda batch_size: kind.empty(batch_size, lookback=5))


class NeverLetsGo(KVCache):
    """Shows the tokens it keeps and holds on to all that came."""

    def trimmed(self) -> "NeverLetsGo":
        num_left = len(self) - self.lookback
        return self if num_left <= 0 else replace(self, _dropped=self._dropped + num_left)


class Uncounted(KVCache):
    @property
    def num_bytes(self) -> int:
        return 8 * len(self)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (NeverLetsGo, r"its tensors lie in \d+ bytes of storage for \d+ bytes held"),
        (Uncounted, r"num_bytes says \d+, its tensors hold \d+"),
    ],
)
def test_check_mixer_finds_a_state_of_other_bytes_than_it_says(kind: type[KVCache], found: str) -> None:
    assert not check_mixer(Held(KVCache), embed_dim=16).broken
    with pytest.raises(ContractError, match=f"bytes of the state +broken: {found}"):
        check_mixer(Held(kind), embed_dim=16)


def test_check_mixer_reports_what_holds() -> None:
    report = check_mixer(SelfAttention(16, 2), embed_dim=16)
    assert not report.broken
    assert "streamed equals whole" in str(report)


class FaultyOp(DenseAttention):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, q, k, v, *, bias=None, mask=None, is_causal=False):
        if self.fault == "causality":
            is_causal = False
        if self.fault == "last queries only" and is_causal:
            n, m = q.shape[-2], k.shape[-2]
            top_left = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
            return super().forward(q, k, v, mask=top_left if mask is None else mask & top_left)
        if self.fault == "mask obedience":
            mask = None
        y = super().forward(q, k, v, bias=bias, mask=mask, is_causal=is_causal)
        if self.fault == "nothing to attend to" and mask is not None and not mask.any():
            return y + 1
        return y.detach() if self.fault == "gradients" else y


@pytest.mark.parametrize(
    "fault", ["causality", "last queries only", "mask obedience", "nothing to attend to", "gradients"]
)
def test_check_attention_op_finds(fault: str) -> None:
    with pytest.raises(ContractError, match=rf"{fault} +broken"):
        check_attention_op(FaultyOp(fault))


def cut_to_fit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, num_keys = min(q.shape[-1], k.shape[-1]), min(k.shape[-2], v.shape[-2])
    return q[..., :width], k[..., :num_keys, :width], v[..., :num_keys, :]


def raw(*_: Tensor) -> Tensor:
    raise RuntimeError("sizes do not match")


class AddsOne(torch.autograd.Function):
    """No output, and yet a gradient."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(k, v)
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        k, v = ctx.saved_tensors
        return grad, torch.zeros_like(k), torch.ones_like(v)


FAULTS_WITHOUT_QUERIES = {
    "raises": (raw, "raised RuntimeError: sizes do not match"),
    "one row": (lambda q, k, v: v[..., :1, :], r"output \(2, 4, 1, 8\) for queries \(2, 4, 0, 8\)"),
    "dtype": (lambda q, k, v: q.float(), "output torch.float32 for input torch.float64"),
    "no gradient for keys": (lambda q, k, v: q + v[..., :0, :], "zero gradients for 1 keys and values"),
    "gradient": (lambda q, k, v: AddsOne.apply(q, k, v), "zero gradients for 1 keys and values"),
}


@pytest.mark.parametrize("fault", FAULTS_WITHOUT_QUERIES)
def test_check_attention_op_finds_what_goes_wrong_without_queries(fault: str) -> None:
    answer, found = FAULTS_WITHOUT_QUERIES[fault]

    class Unready(DenseAttention):
        def forward(self, q, k, v, *, bias=None, mask=None, is_causal=False):
            y = super().forward(q, k, v, bias=bias, mask=mask, is_causal=is_causal)
            return y if q.shape[-2] else answer(q, k, v)

    with pytest.raises(ContractError, match=f"no queries +broken: .*{found}") as caught:
        check_attention_op(Unready())
    assert str(caught.value).count("broken:") == 1


MISFITS = {
    "a value less than keys": lambda q, k, v: v.shape[-2] < k.shape[-2],
    "a value more than keys": lambda q, k, v: v.shape[-2] > k.shape[-2],
    "keys of another head dimension than queries": lambda q, k, v: k.shape[-1] != q.shape[-1],
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize(
    ("answer", "found"), [(cut_to_fit, "an output came back"), (raw, "raised RuntimeError: sizes do not match")]
)
def test_check_attention_op_finds_misfits_that_are_not_refused(answer: Callable, found: str, misfit: str) -> None:
    class Careless(DenseAttention):
        def forward(self, q, k, v, *, bias=None, mask=None, is_causal=False):
            if MISFITS[misfit](q, k, v):
                q, k, v = answer(q, k, v)
            return super().forward(q, k, v, bias=bias, mask=mask, is_causal=is_causal)

    with pytest.raises(ContractError, match=f"values for every key +broken: {misfit} must raise ValueError; {found}"):
        check_attention_op(Careless())


class Blind(PositionEncoding):
    attends = True


class Undeclared(PositionEncoding):
    attends = True

    def bias(self, q, q_positions, k_positions):
        return (q_positions[..., :, None] - k_positions[..., None, :]).unsqueeze(-3).to(q.dtype)


class Longer(RotaryEmbedding):
    """Says nothing of the norms that it changes."""

    def rotate(self, q, k, q_positions, k_positions):
        q, k = super().rotate(q, k, q_positions, k_positions)
        return 2 * q, k


class FromZero(RotaryEmbedding):
    """Ignores where a chunk starts."""

    def rotate(self, q, k, q_positions, k_positions):
        return super().rotate(q, k, q_positions - q_positions[..., :1], k_positions)


@pytest.mark.parametrize(
    ("encoding", "check"),
    [
        (Blind(), "tells places apart"),
        (Undeclared(), "declares its hooks"),
        (Longer(8), "declares its hooks"),
        (FromZero(8), "part equals whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_check_position_finds(encoding: PositionEncoding, check: str) -> None:
    with pytest.raises(ContractError, match=rf"{check} +broken"):
        check_position(encoding, embed_dim=16, num_heads=2)
