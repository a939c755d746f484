"""How much dearer does a token become as the history grows?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.decoding import CachedText, next_token_flops, uses_cache
from transformer_problems.checkpoints.lengths import Growth, longest_input, through
from transformer_problems.checkpoints.sizes import told_bytes
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.kernels.race import best_times

_SHORT = 16  # tokens of history that the longest is compared with
_TIMED = 256  # tokens of history at most that a token is timed at
_SINKS, _WINDOW = 4, 256  # of StreamingLLM, the window being a size to predict with
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class _NextToken:
    """FLOPs of the next token by how many stand before it; a window ends a layer's growth, where there is a cache.

    Args:
        law: As if no layer had a window.
    """

    subject: Subject
    law: Growth

    @property
    def is_pass(self) -> bool:
        """Whether all before it is read again."""
        return self.law.square > 0

    def at(self, length: float) -> float:
        return self.law.at(length if self.is_pass else self.subject.keys_met(length))


class StreamingCheckup:
    """Counts the next token as the model writes it, at three short histories, and follows the count to the longest.

    Beside a cache a token costs its weights and a part that grows with the history; without one, a whole pass.
    """

    problem = 12
    not_for: Mapping[Kind, str] = {
        "encoder": "it reads a text at once, from its first to its last token, so it can only begin when the text ends",
        "image": "an image comes at once, not as a stream",
    }

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, longest = visit.subject, longest_input(visit.subject)
        step = max(1, min(_SHORT, (subject.narrowest or longest) // 3))  # within all windows, cost follows the length
        histories = (step, 2 * step, 3 * step)
        tokens = visit.texts(1, histories[-1])["input_ids"]
        counted = [next_token_flops(subject, tokens[:, :history]) for history in histories]
        growth = _NextToken(subject, through(histories, (counted[0], counted[1], counted[2])))
        times = growth.at(longest) / growth.at(_SHORT)
        state = CachedText(subject, tokens).state_bytes / histories[-1] * subject.keys_met(longest)
        figures = {
            "longest_history_tokens": float(longest),
            "next_token_at_longest_gflop": growth.at(longest) / 1e9,
            "cache_at_longest_bytes": state,
            **_seconds(visit, min(longest, _TIMED)),
        }
        kept = f"with {told_bytes(state)} of cache" if uses_cache(subject) else "reading the whole text again"
        meaning = f"after {longest:,} tokens the next one costs {times:.1f}x what it costs after {_SHORT}, {kept}"
        if uses_cache(subject) and subject.narrowest:
            num_local = sum(window is not None for window in subject.windows)
            meaning += f"; {num_local} of {subject.num_layers} layers look back {subject.narrowest:,} tokens"
        curve = _curve(growth, longest)
        remedies = _remedies(growth, longest, state)
        return Examination({"next_token_growth": exactly(times)}, meaning, remedies, curve, figures)


def _seconds(visit: Visit, history: int) -> dict[str, float]:
    """Of a cached step after few tokens and after many, on this machine."""
    tokens = visit.texts(1, history)["input_ids"]
    short, long = (CachedText(visit.subject, tokens[:, : length - 8]) for length in (_SHORT, history))
    ways = {"short": lambda: short.read(tokens[:, :1]), "long": lambda: long.read(tokens[:, :1])}
    best_s = best_times(ways, visit.subject.device)
    return {f"cached_step_at_{_SHORT}_tokens_s": best_s["short"], f"cached_step_at_{history}_tokens_s": best_s["long"]}


def _curve(growth: _NextToken, longest: int) -> Curve:
    lengths = [float(_SHORT)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return Curve(
        "Arithmetic of the next token, by what stands before it",
        "tokens before",
        f"times that after {_SHORT}",
        tuple((length, growth.at(length) / growth.at(_SHORT)) for length in lengths),
        x_log=True,
    )


def _remedies(growth: _NextToken, longest: int, state: float) -> tuple[Remedy, ...]:
    """What a token costs where it sees so many tokens at most, each once, beside its weights.

    Beside a cache the count is constant + linear N already. Without one it is a pass, linear N + square N^2, so the
    token's own part is constant + linear, the constant being its answer, and a key's is `square`.
    """
    law, keys_met = growth.law, growth.subject.keys_met
    own = law.constant + (law.linear if growth.is_pass else 0)
    key = law.square if growth.is_pass else law.linear
    now, short = growth.at(longest), own + key * _SHORT
    told = (
        ("streaming-transformers", _SINKS + _WINDOW, f"{_SINKS} first and {_WINDOW} last tokens", "for ever"),
        ("chunk-based-attention", 2 * _CHUNK, f"chunks of {_CHUNK} and the one before", "after training"),
        ("transformer-xl", 2 * _WINDOW, f"a memory of {_WINDOW} beside segments of as many", "after training"),
        ("delta-attention", 0, "a state of fixed size in place of keys", "after training"),
    )
    found = []
    for slug, keys, how, when in told:
        met = keys_met(min(keys, longest))
        cost, kept = own + key * met, state * met / keys_met(longest)
        held = f"{told_bytes(kept)} kept" if keys else "the same state at any length"
        found.append(Remedy(slug, f"{now / cost:.1f}x less for a token, {held}: {how}, {when}", now / max(cost, short)))
    return tuple(found)


CHECKUP = StreamingCheckup()
