"""Recordings from wav files: PCM of 8 to 32 bits, plain or in the extensible form.

The standard library's reader knows the extensible form, in which most programs write 24 bits, from Python 3.12 on.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError

_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_ANY_FORMAT = bytes.fromhex("000000001000800000aa00389b71")  # ends the identifiers that begin with a format's number
_MOST_RATE = 768_000  # samples a second, above those of any recorder


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recording, or its beginning.

    Args:
        waveform: [samples] float32, from -1 to 1; channels are averaged.
        sample_rate: Samples a second.
        duration_s: Of the whole, of which `waveform` may be the beginning.
    """

    waveform: Tensor
    sample_rate: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Sound:
    """How samples are written, and where."""

    width: int  # bytes
    num_channels: int
    sample_rate: int
    start: int  # byte of the file
    num_bytes: int  # as announced


def read_wav(file: Path | str, *, max_seconds: float | None = None) -> Recording:
    """A recording, read as far as it is asked for.

    Args:
        file: A wav file of whole numbers of 8, 16, 24 or 32 bits, in the plain or the extensible form.
        max_seconds: How much of its beginning is read. Default all.

    Raises:
        ArgumentError: If the file cannot be read, is no such wav file, is empty or cut off.
    """
    file = Path(file)
    if max_seconds is not None:
        require_positive(max_seconds=max_seconds)
    try:
        with file.open("rb") as opened:
            sound = _find_sound(opened)
            frame = sound.width * sound.num_channels
            num_frames = sound.num_bytes // frame
            num_held = min(num_frames, (os.fstat(opened.fileno()).st_size - sound.start) // frame)
            if not num_frames or num_held < num_frames:
                raise ArgumentError(
                    f"{file} must hold the {num_frames} frames that it announces, at least one; it holds {num_held}. "
                    "Remove it, or record it again."
                )
            wanted = (
                num_frames if max_seconds is None else max(1, int(min(num_frames, max_seconds * sound.sample_rate)))
            )
            opened.seek(sound.start)
            channels = _numbers(opened.read(wanted * frame), sound.width).reshape(-1, sound.num_channels)
    except (OSError, _UnreadableError) as error:
        raise ArgumentError(
            f"{file} must be a PCM wav file of 8 to 32 bits; {error}. Convert it, as `ffmpeg -i {file.name} -c:a "
            "pcm_s16le new.wav` does, or remove it."
        ) from error
    waveform = torch.from_numpy(channels.mean(axis=1, dtype=np.float64).astype(np.float32))
    return Recording(waveform, sound.sample_rate, num_frames / sound.sample_rate)


class _UnreadableError(Exception):
    """What keeps a file from being read, as the end of a sentence."""


def _find_sound(opened: BinaryIO) -> _Sound:
    """Walks through the parts of a file, each a name, a size and as many bytes, to the samples."""
    head = opened.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise _UnreadableError(f"it begins with {head[:12]!r} and not as a wav file" if head else "it is empty")
    written: tuple[int, int, int] | None = None
    while len(head := opened.read(8)) == 8:
        start, size = opened.tell(), int.from_bytes(head[4:], "little")
        if head[:4] == b"fmt ":
            written = _how_written(opened.read(min(size, 40)))
        elif head[:4] == b"data":
            if written is None:
                raise _UnreadableError("its samples come before their format")
            return _Sound(*written, start, size)
        opened.seek(start + size + size % 2)
    raise _UnreadableError("it ends before its samples")


def _how_written(content: bytes) -> tuple[int, int, int]:
    """Bytes of a sample, channels and sample rate, of the part that says how samples are written."""
    if len(content) < 16:
        raise _UnreadableError("its format is cut off")
    number, num_channels, sample_rate, frame, bits = (
        int.from_bytes(content[start:end], "little") for start, end in ((0, 2), (2, 4), (4, 8), (12, 14), (14, 16))
    )
    if number == _EXTENSIBLE and content[26:40] == _ANY_FORMAT:
        number = int.from_bytes(content[24:26], "little")
    if number != _PCM:
        name = f"floats of {bits} bits" if number == _FLOAT else f"samples of format {number:#06x}"
        raise _UnreadableError(f"it holds {name}, not whole numbers")
    width = -(-bits // 8)
    if not 1 <= width <= 4:
        raise _UnreadableError(f"its samples have {bits} bits")
    if not num_channels or frame != width * num_channels:
        raise _UnreadableError(
            f"{num_channels} channels of {bits} bits do not take the {frame} bytes that it announces"
        )
    if not 1 <= sample_rate <= _MOST_RATE:
        raise _UnreadableError(f"it announces {sample_rate} samples a second, not 1 to {_MOST_RATE}")
    return width, num_channels, sample_rate


def _numbers(content: bytes, width: int) -> NDArray[np.float64]:
    """Little-endian integers of `width` bytes, those of one byte unsigned, as numbers from -1 to 1."""
    raw = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), dtype=np.uint8)
    wide[:, 4 - width :] = raw  # the upper bytes of 32-bit integers
    if width == 1:
        wide ^= np.array([0, 0, 0, 0x80], dtype=np.uint8)  # moves the middle of the range to 0
    numbers: NDArray[np.float64] = wide.view("<i4")[:, 0] / 2.0**31
    return numbers
