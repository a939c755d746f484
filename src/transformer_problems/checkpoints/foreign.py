"""Whether the texts of an examination are such as the model knows: findings on others say little about it."""

from math import log

import torch

from transformer_problems.checkpoints.checkup import Visit

_NUM_TEXTS, _LENGTH = 4, 128
_MOST_UNKNOWN = 0.1  # of the tokens; of text in its language a tokenizer knows all but a few in a hundred
_NEAR_CHANCE = 0.75  # of the nats of a blind guess; models that read what they were trained on stay far below a half


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
    inputs = visit.inputs(_NUM_TEXTS, _LENGTH)
    unknown = getattr(subject.tokenizer, "unk_token_id", None)
    share = 0.0 if unknown is None else float((inputs["input_ids"] == unknown).float().mean())
    if share >= _MOST_UNKNOWN:
        return f"its tokenizer does not know {share:.0%} of these texts: give such as it was made for by --data"
    if subject.kind != "causal":
        return None
    loss, chance = float(subject.losses(inputs).mean()), log(subject.config.vocab_size)
    if loss < _NEAR_CHANCE * chance:
        return None
    return (
        f"it foretells these texts little better than chance ({loss:.1f} nats a token, chance {chance:.1f}): it is "
        "untrained, or needs other texts by --data"
    )
