"""What a check-up is, and what it is given to look with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.material import Material
from transformer_problems.checkpoints.subject import Inputs, Kind, Subject
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.findings import Examination, NotApplicable
from transformer_problems.core.records import Interval
from transformer_problems.core.seeding import generator
from transformer_problems.lab.meters.roofline import Roofline, measure_roofline
from transformer_problems.lab.statistics import mean_interval

_ARRAY_BYTES = (2**25, 2**28)  # the least and the most that is copied to measure the bandwidth
_MOST_CHARACTERS_A_TOKEN = 64  # a word that a tokenizer does not know is one token, however long


@dataclass(frozen=True)
class Visit:
    """One model under examination: what every check-up is given.

    Args:
        progress: Called with the share of a check-up that is done.
    """

    subject: Subject
    material: Material
    seed: int = 0
    progress: Callable[[float], None] = field(default=lambda share: None)

    def texts(self, num: int, length: int) -> Inputs:
        """Excerpts of exactly `length` tokens, special ones included, from places far from each other.

        The same on every call.

        Shape:
            input_ids, attention_mask: [num, length].

        Raises:
            ArgumentError: If the material is too short, or the tokenizer gives fewer tokens than it should.
        """
        text = self._running_text
        needed = min(length * _MOST_CHARACTERS_A_TOKEN, len(text) // 2)  # of short material, not all of it each time
        last = len(text) - needed
        starts = [last * (2 * number + 1) // (2 * num) for number in range(num)]
        rows = [self._tokens(text[start : start + needed], length) for start in starts]
        if min(map(len, rows)) < length:
            rows = [self._tokens(text[start:] + "\n" + text[:start], length) for start in starts]
        shortest = min(map(len, rows))
        if shortest < length:
            raise ArgumentError(
                f"--data must hold enough text for excerpts of {length:,} tokens; {self.material.source} gave one of "
                f"{shortest:,}. Add text, or leave --data out."
            )
        return self._batch(torch.tensor(rows), None)

    def short_texts(self, num: int, length: int) -> list[Tensor]:
        """Whole texts of the material, cut at `length` tokens, spread over all of it; each [n] with n at least 2."""
        texts = self.material.texts
        chosen = [texts[len(texts) * number // num] for number in range(min(num, len(texts)))]
        rows = [self._tokens(text, length) for text in chosen]
        return [torch.tensor(row, device=self.subject.device) for row in rows if len(row) > 1]

    def padded(self, rows: list[Tensor]) -> Inputs:
        """Texts of unequal length as one batch, padded at the end.

        Shape:
            input_ids, attention_mask: [num, longest].
        """
        pad = getattr(self.subject.tokenizer, "pad_token_id", None) or 0
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        return self._batch(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])

    def images(self, num: int) -> Inputs:
        """Images as the model takes them.

        Shape:
            pixel_values: [num, channels, height, width].
        """
        images = self.material.images
        if images is None:
            raise ArgumentError(f"{self.subject.name} reads images, and there are none. Give a folder of them.")
        chosen = images[torch.arange(num) * len(images) // num]
        config = self.subject.config
        size = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
        pixels = nn.functional.interpolate(chosen, tuple(size), mode="bilinear", antialias=True)
        channels = getattr(config, "num_channels", 3)
        if channels == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        mean, std = (
            torch.tensor(getattr(self.subject.tokenizer, name, None) or [0.5] * channels)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        return {"pixel_values": ((pixels - mean) / std).to(self.subject.device, self.subject.dtype)}

    def inputs(self, num: int, length: int = 128) -> Inputs:
        """Images for a model of images; else excerpts of `length` tokens, or as many as the model takes."""
        if self.subject.kind == "image":
            return self.images(num)
        return self.texts(num, min(length, self.subject.trained_len or length))

    def generator(self, *names: str | int) -> torch.Generator:
        """Draws of this visit, for a purpose of that name."""
        return generator(self.seed, "visit", *names)

    @cached_property
    def roofline(self) -> Roofline:
        """What this machine can do at most, measured once a visit."""
        return measure_roofline(self.subject.device, self.subject.dtype, array_bytes=self.array_bytes)

    @property
    def array_bytes(self) -> int:
        """Of each of the two arrays whose copy tells the bandwidth.

        Together as large as the weights, which is what a pass reads: a check-up is to take little memory, and what
        fits a cache in use fits it here. A GPU has room for arrays beyond its cache.
        """
        least, most = _ARRAY_BYTES
        return most if self.subject.device.type == "cuda" else min(max(self.subject.weight_bytes // 2, least), most)

    def _tokens(self, text: str, length: int) -> list[int]:
        tokens: list[int] = self.subject.tokenizer(text, truncation=True, max_length=length)["input_ids"]
        return tokens

    @cached_property
    def _running_text(self) -> str:
        if not self.material.texts:
            raise ArgumentError(f"{self.subject.name} reads text, and there is none. Give a text file.")
        return "\n".join(self.material.texts)

    def _batch(self, tokens: Tensor, mask: Tensor | None) -> Inputs:
        device = self.subject.device
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


class Checkup(Protocol):
    """One problem's check-up: looks at a model, and measures. Thresholds and words for them are the catalogue's."""

    problem: int
    not_for: Mapping[Kind, str]  # kinds of models that cannot have the problem, with the reason, a sentence each

    def examine(self, visit: Visit) -> Examination | NotApplicable:
        """Measure. Leaves the model as it was."""
        ...


@runtime_checkable
class NeedsFloats(Protocol):
    """A check-up that cannot look into layers whose weights are codes."""

    needs_floats: str  # why, a sentence


class Fault(Protocol):
    """The fault that a check-up is for, planted in a healthy model; beside each `checkup.py` in `fault.py`."""

    problem: int
    name: str  # "positions are zeroed"

    def plant(self, subject: Subject, seed: int) -> Subject:
        """An ill copy of a healthy model; the argument is left as it was.

        Raises:
            CombinationError: If a model of this form cannot have the fault.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """A fault that healthy small models, trained for minutes, have by themselves to some extent."""

    preparation: str  # "half of the heads are given a slope by distance"

    def prepare(self, subject: Subject, seed: int) -> Subject:
        """A healthy copy of a healthy model, for the check-up to leave in peace and the fault to be planted in."""
        ...


def estimate(samples: Tensor | list[float]) -> Interval:
    """Mean of one sample for each example with its 95% interval."""
    values = torch.as_tensor(samples, dtype=torch.float64).flatten()
    return mean_interval(values[None].cpu().numpy())


def exactly(value: float) -> Interval:
    """A number that was counted, and would be the same again."""
    return Interval(float(value), float(value), float(value))
