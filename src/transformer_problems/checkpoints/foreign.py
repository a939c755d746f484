"""Whether the texts of an examination are such as the model knows: findings on others say little about it."""

from math import log
from typing import Any, cast

import torch

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import ArgumentError, CheckpointError

_NUM_TEXTS, _CHARACTERS = 16, 2_000  # of the material whose tokens are looked up, and of each
_TOLD, _REFUSED = 0.1, 0.5  # shares of unknown tokens; of text in its language a tokenizer knows all but a few percent
_NUM_READ, _LENGTH = 4, 128  # excerpts whose loss is looked at, and their tokens
_NEAR_CHANCE = 0.75  # of the nats of a blind guess; models that read what they were trained on stay far below a half


def require_known(subject: Subject, material: Material) -> None:
    """Texts of which readings would tell something, by a tokenizer that belongs to the model.

    Raises:
        ArgumentError: If more than half of the tokens are unknown.
        CheckpointError: If the tokenizer gives tokens that the model has no embedding for.
    """
    tokens = _tokens(subject, material)
    _require_embedded(subject, int(tokens.max()) if len(tokens) else 0)
    share = _unknown_share(subject, tokens)
    if share > _REFUSED:
        raise ArgumentError(
            f"--data must hold texts that the tokenizer of {subject.name} knows; {share:.0%} of the tokens of "
            f"{material.source} are unknown to it. Give texts that the model is made for, with --data FILE, or the "
            "tokenizer that it was trained with, with --tokenizer FOLDER."
        )


@torch.no_grad()
def caution_about(visit: Visit) -> str | None:
    """A sentence where the texts are foreign to the model, by its tokenizer or its loss; else nothing.

    Raises:
        ArgumentError: If the material is too short.

    Example:
        >>> from transformer_problems import bundled
        >>> from transformer_problems.checkpoints.loading import load_subject
        >>> from transformer_problems.checkpoints.material import machines_texts
        >>> caution_about(Visit(load_subject(bundled("draft")), machines_texts())) is None
        True
    """
    subject = visit.subject
    if subject.kind == "image":
        return None
    share = _unknown_share(subject, _tokens(subject, visit.material))
    if share >= _TOLD:
        return (
            f"its tokenizer does not know {share:.0%} of these texts, so that findings may say little: give others by "
            "--data"
        )
    if subject.kind != "causal":
        return None
    loss = float(subject.losses(visit.inputs(_NUM_READ, _LENGTH)).mean())
    chance = log(subject.config.vocab_size)
    if loss < _NEAR_CHANCE * chance:
        return None
    return (
        f"it foretells these texts little better than chance ({loss:.1f} nats a token, chance {chance:.1f}): it is "
        "untrained, or needs other texts by --data, and findings may say little"
    )


def _tokens(subject: Subject, material: Material) -> torch.Tensor:
    """Of texts from all over the material, without special ones, [n]."""
    num = min(_NUM_TEXTS, len(material.texts))
    chosen = [material.texts[len(material.texts) * number // num][:_CHARACTERS] for number in range(num)]
    longest = {"truncation": True, "max_length": _CHARACTERS}  # or the tokenizer would warn of long texts
    found = [subject.tokenizer(text, add_special_tokens=False, **longest)["input_ids"] for text in chosen]
    return torch.tensor([token for row in found for token in row], dtype=torch.long)


def _unknown_share(subject: Subject, tokens: torch.Tensor) -> float:
    unknown = getattr(subject.tokenizer, "unk_token_id", None)
    return float((tokens == unknown).double().mean()) if unknown is not None and len(tokens) else 0.0


def _require_embedded(subject: Subject, largest: int) -> None:
    """Tokens of text, and the one that hides others from a masked model, all have an embedding."""
    if subject.kind == "encoder":
        largest = max(largest, getattr(subject.tokenizer, "mask_token_id", None) or 0)
    num_known = cast("Any", subject.model).get_input_embeddings().num_embeddings
    if largest >= num_known:
        raise CheckpointError(
            f"the tokenizer of {subject.name} gives the token {largest:,}, and the model knows {num_known:,}. Name the "
            "tokenizer that it was trained with."
        )
