"""The passkey task: a key token is dropped somewhere into real text and asked for at the end.

Synthetic by design, as in the literature's passkey retrieval (Mohtashami & Jaggi 2023, arXiv:2305.16300), at the size
of byte-level models: the key is one token outside the bytes, and so is the question.
"""

import torch
from torch import Tensor

NUM_KEYS = 16
QUERY_TOKEN = 256
FIRST_KEY_TOKEN = 257
VOCAB_SIZE = FIRST_KEY_TOKEN + NUM_KEYS


def plant_passkeys(text: Tensor, generator: torch.Generator) -> Tensor:
    """Text windows with a key at a random place, the question and the key again at the end.

    Shape:
        text: [B, N] int64, bytes, N >= 4; output: [B, N] where the last two tokens are question and answer.
    """
    batch_size, length = text.shape
    tokens = text.clone()
    keys = FIRST_KEY_TOKEN + torch.randint(NUM_KEYS, (batch_size,), generator=generator)
    places = torch.randint(length - 2, (batch_size,), generator=generator)
    tokens[torch.arange(batch_size), places] = keys
    tokens[:, -2] = QUERY_TOKEN
    tokens[:, -1] = keys
    return tokens


def passkey_accuracy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Whether the key is the likeliest of all keys after the question, [B] float.

    Shape:
        logits: [B, N - 1, V], of the first N - 1 tokens, each predicting the next; tokens: [B, N].
    """
    guess = logits[:, -1, FIRST_KEY_TOKEN:].argmax(dim=-1) + FIRST_KEY_TOKEN
    return (guess == tokens[:, -1]).float()
