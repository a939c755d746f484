"""The same text alone, padded, and with other text around it."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Inputs, Subject


@dataclass(frozen=True, slots=True)
class Surrounded:
    """Texts as a model takes them, and where what is looked at stands.

    Args:
        inputs: input_ids, attention_mask [B, N], and position_ids where padding stands before the text.
        first: The first token of the text itself; the others follow it.
    """

    inputs: Inputs
    first: int


@dataclass(frozen=True, slots=True)
class Texts:
    """Excerpts without their special tokens, and those that stand before and after a text.

    Shape:
        bodies: [B, N]; before, after: [any].
    """

    subject: Subject
    bodies: Tensor
    before: Tensor
    after: Tensor

    def alone(self) -> Surrounded:
        return self._around(self.bodies)

    def padded(self, num: int) -> Surrounded:
        """With tokens that the mask hides: before the text of a causal model, as for writing on; else behind it."""
        whole = self.alone().inputs["input_ids"]
        pad = getattr(self.subject.tokenizer, "pad_token_id", None) or 0
        filled, shown = whole.new_full((len(whole), num), pad), torch.ones_like(whole)
        hidden = torch.zeros_like(filled)
        if self.subject.kind != "causal":
            mask = torch.cat([shown, hidden], dim=1)
            return Surrounded(
                {"input_ids": torch.cat([whole, filled], dim=1), "attention_mask": mask}, len(self.before)
            )
        mask = torch.cat([hidden, shown], dim=1)
        inputs = {"input_ids": torch.cat([filled, whole], dim=1), "attention_mask": mask}
        if "position_ids" in inspect.signature(self.subject.body.model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return Surrounded(inputs, num + len(self.before))

    def among(self, noise: Tensor) -> Surrounded:
        """With other text [B, M] before that of a causal model, which could not see it else, or behind it."""
        if self.subject.kind == "causal":
            found = self._around(torch.cat([noise, self.bodies], dim=1))
            return Surrounded(found.inputs, found.first + noise.shape[1])
        return self._around(torch.cat([self.bodies, noise], dim=1))

    def _around(self, bodies: Tensor) -> Surrounded:
        before, after = (special.expand(len(bodies), -1) for special in (self.before, self.after))
        whole = torch.cat([before, bodies, after], dim=1)
        return Surrounded({"input_ids": whole, "attention_mask": torch.ones_like(whole)}, len(self.before))


def excerpts(visit: Visit, num: int, length: int) -> Texts:
    """Excerpts of `length` tokens, special ones not counted."""
    subject = visit.subject
    whole = visit.texts(num, length + subject.num_special)["input_ids"]
    special = set(subject.tokenizer.all_special_ids)
    start = int(bool(subject.num_special) and int(whole[0, 0]) in special)
    end = start + length
    return Texts(subject, whole[:, start:end], whole[0, :start], whole[0, end:])
