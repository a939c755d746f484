"""How problem 4's texts are written, timed without the reading of the prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.lab.masking import MASK_TOKEN
from transformer_problems.models.llama import LlamaDecoder
from transformer_problems.solutions.decoding.generate import generate
from transformer_problems.solutions.decoding.mask_predict import mask_predict
from transformer_problems.solutions.decoding.speculative import (
    PromptLookup,
    SpeculativeGeneration,
    speculative_decode,
)

DRAFTED = 4
"""Tokens proposed for each pass of the target."""


@dataclass(frozen=True, slots=True)
class Method:
    """A model and the way it writes.

    Args:
        model: A decoder, or the encoder that Mask-Predict needs.
        use_cache: Keep keys and values, or run the whole prefix for each token.
        draft: Proposes tokens for speculative decoding.
        num_passes: Of Mask-Predict; 0 writes one token after the other.
    """

    model: nn.Module
    use_cache: bool = True
    draft: LlamaDecoder | PromptLookup | None = None
    num_passes: int = 0


@dataclass(frozen=True, slots=True)
class Writing:
    """A continued text, and what it took without the reading of the prompt and the token that follows from it.

    A draft model's reading is left out likewise, with the one proposal that follows from it.
    """

    tokens: Tensor  # [1, N]
    seconds: float
    num_tokens: int
    num_passes: int
    read: tuple[tuple[nn.Module, Tensor], ...] = ()  # the models and what they read as prompts
    speculation: SpeculativeGeneration | None = None

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens


class PromptClock:
    """A model that times how it reads prompts, so that this can be taken off: every method reads them in one pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.read: list[tuple[nn.Module, Tensor]] = []
        self.seconds = 0.0

    def __call__(self, tokens: Tensor, /) -> Tensor:
        logits: Tensor = self.model(tokens) if self.read else self._timed(tokens, partial(self.model, tokens))
        return logits

    def initial_state(self, batch_size: int, /) -> Any:
        return self.model.initial_state(batch_size)

    def stream(self, tokens: Tensor, state: Any, /) -> tuple[Tensor, Any]:
        step = partial(self.model.stream, tokens, state)
        result: tuple[Tensor, Any] = step() if state.num_seen else self._timed(tokens, step)
        return result

    def _timed(self, tokens: Tensor, step: Callable[[], Any]) -> Any:
        started = perf_counter()
        result = step()
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        self.seconds += perf_counter() - started
        self.read.append((self.model, tokens))
        return result


def write(method: Method, prompt: Tensor, num_tokens: int) -> Writing:
    """Continue one text greedily. prompt: [1, N].

    Each pass ends with a look at its logits, for which a GPU is waited for, so the clock need not wait again.
    """
    started = perf_counter()
    if method.num_passes:
        template = nn.functional.pad(prompt, (0, num_tokens), value=MASK_TOKEN)
        filled = mask_predict(method.model, template, num_passes=method.num_passes, mask_token=MASK_TOKEN)
        return Writing(filled.tokens, perf_counter() - started, num_tokens, filled.num_passes)
    target = PromptClock(method.model)
    clocks = [target]
    if method.draft is None:
        done = generate(target, prompt, num_tokens, use_cache=method.use_cache)
        tokens, num_passes, speculation = done.tokens, done.num_passes, None
    else:
        draft = method.draft if isinstance(method.draft, PromptLookup) else PromptClock(method.draft)
        if isinstance(draft, PromptClock):
            clocks.append(draft)
        speculation = speculative_decode(target, draft, prompt, num_tokens, num_draft_tokens=DRAFTED)
        tokens, num_passes = speculation.tokens, speculation.num_passes
    seconds = perf_counter() - started - sum(clock.seconds for clock in clocks)
    read = tuple(reading for clock in clocks for reading in clock.read)
    return Writing(tokens, seconds, num_tokens - 1, num_passes - 1, read, speculation)
