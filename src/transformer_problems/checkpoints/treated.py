"""A treated checkpoint as a folder: one of Hugging Face's where its weights allow, with a record of what was done."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from transformer_problems.checkpoints.quiet import quiet
from transformer_problems.checkpoints.record import Step, TreatmentRecord
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import ArgumentError, CheckpointError, OutputError
from transformer_problems.core.transforms import Chain
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.solutions.compression.int8 import QuantizeInt8

RECORD = "treatment.json"
CODES = "treated.safetensors"  # not model.safetensors: transformers would fill in at random what codes stand for
_FORMAT = 1
_MAKER = "transformer-problems"


@contextmanager
def unfinished_folder(out: Path | None) -> Iterator[Path]:
    """An empty folder beside `out`, or among the system's temporary ones, that is gone afterwards unless finished.

    Raises:
        OutputError: If `out` is there already, or there is nowhere to write.
    """
    if out is not None:
        require_free(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}." if out else None, dir=out.parent if out else None))
    except OSError as error:
        raise OutputError(f"cannot write {error.filename}: {error.strerror}. Choose another place.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a finished one has another name by now


def require_free(out: Path) -> None:
    """A name that nothing has, in a folder that may be written to.

    Raises:
        OutputError: If it is not.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(f"--out must name a new folder; {out} exists already. Remove it, or choose another name.")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {out}: its folder is missing or may not be written to. Choose another.")


def finish(folder: Path, out: Path) -> None:
    """Give a whole folder its name.

    Raises:
        OutputError: If something has that name by now.
    """
    require_free(out)
    mask = _umask()
    folder.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone, and so are files of safetensors
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
    try:
        folder.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}. Choose another.") from error


def write_treated(subject: Subject, folder: Path) -> None:
    """Write config, weights, tokenizer and the record of a treated subject into an empty folder.

    Raises:
        ArgumentError: If it has no record.
        OutputError: If there is no room.
    """
    record = subject.record
    if record is None:
        raise ArgumentError(f"subject must be a treated one; {subject.name} has no record of a treatment.")
    model: Any = subject.model
    transformers = require("transformers", extra="clinic")
    try:
        with quiet(transformers):
            if record.holds_codes:
                model.config.dtype = str(subject.dtype).removeprefix("torch.")  # what the rest of it is rebuilt in
                model.config.architectures = [type(model).__name__]
                model.config.save_pretrained(folder)
                if getattr(model, "generation_config", None) is not None:
                    model.generation_config.save_pretrained(folder)
                save_treated(model, folder / CODES)
            else:
                model.save_pretrained(folder)
            _write_reader(subject, folder)
        if subject.folder is not None:
            _copy_sentence_parts(subject.folder, folder)
        (folder / RECORD).write_text(json.dumps(_told(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError, OutputError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise OutputError(
            f"cannot write the treated model into {folder.parent}: {told}. Free some space, or choose another folder."
        ) from error


def read_record(folder: Path) -> TreatmentRecord | None:
    """What was done to the checkpoint of a folder; None where this package did nothing.

    Raises:
        CheckpointError: If its record is damaged, or of a later version.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.get("made_by") != _MAKER:
            return None  # another program's file of that name
        if told["format"] != _FORMAT:
            raise CheckpointError(f"{file} is of format {told['format']!r}; known is {_FORMAT}. Update this package.")
        steps = tuple(
            Step(step["solution"], dict(step["settings"]), None if step["skip"] is None else tuple(step["skip"]))
            for step in told["steps"]
        )
        return TreatmentRecord(str(told["source"]), steps)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({error!r}). Apply the treatment again.") from error


def load_codes(transformers: Any, folder: Path, record: TreatmentRecord) -> Any:
    """The model whose weights are codes, as the class that was treated.

    Raises:
        CheckpointError: If its file does not fit its config and record.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        empty: nn.Module = getattr(transformers, config.architectures[0])._from_config(config, dtype=config.dtype)
        chain = Chain(*(QuantizeInt8(skip=step.skip) for step in record.steps if step.skip is not None))
        return load_treated(folder / CODES, empty, chain).requires_grad_(False)  # codes give no gradients
    except Exception as error:  # whatever a damaged config, record or file leads to
        told = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} cannot be read as it was treated: {told}") from error


def _write_reader(subject: Subject, folder: Path) -> None:
    reader = subject.tokenizer
    if hasattr(reader, "save_pretrained"):
        reader.save_pretrained(folder)
        _drop_own_options(folder / "tokenizer_config.json")
    elif reader is not None:
        statistics = {"image_mean": reader.image_mean, "image_std": reader.image_std}
        (folder / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")


def _copy_sentence_parts(source: Path, folder: Path) -> None:
    """What makes an encoder one of sentences, in the layout of sentence-transformers: how states are pooled, and so on.

    Raises:
        OutputError: If its list of parts is damaged.
    """
    listed = source / "modules.json"
    if not listed.is_file():
        return
    try:
        parts = [str(part["path"]) for part in json.loads(listed.read_text(encoding="utf-8"))]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise OutputError(f"cannot copy what {listed} lists: it is damaged ({error!r}). Download it again.") from error
    for file in (listed, *source.glob("*sentence*.json")):
        shutil.copy(file, folder)
    for part in parts:
        inside = source.resolve() in (source / part).resolve().parents  # "" is the encoder itself
        if inside and (source / part).is_dir():
            shutil.copytree(source / part, folder / part)


def _drop_own_options(file: Path) -> None:
    """Of a tokenizer's settings, how it was read here: transformers writes that down with the rest."""
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _told(record: TreatmentRecord) -> dict[str, Any]:
    return {
        "made_by": _MAKER,
        "format": _FORMAT,
        "source": record.source,
        "solutions": list(record.solutions),
        "steps": [
            {"solution": step.solution, "settings": dict(step.settings), "skip": step.skip}  # a tuple is told as a list
            for step in record.steps
        ],
    }


def _umask() -> int:
    """The process's own, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
