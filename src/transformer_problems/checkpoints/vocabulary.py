"""Whether texts are such as a model's tokenizer knows, and their tokens such as the model knows."""

from dataclasses import replace

import torch

from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import ArgumentError, CheckpointError

_NUM_TEXTS, _CHARACTERS = 16, 2_000  # of the material that are looked at, and of each
_TOLD, _REFUSED = 0.1, 0.5  # shares of unknown tokens


def checked_texts(subject: Subject, material: Material) -> Material:
    """The texts for a model of text; where a tenth of their tokens or more is unknown, their source says so.

    Raises:
        ArgumentError: If more than half of the tokens are unknown, of which no reading would tell anything.
        CheckpointError: If the tokenizer gives tokens that the model has no embedding for.
    """
    tokens = _tokens(subject, material)
    _require_known(subject, int(tokens.max()) if len(tokens) else 0)
    unknown = getattr(subject.tokenizer, "unk_token_id", None)
    share = float((tokens == unknown).double().mean()) if unknown is not None and len(tokens) else 0.0
    if share > _REFUSED:
        raise ArgumentError(
            f"--data must hold texts that the tokenizer of {subject.name} knows; {share:.0%} of the tokens of "
            f"{material.source} are unknown to it. Give texts that the model is made for, with --data FILE, or the "
            "tokenizer that it was trained with, with --tokenizer FOLDER."
        )
    if share < _TOLD:
        return material
    return replace(material, source=f"{material.source}, {share:.0%} of whose tokens the tokenizer does not know")


def _tokens(subject: Subject, material: Material) -> torch.Tensor:
    """Of texts from all over the material, without special ones, [n]."""
    num = min(_NUM_TEXTS, len(material.texts))
    chosen = [material.texts[len(material.texts) * number // num][:_CHARACTERS] for number in range(num)]
    longest = {"truncation": True, "max_length": _CHARACTERS}  # or the tokenizer would warn of long texts
    found = [subject.tokenizer(text, add_special_tokens=False, **longest)["input_ids"] for text in chosen]
    return torch.tensor([token for row in found for token in row], dtype=torch.long)


def _require_known(subject: Subject, largest: int) -> None:
    """Tokens of text, and the one that hides others from a masked model, all have an embedding."""
    if subject.kind == "encoder":
        largest = max(largest, getattr(subject.tokenizer, "mask_token_id", None) or 0)
    num_known = subject.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if largest >= num_known:
        raise CheckpointError(
            f"the tokenizer of {subject.name} gives the token {largest:,}, and the model knows {num_known:,}. Name the "
            "tokenizer that it was trained with."
        )
