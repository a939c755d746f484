"""Autoregressive decoding: one token for each pass of the model, with or without a cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError

_COLDEST = torch.finfo(torch.float32).tiny  # the inverse of a lower temperature is no number of float32


@runtime_checkable
class LanguageModel(Protocol):
    """A causal model of tokens, whole or streamed: [B, N] int -> logits [B, N, V]. `Decoder` is one."""

    def __call__(self, tokens: Tensor, /) -> Tensor: ...

    def initial_state(self, batch_size: int, /) -> Any: ...

    def stream(self, tokens: Tensor, state: Any, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote.

    Args:
        tokens: The prompt and the new tokens, [B, N + n].
        num_passes: Forward passes of the model that it took.
    """

    tokens: Tensor
    num_passes: int


@dataclass(frozen=True, slots=True)
class TokenSampler:
    """Draws tokens from logits.

    Args:
        temperature: Divides the logits; 0 takes the most probable token, as do temperatures near it.
        generator: Source of the draws; needed unless the temperature is 0.

    Raises:
        ArgumentError: If the temperature is negative, or above 0 without a generator.
    """

    temperature: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ArgumentError(f"temperature must not be negative; got {self.temperature}. Choose 0 or more.")
        if self.temperature > 0 and self.generator is None:
            raise ArgumentError(
                f"temperature {self.temperature} needs a generator to draw from. Pass generator="
                "torch.Generator().manual_seed(0), or temperature=0."
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, [..., V], in float32 at least; at temperature 0 all on the best token."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide = wide - wide.amax(dim=-1, keepdim=True)  # before the division, which would overflow to +inf
        return (wide / max(self.temperature, _COLDEST)).softmax(dim=-1)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token for each row, [B, V] -> [B]; rows need not sum to one."""
        if self.temperature == 0 or self.generator is None:
            return probabilities.argmax(dim=-1)
        drawn = torch.multinomial(probabilities.to(self.generator.device), 1, generator=self.generator)
        return drawn[:, 0].to(probabilities.device)

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers from [0, 1), as many as `like` has; all 0 at temperature 0, where nothing is left to chance."""
        if self.temperature == 0 or self.generator is None:
            return torch.zeros_like(like)
        drawn = torch.rand(like.shape, dtype=like.dtype, device=self.generator.device, generator=self.generator)
        return drawn.to(like.device)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Generation:
    """Continue a prompt token by token.

    With a cache the first pass reads the prompt and every other pass one token, so N tokens cost O(N) token steps
    (and, with softmax attention, O(N^2) scores). Without one each pass reads the whole prefix again: O(N^2) token
    steps for the same tokens, the baseline that decoders are measured against.

    Args:
        model: Predicts the next token; see `LanguageModel`.
        temperature: Divides the logits; 0 takes the most probable token.
        generator: Source of the draws; needed unless the temperature is 0.
        stop_token: Ends a row; rows that ended early are filled up with it. Default none.
        use_cache: Stream through the model's state, or run the whole prefix for each token.

    Shape:
        prompt: [B, N] int; tokens: [B, N + n], n = max_new_tokens or less where every row stopped.

    Raises:
        ArgumentError: If the prompt is empty or holds no tokens of the model's, a number is out of range, or the
            model's logits are not numbers.

    Source:
        Pope et al. 2022, arXiv:2211.05102, section 2.1 (decoding with cached keys and values).
    """
    check_prompt(prompt, max_new_tokens)
    sampler = TokenSampler(temperature, generator)
    tokens = unread = prompt
    state = model.initial_state(len(prompt)) if use_cache else None
    stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    num_passes = 0
    while num_passes < max_new_tokens and not bool(stopped.all()):
        with tokens_known(model, prompt):
            if use_cache:
                logits, state = model.stream(unread, state)
            else:
                logits = model(tokens)
        num_passes += 1
        check_logits(logits[:, -1], f"step {num_passes}")
        new = sampler.draw(sampler.probabilities(logits[:, -1]))
        if stop_token is not None:
            new = new.masked_fill(stopped, stop_token)
            stopped = new == stop_token
        unread = new[:, None]
        tokens = torch.cat([tokens, unread], dim=1)
    return Generation(tokens, num_passes)


def check_prompt(prompt: Tensor, max_new_tokens: int) -> None:
    """Refuse prompts and lengths that no decoder can start from."""
    require_positive_int(max_new_tokens=max_new_tokens)
    check_texts(prompt, "prompt")


def check_texts(tokens: Tensor, name: str) -> None:
    """Refuse what is no batch of texts of at least one token."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{name} must hold tokens as torch.int64 or torch.int32; got {tokens.dtype}. Pass {name}.long()."
        )
    if tokens.dim() != 2:
        raise ArgumentError(f"{name} must be [B, N]; got {list(tokens.shape)}. Pass one text as {name}[None].")
    if tokens.numel() == 0:
        raise ArgumentError(
            f"{name} must be [B, N] with at least one token in each row; got {list(tokens.shape)}. "
            "Begin every text with a start token."
        )
    if int(tokens.min()) < 0:
        raise ArgumentError(
            f"{name} must hold tokens from 0 on; got {int(tokens.min())}. Cut padding off: decode texts of one length "
            "together."
        )


@contextmanager
def tokens_known(model: Callable[[Tensor], Tensor], tokens: Tensor, name: str = "prompt") -> Iterator[None]:
    """Name the text where a pass inside fails because the model's vocabulary lacks one of its tokens.

    The vocabulary is asked for only then, for that takes a pass.
    """
    try:
        yield
    except IndexError as error:
        vocab_size, largest = model(tokens.new_zeros(1, 1)).shape[-1], int(tokens.max())
        if largest < vocab_size:
            raise
        raise ArgumentError(
            f"{name} must hold tokens from 0 to {vocab_size - 1}, the model's vocabulary; got {largest}. "
            "Encode the text with the model's own tokenizer."
        ) from error


def check_logits(logits: Tensor, where: str) -> None:
    """Refuse logits from which no distribution follows; -inf is allowed, it forbids a token."""
    if bool((logits.isnan() | (logits == float("inf"))).any()):
        raise ArgumentError(
            f"model must give logits that are numbers; those of {where} hold NaN or +inf. "
            "Check its weights, or decode in a wider dtype."
        )
