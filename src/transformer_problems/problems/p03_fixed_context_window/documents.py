"""Real text with one fact told in it, a name and its passkey, and the question that asks for the key by the name.

Synthetic by design, as passkey retrieval is in the literature (Mohtashami and Jaggi 2023, arXiv:2305.16300), at the
size of byte-level models: names are made-up words spelled in bytes, keys and the question are the tokens of
`lab.data.passkey`. A document tells one fact only, so a reader needs to have kept the key and not to compare names,
which models this small do not learn; a search over many documents needs the names. Some names are words of real
text too (`file`, `data`), as names are, and can mislead a search.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.data.passkey import FIRST_KEY_TOKEN, NUM_KEYS, QUERY_TOKEN

WINDOW = 32  # tokens that the untreated model sees
FACT_LEN = 7  # space, four letters, space, key; a question has the question's token in the key's place
_SYLLABLES = torch.tensor([[ord(c), ord(v)] for c in "bcdfghjklmnprt" for v in "aeiou"])
NUM_NAMES = len(_SYLLABLES) ** 2
_SPACE = ord(" ")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts of whole windows, each with one fact.

    Shape:
        tokens: [B, T, WINDOW]; is_text: the same, False where a fact or question replaced the text.
        facts, questions: [B, FACT_LEN]; keys: [B], 0 to NUM_KEYS - 1.
    """

    tokens: Tensor
    is_text: Tensor
    facts: Tensor
    questions: Tensor
    keys: Tensor

    def to(self, device: torch.device) -> Self:
        """The same documents on a device."""
        moved = (t.to(device) for t in (self.tokens, self.is_text, self.facts, self.questions, self.keys))
        return type(self)(*moved)

    def asked(self, windows: Tensor) -> Self:
        """The same documents with the question at the end of one window each, [B]; the answer is never told."""
        places = torch.full_like(windows, WINDOW - FACT_LEN)
        tokens, is_text = _written(self.tokens, self.is_text, self.questions, windows, places)
        return type(self)(tokens, is_text, self.facts, self.questions, self.keys)


def tell(text: Tensor, windows: Tensor, names: Tensor, draws: torch.Generator) -> Documents:
    """Texts with a fact in one window each, early enough for a question to follow in the same window.

    Keys are balanced: a reader who always guesses the same key is right in one document of NUM_KEYS.

    Shape:
        text: [B, T, WINDOW] int64, bytes; windows: [B], which window tells the fact; names: [B], numbers of names.

    Raises:
        ArgumentError: If a name's number is out of range.
    """
    if len(names) and not 0 <= int(names.min()) <= int(names.max()) < NUM_NAMES:
        raise ArgumentError(
            f"names must be numbers from 0 to {NUM_NAMES - 1}; got {int(names.max())}. Tell fewer facts."
        )
    keys = torch.randperm(len(text), generator=draws) % NUM_KEYS
    places = torch.randint(WINDOW - 2 * FACT_LEN + 1, (len(text),), generator=draws)
    facts = _phrases(names, FIRST_KEY_TOKEN + keys)
    tokens, is_text = _written(text, torch.ones_like(text, dtype=torch.bool), facts, windows, places)
    return Documents(tokens, is_text, facts, _phrases(names, torch.full_like(names, QUERY_TOKEN)), keys)


def spelled(tokens: Iterable[int]) -> str:
    """One character for each token, so that tools for text can hold what the model reads."""
    return "".join(map(chr, tokens))


def unspelled(text: str) -> list[int]:
    """The tokens of a spelled text."""
    return [ord(character) for character in text]


def _phrases(names: Tensor, last: Tensor) -> Tensor:
    """A name between spaces and a token after it, [B, FACT_LEN]."""
    space = torch.full((len(names), 1), _SPACE)
    first, second = names // len(_SYLLABLES), names % len(_SYLLABLES)
    return torch.cat([space, _SYLLABLES[first], _SYLLABLES[second], space, last[:, None]], dim=1)


def _written(
    tokens: Tensor, is_text: Tensor, phrases: Tensor, windows: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens with a phrase at a place of a window in each row, and what is then left of the text."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    where = rows, windows[:, None], places[:, None] + torch.arange(FACT_LEN, device=tokens.device)
    tokens, is_text = tokens.clone(), is_text.clone()
    tokens[where], is_text[where] = phrases, False
    return tokens, is_text
