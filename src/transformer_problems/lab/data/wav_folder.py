"""Labelled recordings from a folder of wav files, as log-mel features."""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from transformer_problems.core.arguments import require_positive
from transformer_problems.core.errors import ArgumentError, UnknownNameError
from transformer_problems.lab.data.class_folders import (
    ClassFiles,
    check_left_out,
    entries_of,
    files_by_class,
    tell_left_out,
)
from transformer_problems.lab.data.labelled import LabelledSequences
from transformer_problems.lab.data.log_mel import log_mel
from transformer_problems.lab.data.wav_file import Recording, read_wav

ClassSource = Literal["folder", "prefix"]
SOUND_SUFFIXES = (".wav",)


def load_wav_folder(
    path: Path | str,
    *,
    class_from: ClassSource = "folder",
    max_seconds: float = 30.0,
    strict: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LabelledSequences:
    """Every wav file of a folder, as log-mel features of 40 bands, 100 frames a second; channels are averaged.

    Classes are in the order of their names, and so are the files of each. Of longer recordings the beginning is read.
    Files that cannot be read, those of other types or in no class's folder, and folders that cannot be listed are left
    out. How many are cut or left out, warnings say.

    Args:
        path: A folder with a sub-folder for each class, or with the files themselves. Hidden files are skipped.
        class_from: A file's class is the name of its sub-"folder", or the "prefix" of its own name, up to the first
            "_" or "-", as in 7_jackson_32.wav.
        max_seconds: How much of a recording is read; the default is what recognisers of speech take at once.
        strict: Refuse the folder at the first file or folder that would be left out or cut.
        progress: Called with the share of the files done.

    Raises:
        ArgumentError: If the folder or every file of some class is missing or unreadable, in strict mode any, or if
            sample rates differ. Readable are PCM wav files of 8 to 32 bits.
        UnknownNameError: If `class_from` is neither.
    """
    path = Path(path)
    require_positive(max_seconds=max_seconds)
    if class_from not in get_args(ClassSource):
        raise UnknownNameError("source of the classes", str(class_from), get_args(ClassSource))
    by_folder = class_from == "folder"
    found = files_by_class(path, SOUND_SUFFIXES, strict=strict) if by_folder else _files_by_prefix(path, strict=strict)
    names = tuple(found.by_class)
    listed = [(file, index) for index, of_class in enumerate(found.by_class.values()) for file in of_class]
    sequences: list[Tensor] = []
    classes: list[int] = []
    skipped: list[str] = []
    cut: list[str] = []
    first: tuple[Path, int] | None = None
    for done, (file, index) in enumerate(listed, start=1):
        try:
            recording = read_wav(file, max_seconds=max_seconds)
        except ArgumentError as error:
            if strict:
                raise
            skipped.append(f"{file} ({error})")
        else:
            first = first or (file, recording.sample_rate)
            _check(file, recording, *first, max_seconds=max_seconds if strict else math.inf)
            if recording.duration_s > max_seconds:
                cut.append(f"{file} ({recording.duration_s:.1f} s)")
            sequences.append(log_mel(recording.waveform, recording.sample_rate))
            classes.append(index)
        if progress is not None:
            progress(done / len(listed))
    check_left_out("recordings", skipped, set(classes), names, path)
    if cut:
        warnings.warn(
            f"{len(cut)} recordings of {path} cut to their first {max_seconds:g} s, first {cut[0]}", stacklevel=2
        )
    num_skipped = len(skipped) + found.num_left_out
    return LabelledSequences.padded(sequences, classes, names, num_skipped=num_skipped, num_cut=len(cut))


def _check(file: Path, recording: Recording, first: Path, first_rate: int, *, max_seconds: float) -> None:
    if recording.sample_rate != first_rate:
        raise ArgumentError(
            f"all files must have one sample rate; {first} has {first_rate} and {file} has {recording.sample_rate}. "
            "Resample one to the other's."
        )
    if recording.duration_s > max_seconds:
        raise ArgumentError(
            f"recordings must last {max_seconds:g} s at most where that is strict; {file} lasts "
            f"{recording.duration_s:.1f} s. Cut it, or leave strict out to read its beginning."
        )


def _files_by_prefix(path: Path, *, strict: bool) -> ClassFiles:
    folders, files = entries_of(path)
    found = [file for file in files if file.suffix.lower() in SOUND_SUFFIXES]
    if not found:
        raise ArgumentError(f"path must hold wav files; {path} holds none. Use class_from='folder' for sub-folders.")
    by_class: dict[str, list[Path]] = {}
    for file in found:
        prefix, *rest = re.split("[-_]", file.stem, maxsplit=1)
        if not prefix or not rest:
            raise ArgumentError(
                f"file names must begin with a class and '_' or '-', as 7_jackson_32.wav does; {file} does not. "
                "Rename it, or sort the files into sub-folders and use class_from='folder'."
            )
        by_class.setdefault(prefix, []).append(file)
    left_out = [f"{folder} (a folder)" for folder in folders]
    left_out += [f"{file} (of another type)" for file in files if file not in set(found)]
    tell_left_out(left_out, SOUND_SUFFIXES, path, strict=strict)
    return ClassFiles(dict(sorted(by_class.items())), len(left_out))
