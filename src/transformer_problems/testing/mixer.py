"""The contract of the TokenMixer slot."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import CombinationError
from transformer_problems.testing.contract import (
    ContractReport,
    NotApplicable,
    assert_close,
    chunkings,
    run_checks,
    stray_tensors_on_meta,
)

_LENGTHS = (1, 7, 63, 64, 101)
_SPARE_TOKENS = 16  # what the storage of a state may have room for, beyond twice what it holds
_TOLERANCE = 1e-9  # float64: rounding of sums of some hundred terms stays a thousand times below this


def check_mixer(
    mixer: nn.Module | Callable[[], nn.Module],
    *,
    embed_dim: int,
    max_seq_len: int | None = None,
    stream_tolerance: float = _TOLERANCE,
    seed: int = 0,
) -> ContractReport:
    """Check a token mixer: causality, masks, batches, streaming, gradients, dtypes, devices, state.

    The module itself is not changed; the checks run on copies in float64 except where they test dtypes.

    Args:
        mixer: The module under test, see `core.slots.TokenMixer`, or better what makes one: a second one shows
            whether all that a mixer learned is in its state dict.
        embed_dim: C, the width it expects.
        max_seq_len: Longest sequence it takes, for mixers of fixed length.
        stream_tolerance: Relative difference allowed between streamed and whole, for lossy caches.

    Returns:
        The report, where every check holds or does not apply.

    Raises:
        ContractError: With the report, if any check is broken.
    """
    built, make = (mixer, None) if isinstance(mixer, nn.Module) else (mixer(), mixer)
    subject = _MixerSubject(built, make, embed_dim, max_seq_len, stream_tolerance, seed)
    checks: dict[str, Callable[[], str | None]] = {
        "shape and dtype": subject.check_shape,
        "no tokens": subject.check_no_tokens,
        "causality": subject.check_causality,
        "mask obedience": subject.check_mask,
        "masks of other lengths": subject.check_mask_length,
        "batch independence": subject.check_batch,
        "streamed equals whole": subject.check_streaming,
        "state stays valid": subject.check_branching,
        "bytes of the state": subject.check_state_bytes,
        "gradients": subject.check_gradients,
        "every parameter learns": subject.check_parameters,
        "half precision": subject.check_half_precision,
        "device": subject.check_device,
        "state dict round trip": subject.check_state_dict,
    }
    return run_checks(f"{type(built).__name__} as TokenMixer", checks)


class _MixerSubject:
    def __init__(
        self,
        mixer: nn.Module,
        make: Callable[[], nn.Module] | None,
        embed_dim: int,
        max_len: int | None,
        tolerance: float,
        seed: int,
    ) -> None:
        self.make, self.embed_dim, self.stream_tolerance = make, embed_dim, tolerance
        self.mixer = copy.deepcopy(mixer).cpu().double().eval()
        self.lengths = [n for n in _LENGTHS if max_len is None or n <= max_len]
        self.generator = torch.Generator().manual_seed(seed)

    def x(self, batch_size: int, length: int) -> Tensor:
        return torch.randn(batch_size, length, self.embed_dim, dtype=torch.float64, generator=self.generator)

    def check_shape(self) -> None:
        for length in self.lengths:
            x = self.x(2, length)
            y = self.mixer(x)
            assert y.shape == x.shape, f"output {tuple(y.shape)} for input {tuple(x.shape)}"
            assert y.dtype == x.dtype, f"output {y.dtype} for input {x.dtype}"
            assert y.isfinite().all(), f"output is not finite at length {length}"

    def check_no_tokens(self) -> None:
        nothing = self.x(2, 0)
        y = self.mixer(nothing)
        assert y.shape == nothing.shape, f"output {tuple(y.shape)} for input {tuple(nothing.shape)}"
        try:
            _, state = self._stream(self.x(2, 9), [4, 5])
        except NotApplicable:
            return
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        _, after = self._stream(nothing, [0], state)
        assert after.tensors().keys() == before.keys(), "an empty chunk changes what the state holds"
        for name, tensor in after.tensors().items():
            assert_close(tensor, before[name], f"{name} of the state after an empty chunk", tolerance=0.0)
        x = self.x(2, self.lengths[-1])
        streamed, _ = self._stream(x, [0, x.shape[1], 0])
        assert_close(streamed, self.mixer(x), "a stream with empty chunks", tolerance=self.stream_tolerance)

    def check_causality(self) -> None:
        if not self.mixer.is_causal:
            raise NotApplicable("the mixer sees both sides")
        for length in self.lengths:
            x = self.x(2, length)
            cut = length // 2
            changed = torch.cat([x[:, :cut], self.x(2, length - cut)], dim=1)
            what = f"tokens before {cut} of {length} when later ones change"
            assert_close(self.mixer(changed)[:, :cut], self.mixer(x)[:, :cut], what, tolerance=_TOLERANCE)

    def check_mask(self) -> None:
        for length in self.lengths:
            x = self.x(2, length)
            mask = torch.rand(2, length, generator=self.generator) < 0.7
            mask[:, 0] = True
            noise = torch.where(mask[..., None], x, self.x(2, length))
            what = f"real tokens of {length} when masked ones change"
            y, noisy = self.mixer(x, key_mask=mask), self.mixer(noise, key_mask=mask)
            assert_close(noisy[mask], y[mask], what, tolerance=_TOLERANCE)
            everything = self.mixer(x, key_mask=torch.ones_like(mask))
            assert_close(everything, self.mixer(x), "a mask of all True", tolerance=_TOLERANCE)

    def check_mask_length(self) -> None:
        num_tokens = self.lengths[-1]
        x = torch.ones(2, num_tokens, self.embed_dim, dtype=torch.float64)
        for length in sorted({1, num_tokens - 1, num_tokens + 1, 2 * num_tokens} - {num_tokens}):
            what = f"a mask of {length} for {num_tokens} tokens must raise ValueError"
            try:
                self.mixer(x, key_mask=torch.ones(2, length, dtype=torch.bool))
            except ValueError:
                continue
            except Exception as error:
                raise AssertionError(f"{what}; raised {type(error).__name__}: {error}") from error
            raise AssertionError(f"{what}; an output came back")

    def check_batch(self) -> None:
        for length in self.lengths:
            x = self.x(3, length)
            assert_close(self.mixer(x[1:2]), self.mixer(x)[1:2], "one row alone", tolerance=_TOLERANCE)

    def check_streaming(self) -> None:
        for length in self.lengths:
            x = self.x(2, length)
            whole = self.mixer(x)
            for sizes in chunkings(length, self.generator):
                streamed, _ = self._stream(x, sizes)
                assert_close(streamed, whole, f"chunks {sizes}", tolerance=self.stream_tolerance)

    def check_branching(self) -> None:
        prefix, one, other = self.x(2, 9), self.x(2, 5), self.x(2, 5)
        _, state = self._stream(prefix, [4, 5])
        with torch.no_grad():
            before, _ = self.mixer.stream(one, state)  # type: ignore[operator]
            self.mixer.stream(other, state)  # type: ignore[operator]
            after, _ = self.mixer.stream(one, state)  # type: ignore[operator]
        assert_close(after, before, "the same chunk after the same state", tolerance=_TOLERANCE)

    def check_state_bytes(self) -> None:
        x = torch.ones(2, self.lengths[-1], self.embed_dim, dtype=torch.float64)
        _, state = self._stream(x, [x.shape[1]])  # one chunk, of which a window keeps little
        tensors = state.tensors().values()
        held = sum(t.numel() * t.element_size() for t in tensors)
        assert state.num_bytes == held, f"num_bytes says {state.num_bytes}, its tensors hold {held}"
        storages = (t.untyped_storage() for t in tensors)
        stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        spare = _SPARE_TOKENS * 2 * x[:, 0].numel() * x.element_size()  # keys and values of a few tokens
        assert stored <= 2 * held + spare, f"its tensors lie in {stored} bytes of storage for {held} bytes held"

    def check_gradients(self) -> None:
        """Those of all tokens; where segments pass none on, those of the second one, which reads the first."""
        segment: int | None = getattr(self.mixer, "gradient_segment", None)
        num_past = segment or 0
        past = self.x(1, num_past)
        x = self.x(1, min(6, segment or 6, self.lengths[-1])).requires_grad_()

        def own(past: Tensor, x: Tensor) -> Tensor:
            y: Tensor = self.mixer(torch.cat([past, x], dim=1))
            return y[:, num_past:]

        assert torch.autograd.gradcheck(lambda x: own(past, x), (x,), fast_mode=True)
        passed_on = torch.autograd.grad(own(past.requires_grad_(), x).sum(), past, allow_unused=True)[0]
        assert passed_on is None or not passed_on.any(), f"gradients pass the segment of gradient_segment={segment}"

    def check_parameters(self) -> None:
        mixer = copy.deepcopy(self.mixer)
        mixer(self.x(2, self.lengths[-1])).square().sum().backward()
        for name, parameter in mixer.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.isfinite().all(), f"gradient of {name} is not finite"
            assert parameter.grad.any(), f"gradient of {name} is zero"

    def check_half_precision(self) -> str | None:
        length = self.lengths[-1]
        x = self.x(2, length)
        half = copy.deepcopy(self.mixer).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16, f"output {half.dtype} for bfloat16 input"
        expected = self.mixer(x)
        detail = None
        if getattr(self.mixer, "chooses_keys", False):
            worst = (half - expected).abs().amax(dim=-1)
            alike = worst <= worst.median()
            half, expected = half[alike], expected[alike]
            detail = "as far as half of the tokens show; rounding may turn the choice of keys of the others"
        # bfloat16 keeps 8 bits (2^-8 a step) and several roundings add up between input and output
        assert_close(half, expected, "bfloat16 against float64", tolerance=2**-4)
        return detail

    def check_device(self) -> None:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            mixer, x = copy.deepcopy(self.mixer).to(device), self.x(2, self.lengths[-1]).to(device)
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
            with stray_tensors_on_meta():
                assert mixer(x, key_mask=mask).device == x.device, "output is on another device than the input"

    def check_state_dict(self) -> str | None:
        x = self.x(1, self.lengths[-1])
        other = copy.deepcopy(self.mixer) if self.make is None else self.make().cpu().double().eval()
        with torch.no_grad():
            for entry in other.state_dict().values():
                if isinstance(entry, Tensor) and entry.is_floating_point():
                    entry.normal_()
        other.load_state_dict(self.mixer.state_dict())
        assert_close(other(x), self.mixer(x), "after loading its state dict", tolerance=0.0)
        return None if self.make else "as far as a copy shows; pass what makes a mixer to find state that is not saved"

    def _stream(self, x: Tensor, sizes: list[int], state: Any = None) -> tuple[Tensor, Any]:
        if not hasattr(self.mixer, "initial_state"):
            raise NotApplicable("the mixer does not stream")
        if not self.mixer.is_causal:
            raise NotApplicable("the mixer sees both sides")
        try:
            state = self.mixer.initial_state(x.shape[0]) if state is None else state  # type: ignore[operator]
        except CombinationError as reason:
            raise NotApplicable(f"it says: {reason}") from reason
        outputs = []
        with torch.no_grad():
            for chunk in torch.split(x, sizes, dim=1):
                y, state = self.mixer.stream(chunk, state)  # type: ignore[operator]
                outputs.append(y)
        return torch.cat(outputs, dim=1), state
