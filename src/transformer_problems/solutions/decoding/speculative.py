"""Speculative decoding: a cheap draft proposes tokens, one pass of the target checks them all."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.decoding.generate import (
    LanguageModel,
    TokenSampler,
    check_logits,
    check_prompt,
    tokens_known,
)


class Draft(Protocol):
    """Guesses what comes next without a distribution: [B, N] tokens -> [B, g] more, 0 <= g <= num_tokens."""

    def __call__(self, tokens: Tensor, num_tokens: int, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SpeculativeGeneration:
    """What the target wrote with a draft's help.

    Args:
        tokens: The prompt and the new tokens, [B, N + n].
        num_passes: Forward passes of the target, the prompt's included.
        num_draft_passes: Forward passes of a draft model; 0 for other drafts.
        num_drafted: Tokens proposed, over all rows that had not stopped.
        num_tested: Of those, the ones that stood before or at the first rejection of their row.
        num_accepted: Of those, the ones that passed.
    """

    tokens: Tensor
    num_passes: int
    num_draft_passes: int
    num_drafted: int
    num_tested: int
    num_accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Share of tested tokens that passed, the paper's alpha; 0 where nothing was tested."""
        return self.num_accepted / self.num_tested if self.num_tested else 0.0


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """A draft without a model: what followed the last time the newest tokens appeared.

    The longest of the last `ngram_size`, ..., 1 tokens that stands earlier in the text is continued as it was then.
    Costs a scan of the text, and helps where text repeats itself: quotations, code, summaries.

    Args:
        ngram_size: Longest suffix that is looked up, in tokens.

    Shape:
        tokens: [B, N]; output: [B, g], g the least that any row found.

    Raises:
        ArgumentError: If `ngram_size` is not positive.

    Source:
        Saxena 2023, "Prompt Lookup Decoding", github.com/apoorvumang/prompt-lookup-decoding.
        Differs from the source: of several places it takes the latest with enough tokens after it, not the first.
    """

    ngram_size: int = 3

    def __post_init__(self) -> None:
        require_positive_int(ngram_size=self.ngram_size)

    def __call__(self, tokens: Tensor, num_tokens: int, /) -> Tensor:
        found = [self._continuation(row, num_tokens) for row in tokens]
        shortest = min(len(continuation) for continuation in found)
        return torch.stack([continuation[:shortest] for continuation in found])

    def _continuation(self, row: Tensor, num_tokens: int) -> Tensor:
        for size in range(min(self.ngram_size, len(row) - 1), 0, -1):
            same = (row[:-1].unfold(0, size, 1) == row[-size:]).all(dim=1)
            starts = same.nonzero()[:, 0] + size
            if len(starts):
                long_enough = starts[starts + num_tokens <= len(row)]
                start = int(long_enough[-1] if len(long_enough) else starts[0])
                return row[start : start + num_tokens]
        return row[:0]


@torch.no_grad()
def speculative_decode(
    target: LanguageModel,
    draft: LanguageModel | Draft,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    num_draft_tokens: int = 4,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> SpeculativeGeneration:
    """Continue a prompt with the target's distribution, several tokens for each of its passes.

    The draft proposes g tokens; one pass of the target gives its distribution p after each. A token x drawn from the
    draft's q is accepted with probability min(1, p(x) / q(x)); at the first rejection one is drawn from the
    normalised max(0, p - q) instead, and after g acceptances one more from p. So every pass adds 1 to g + 1 tokens,
    and text is distributed exactly as the target's own, at temperature 0 equal to it, up to rounding.

    Rows of a batch advance together, as far as the row with the earliest rejection; one row at a time is fastest.

    Args:
        target: The model whose text it is. Its state must be one that `KVCache` layers make, for it has to give
            rejected tokens back.
        draft: A smaller model with the same vocabulary, or a guess without a distribution such as `PromptLookup`.
        num_draft_tokens: g, tokens proposed for each pass of the target.
        temperature: Divides the logits of both; 0 takes the most probable token.
        generator: Source of the draws; needed unless the temperature is 0.
        stop_token: Ends a row; rows that ended early are filled up with it. Default none.

    Shape:
        prompt: [B, N] int; tokens: [B, N + n], n = max_new_tokens or less where every row stopped.

    Raises:
        ArgumentError: If the prompt is empty or holds no tokens of the target's, a number is out of range, the
            vocabularies differ, a guess holds no tokens of the target's or too many, or logits are not numbers.
        CombinationError: If the target's state cannot give tokens back.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
        Differs from the paper: the prompt takes a pass of its own, and batches advance in step.
    """
    check_prompt(prompt, max_new_tokens)
    require_positive_int(num_draft_tokens=num_draft_tokens)
    sampler = TokenSampler(temperature, generator)
    with tokens_known(target, prompt):
        logits, state = target.stream(prompt, target.initial_state(len(prompt)))
    check_logits(logits[:, -1], "the prompt")
    _check_gives_back(state)
    drafter = _Drafter(draft, sampler, prompt, vocab_size=logits.shape[-1])
    text = _joined(prompt, sampler.draw(sampler.probabilities(logits[:, -1])))
    tokens, writing = _until(stop_token, text, prompt.shape[1])
    end, num_passes, drafted, tested, accepted = prompt.shape[1] + max_new_tokens, 1, 0, 0, 0
    while tokens.shape[1] < end and bool(writing.any()):
        proposed, q = drafter.propose(tokens, min(num_draft_tokens, end - tokens.shape[1] - 1))
        logits, state = target.stream(torch.cat([tokens[:, -1:], proposed], dim=1), state)
        num_passes += 1
        check_logits(logits, f"pass {num_passes}")
        runs, following = _verified(sampler, sampler.probabilities(logits), q, proposed, writing)
        taken = int(runs.min())
        text = _joined(torch.cat([tokens, proposed[:, :taken]], dim=1), following)
        if taken < proposed.shape[1]:
            state = _rewound(state, text.shape[1] - 1)
        drafted += proposed[writing].numel()
        tested += int((runs[writing] + 1).clamp(max=proposed.shape[1]).sum())
        accepted += int(runs[writing].sum())
        tokens, writing = _until(stop_token, text, prompt.shape[1])
    return SpeculativeGeneration(tokens, num_passes, drafter.num_passes, drafted, tested, accepted)


def predicted_speedup(acceptance: float, num_draft_tokens: int, cost_ratio: float) -> float:
    """Expected gain in time over plain decoding, (1 - a^(g+1)) / ((1 - a) (g c + 1)).

    Args:
        acceptance: a, probability that a drafted token is accepted.
        num_draft_tokens: g, tokens proposed for each pass of the target.
        cost_ratio: c, time of a draft's pass over that of the target's.

    Raises:
        ArgumentError: If a number is out of range.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8.
    """
    require_positive_int(num_draft_tokens=num_draft_tokens)
    if not 0 <= acceptance <= 1:
        raise ArgumentError(f"acceptance must be a probability; got {acceptance}. Choose from 0 to 1.")
    if not cost_ratio >= 0:
        raise ArgumentError(f"cost_ratio must not be negative; got {cost_ratio}. Choose 0 for a draft that is free.")
    tokens_per_pass = sum(acceptance**i for i in range(num_draft_tokens + 1))
    return tokens_per_pass / (num_draft_tokens * cost_ratio + 1)


class _Drafter:
    """The draft during one decoding: proposals with their distribution, and a model's states along the text.

    A state stays valid when it is continued, so the states after each token are kept until it is known which of them
    the accepted text goes through.
    """

    def __init__(self, draft: LanguageModel | Draft, sampler: TokenSampler, prompt: Tensor, *, vocab_size: int) -> None:
        self.draft, self.sampler, self.vocab_size, self.num_passes = draft, sampler, vocab_size, 0
        self.states: list[tuple[int, Any]] = []  # tokens read, state after them
        if isinstance(draft, LanguageModel):
            self._check_vocabulary(draft, prompt)
            self.states = [(0, draft.initial_state(len(prompt)))]

    def propose(self, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """At most num_tokens more, [B, g], and what they were drawn from, [B, g, V]."""
        if num_tokens == 0:
            return tokens[:, :0], torch.zeros(len(tokens), 0, self.vocab_size, device=tokens.device)
        if isinstance(self.draft, LanguageModel):
            return self._drawn(self.draft, tokens, num_tokens)
        guessed = self.draft(tokens, num_tokens)
        self._check_guess(guessed, tokens, num_tokens)
        return guessed, torch.nn.functional.one_hot(guessed, self.vocab_size).float()

    def _drawn(self, model: LanguageModel, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        self.states = [(read, state) for read, state in self.states if read < tokens.shape[1]]
        (read, state), length, drawn_from = self.states[-1], tokens.shape[1], []
        self.states = self.states[-1:]
        for _ in range(num_tokens):
            logits, state = model.stream(tokens[:, read:], state)
            self.num_passes += 1
            check_logits(logits[:, -1], f"the draft's pass {self.num_passes}")
            read = tokens.shape[1]
            self.states.append((read, state))
            drawn_from.append(self.sampler.probabilities(logits[:, -1]))
            tokens = _joined(tokens, self.sampler.draw(drawn_from[-1]))
        return tokens[:, length:], torch.stack(drawn_from, dim=1)

    def _check_guess(self, guessed: Tensor, tokens: Tensor, num_tokens: int) -> None:
        if not isinstance(guessed, Tensor):
            got = f"a {type(guessed).__name__}"
        elif guessed.dim() != 2 or len(guessed) != len(tokens) or guessed.shape[1] > num_tokens:
            got = str(list(guessed.shape))
        elif (guessed.dtype, guessed.device) != (torch.int64, tokens.device):
            got = f"{guessed.dtype} on {guessed.device}"
        elif guessed.numel() and not 0 <= int(guessed.min()) <= int(guessed.max()) < self.vocab_size:
            got = f"tokens from {int(guessed.min())} to {int(guessed.max())}"
        else:
            return
        raise ArgumentError(
            f"draft must guess tokens from 0 to {self.vocab_size - 1}, the target's vocabulary, as torch.int64 "
            f"[{len(tokens)}, g] on {tokens.device} with g at most {num_tokens}; got {got}. "
            "Return tokens[:, :0] where there is no guess."
        )

    def _check_vocabulary(self, model: LanguageModel, prompt: Tensor) -> None:
        """Ask for the logits after token 0, which every vocabulary has, before it is shown tokens that it may lack."""
        logits, _ = model.stream(prompt.new_zeros(1, 1), model.initial_state(1))
        self.num_passes += 1
        if logits.shape[-1] != self.vocab_size:
            raise ArgumentError(
                f"draft must have the target's vocabulary of {self.vocab_size} tokens; it has {logits.shape[-1]}. "
                "Choose a draft with the same tokenizer, or PromptLookup()."
            )


def _verified(sampler: TokenSampler, p: Tensor, q: Tensor, proposed: Tensor, writing: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of each row pass, [B], and the token of each row after the shortest of these runs, [B].

    In rows that stopped writing all pass, so that no other row waits for them.

    Shape:
        p: [B, g + 1, V]; q: [B, g, V]; proposed: [B, g]; writing: [B].
    """
    num_drafted = proposed.shape[1]
    chosen = proposed[..., None]
    p_chosen, q_chosen = p[:, :num_drafted].gather(2, chosen)[..., 0], q.gather(2, chosen)[..., 0]
    passed = (sampler.uniform(p_chosen) * q_chosen < p_chosen) | ~writing[:, None]  # u < p / q
    runs = passed.long().cumprod(dim=1).sum(dim=1)
    taken = int(runs.min())
    if taken == num_drafted:
        return runs, sampler.draw(p[:, -1])
    rejected = runs == taken
    residual = (p[:, taken] - q[:, taken]).clamp(min=0)
    from_residual = rejected & (residual.sum(dim=1) > 0)  # nothing is left where p and q differ by rounding alone
    corrected = sampler.draw(torch.where(from_residual[:, None], residual, p[:, taken]))
    return runs, torch.where(rejected, corrected, proposed[:, taken])


def _until(stop_token: int | None, tokens: Tensor, num_given: int) -> tuple[Tensor, Tensor]:
    """Rows filled up from their first stop token on, as long as the longest, and which of them still write, [B]."""
    if stop_token is None:
        return tokens, torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    given, new = tokens[:, :num_given], tokens[:, num_given:]
    stops = (new == stop_token).long()
    after = stops.cumsum(dim=1) > stops  # a stop stands before it
    longest = int((~after).sum(dim=1).max())
    return torch.cat([given, new.masked_fill(after, stop_token)[:, :longest]], dim=1), ~stops.any(dim=1)


def _layers(state: Any) -> tuple[Any, ...]:
    """The states of a model's layers, or the one state of a model without."""
    layers: tuple[Any, ...] = getattr(state, "layers", (state,))
    return layers


def _check_gives_back(state: Any) -> None:
    """Refuse states that cannot forget a rejected token, before the first of them turns up."""
    lasting = next((layer for layer in _layers(state) if not hasattr(layer, "truncated")), None)
    if lasting is not None:
        raise CombinationError(
            f"target must have a state that gives rejected tokens back; {type(lasting).__name__} cannot. "
            "Use it as the draft, or choose a target whose layers keep a KVCache."
        )


def _rewound(state: Any, num_tokens: int) -> Any:
    """A model's state after the first num_tokens only."""
    if not hasattr(state, "layers"):
        return state.truncated(num_tokens)
    return replace(state, layers=tuple(layer.truncated(num_tokens) for layer in state.layers), num_seen=num_tokens)


def _joined(tokens: Tensor, new: Tensor) -> Tensor:
    """[B, N] and [B] -> [B, N + 1]."""
    return torch.cat([tokens, new[:, None]], dim=1)
