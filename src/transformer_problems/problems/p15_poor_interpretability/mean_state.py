"""An encoder without a head, as explainers read a model."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.subject import Inputs, Subject
from transformer_problems.solutions.interpretability.model_reading import embedded, embedding_gives


class MeanState:
    """A `Readable` whose answer is the mean of the last states over real tokens, as of an encoder of sentences.

    Its only logit is that mean's component along the mean of the whole texts.

    Args:
        tokens: The whole texts, [B, N].
    """

    def __init__(self, subject: Subject, tokens: Tensor) -> None:
        self.subject = subject
        self.embedding: nn.Module = cast("Any", subject.model).get_input_embeddings()
        with torch.no_grad():
            self.direction = nn.functional.normalize(self.state(tokens), dim=1)  # [B, C]

    @property
    def vocab_size(self) -> int:
        return cast("int", self.embedding.num_embeddings)

    def state(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """[B, C]"""
        inputs = _inputs(tokens, key_mask)
        real = inputs["attention_mask"][..., None]
        with embedding_gives(self.embedding, tokens, embeddings):
            states = self.subject.run(inputs).output.float()
        return (states * real).sum(dim=1) / real.sum(dim=1)

    def embed(self, tokens: Tensor) -> Tensor:
        return embedded(self.embedding, tokens)

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        state = self.state(tokens, key_mask=key_mask, embeddings=embeddings)
        return (state * self.direction).sum(dim=1, keepdim=True)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        with torch.no_grad():
            return list(self.subject.run(_inputs(tokens, key_mask), attentions=True).attentions)

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        real = _inputs(tokens, key_mask)["attention_mask"].float()
        return real / real.sum(dim=1, keepdim=True)


def _inputs(tokens: Tensor, key_mask: Tensor | None) -> Inputs:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens) if key_mask is None else key_mask.long()}
