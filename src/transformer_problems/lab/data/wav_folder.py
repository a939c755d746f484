"""Labelled recordings from a folder of wav files, as log-mel features."""

import re
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.class_folders import check_left_out, entries_of, files_by_class
from transformer_problems.lab.data.labelled import LabelledSequences
from transformer_problems.lab.data.log_mel import log_mel

ClassSource = Literal["folder", "prefix"]


def load_wav_folder(
    path: Path,
    *,
    class_from: ClassSource = "folder",
    strict: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LabelledSequences:
    """Every wav file of a folder, as log-mel features of 40 bands, 100 frames a second; channels are averaged.

    Classes are in the order of their names, and so are the files of each. Files that cannot be read are left out; how
    many, a warning says at the end.

    Args:
        path: A folder with a sub-folder for each class, or with the files themselves. Hidden files are skipped.
        class_from: A file's class is the name of its sub-"folder", or the "prefix" of its own name, up to the first
            "_" or "-", as in 7_jackson_32.wav.
        strict: Refuse the folder at the first file that cannot be read.
        progress: Called with the share of the files done.

    Raises:
        ArgumentError: If the folder or every file of some class is missing or unreadable, in strict mode any, or if
            sample rates differ. Readable are PCM wav files of 8 to 32 bits.
        UnknownNameError: If `class_from` is neither.
    """
    if class_from not in get_args(ClassSource):
        raise UnknownNameError("source of the classes", str(class_from), get_args(ClassSource))
    files = files_by_class(path, (".wav",)) if class_from == "folder" else _files_by_prefix(path)
    listed = [(file, index) for index, of_class in enumerate(files.values()) for file in of_class]
    sequences: list[Tensor] = []
    classes: list[int] = []
    skipped: list[str] = []
    first: tuple[Path, int] | None = None
    for done, (file, index) in enumerate(listed, start=1):
        try:
            waveform, rate = read_wav(file)
        except ArgumentError as error:
            if strict:
                raise
            skipped.append(f"{file} ({error})")
        else:
            first = first or (file, rate)
            if rate != first[1]:
                raise ArgumentError(
                    f"all files must have one sample rate; {first[0]} has {first[1]} and {file} has {rate}. "
                    "Resample one to the other's."
                )
            sequences.append(log_mel(waveform, rate))
            classes.append(index)
        if progress is not None:
            progress(done / len(listed))
    check_left_out("recordings", skipped, set(classes), tuple(files), path)
    return LabelledSequences.padded(sequences, classes, tuple(files), len(skipped))


def read_wav(file: Path) -> tuple[Tensor, int]:
    """A recording and its sample rate.

    Shape:
        output: [samples] float32, from -1 to 1.

    Raises:
        ArgumentError: If the file cannot be read, is no PCM wav file of 8 to 32 bits, is empty or cut off.
    """
    try:
        with wave.open(str(file), "rb") as opened:
            parameters = opened.getparams()
            content = opened.readframes(parameters.nframes)
    except (OSError, EOFError, RuntimeError, wave.Error) as error:
        reason = str(error) or "it ends too early"
        raise ArgumentError(
            f"{file} must be a PCM wav file of 8 to 32 bits; it cannot be read as one ({reason}). Convert or remove it."
        ) from error
    width, num_channels = parameters.sampwidth, parameters.nchannels
    if width > 4:
        raise ArgumentError(f"{file} must have samples of 8 to 32 bits; it has {8 * width}. Convert or remove it.")
    if not content or len(content) != parameters.nframes * width * num_channels:
        raise ArgumentError(
            f"{file} must hold the {parameters.nframes} frames that it announces, at least one; it holds "
            f"{len(content) // (width * num_channels)}. Remove it, or record it again."
        )
    channels = _samples(content, width).reshape(-1, num_channels)
    return torch.from_numpy(channels.mean(axis=1, dtype=np.float64).astype(np.float32)), parameters.framerate


def _samples(content: bytes, width: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Little-endian integers of `width` bytes, those of one byte unsigned, as numbers from -1 to 1."""
    raw = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), dtype=np.uint8)
    wide[:, 4 - width :] = raw  # the upper bytes of 32-bit integers
    if width == 1:
        wide ^= np.array([0, 0, 0, 0x80], dtype=np.uint8)  # moves the middle of the range to 0
    return wide.view("<i4")[:, 0] / 2.0**31


def _files_by_prefix(path: Path) -> dict[str, list[Path]]:
    found = [file for file in entries_of(path) if file.suffix.lower() == ".wav" and file.is_file()]
    if not found:
        raise ArgumentError(f"path must hold wav files; {path} holds none. Use class_from='folder' for sub-folders.")
    files: dict[str, list[Path]] = {}
    for file in found:
        prefix, *rest = re.split("[-_]", file.stem, maxsplit=1)
        if not prefix or not rest:
            raise ArgumentError(
                f"file names must begin with a class and '_' or '-', as 7_jackson_32.wav does; {file} does not. "
                "Rename it, or sort the files into sub-folders and use class_from='folder'."
            )
        files.setdefault(prefix, []).append(file)
    return dict(sorted(files.items()))
