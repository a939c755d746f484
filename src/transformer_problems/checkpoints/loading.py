"""A checkpoint's folder, or the id of one, as a Subject: checked before it is loaded, and never by running its code."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transformer_problems.checkpoints.quiet import quiet
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.checkpoints.treated import CODES, load_codes, read_record
from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import CheckpointError

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NUMBERED = re.compile(r"(?:^|\.)(\w+)\.(\d+)(?=\.)")  # "layers", "5" of model.layers.5.mlp.weight
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SUPPORTED = (
    "Supported are causal language models (such as Llama, GPT-2, Qwen), encoders (such as BERT, RoBERTa, ALBERT) and "
    "image models of the ViT and Swin families"
)
_MOST_WORDS = 40  # of what from_pretrained tells: its first line alone often says only that there is an error
_IMAGE_MODELS = ("vit", "deit", "beit", "swin", "swinv2", "dinov2", "dinov2_with_registers")
_TRIED = 12  # tokens of the pass that shows whether a model can be examined
_SAME, _ROUNDINGS = 1e-3, 32  # how far two ways to compute one answer may be apart, and at least, in roundings
_WIDENED = (
    "it is stored in float16 and examined in float32, which a CPU computes faster: bytes of weights are twice as many"
)


def load_subject(
    model: str | Path, *, device: torch.device | str = "cpu", allow_pickle: bool = False, tokenizer: Path | None = None
) -> Subject:
    """Read a checkpoint in the layout of Hugging Face, in the precision of its weights; on a CPU float16 as float32.

    A name that is a folder here is read from it. Any other of the form "owner/name" is an id, taken from the local
    cache or, if it is not there, downloaded; nothing else reaches for the network.

    Args:
        allow_pickle: Read .bin weights where there are no safetensors, as plain tensors only.
        tokenizer: A folder that holds the tokenizer, if the model's own does not.

    Raises:
        CheckpointError: If there is no such checkpoint, it is of another kind, damaged, unsafe, or larger than memory;
            nothing is loaded then.
        MissingDependencyError: If transformers is not installed.
    """
    transformers = require("transformers", extra="clinic")
    folder = _folder(str(model))
    settings = _config(folder)
    with quiet(transformers):
        kind, name = _kind(transformers, settings, folder)
    record = read_record(folder)
    of_codes = record is not None and record.holds_codes
    files = [folder / CODES] if of_codes else _weight_files(folder, allow_pickle)
    for file in files:
        if file.suffix == ".safetensors":
            _check_readable(file)
    _check_room(sum(file.stat().st_size for file in files), folder, torch.device(device))
    with quiet(transformers):
        loaded = (
            load_codes(transformers, folder, record)
            if record is not None and of_codes
            else _load_model(transformers, name, folder, files)
        )
        loaded = loaded.to(device).eval()
        reader = _load_reader(transformers, kind, tokenizer or folder, folder)
        caution = None
        if _is_half_on_cpu(loaded):
            _check_room(2 * loaded.num_parameters() * loaded.dtype.itemsize, folder, loaded.device)
            loaded, caution = loaded.float(), _WIDENED
        subject = Subject(_called(str(model), folder), kind, loaded, reader, caution, record, folder)
        _check_shows_itself(subject)
    return subject


def subject_of(model: nn.Module, tokenizer: Any = None, *, name: str | None = None) -> Subject:
    """A model of transformers that is in memory already.

    Args:
        tokenizer: Needed for a model of text.

    Raises:
        CheckpointError: If it is no model of transformers, of another kind, or lacks its tokenizer.
    """
    transformers = require("transformers", extra="clinic")
    if not isinstance(model, transformers.PreTrainedModel):
        raise CheckpointError(
            f"model must be a model of transformers; got {type(model).__name__}. Load it with from_pretrained."
        )
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    with quiet(transformers):
        kind, _ = _kind(transformers, settings, type(model).__name__)
    if kind != "image" and tokenizer is None:
        raise CheckpointError(f"tokenizer must be given for {type(model).__name__}, which reads text.")
    if kind != "image" and not callable(tokenizer):
        raise CheckpointError(
            f"tokenizer must be one of transformers; got {type(tokenizer).__name__}. Load it with AutoTokenizer."
        )
    if _is_half_on_cpu(model):
        raise CheckpointError(
            f"model must not be in float16 on a CPU, which multiplies it number by number; {type(model).__name__} is. "
            "Pass model.float() or model.bfloat16(), or move it to a GPU."
        )
    subject = Subject(name or type(model).__name__, kind, model, tokenizer)
    with quiet(transformers):
        _check_shows_itself(subject)
    return subject


def _is_half_on_cpu(model: Any) -> bool:
    """Whether a pass would take many times as long as in float32."""
    return bool(model.device.type == "cpu" and model.dtype == torch.float16)


def _folder(model: str) -> Path:
    if not model.strip():
        raise CheckpointError("MODEL must be a folder or an id; it is empty. Name one, or . for the present folder.")
    if (path := Path(model).expanduser()).exists():
        if not path.is_dir():
            raise CheckpointError(f"MODEL must be a folder with a config.json, or an id; {path} is a file.")
        return path.resolve()
    if not _ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(f"MODEL must be a folder, or an id such as owner/name; there is no {model} here.")
    hub = require("huggingface_hub", extra="clinic")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(hub.snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # whatever the hub, its cache or the network say: one line of it, and the cause behind
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{model} is no folder here and could not be had as an id ({told}). Check the name, or download it first."
        ) from error


def _called(model: str, folder: Path) -> str:
    """What the reader calls it: the folder of an id has the name of a revision."""
    return folder.name if Path(model).expanduser().exists() else model


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"MODEL must hold a config.json; {folder} holds none. Name the folder of a checkpoint.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} must hold an object; it holds {type(settings).__name__}. Download it again.")
    return settings


def _kind(transformers: Any, settings: dict[str, Any], where: object) -> tuple[Kind, str]:
    """The kind, and the name of the class to load it as."""
    from transformers.models.auto import modeling_auto as auto

    family = str(settings.get("model_type"))
    names = settings.get("architectures") or [auto.MODEL_MAPPING_NAMES.get(family, "")]
    name = names[0] if isinstance(names[0], str) else ""
    if settings.get("auto_map") and not hasattr(transformers, name):
        raise CheckpointError(f"{where} needs code of its own to run, which is never done. {_SUPPORTED}.")
    if not name or not hasattr(transformers, name):
        raise CheckpointError(f"{where} has an unknown architecture ({name or family}). {_SUPPORTED}.")
    if settings.get("is_encoder_decoder"):
        raise CheckpointError(f"{where} ({name}) is an encoder with a decoder. {_SUPPORTED}.")
    if "vision_config" in settings or "audio_config" in settings:
        raise CheckpointError(f"{where} ({name}) reads more than text, or than images. {_SUPPORTED}.")
    if family in _IMAGE_MODELS:
        classifiers = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(family)  # DeiT has two
        known = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers or ())
        return "image", name if name in known else str(auto.MODEL_MAPPING_NAMES[family])
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not name.startswith(("Bert", "Roberta", "Electra")):
        return "causal", name
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "encoder", name
    reads_masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if reads_masked and family in auto.MODEL_MAPPING_NAMES:  # a classifier's body, or the body alone
        body = auto.MODEL_MAPPING_NAMES[family]
        return "encoder", body if isinstance(body, str) else body[0]
    if family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name == auto.MODEL_MAPPING_NAMES.get(family):
        head = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        raise CheckpointError(f"{where} ({name}) is a causal body without its head. Save it as {head}.")
    raise CheckpointError(f"{where} ({name}) is of a kind that the clinic has no check-ups for. {_SUPPORTED}.")


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}). Download it again.") from error
        files = [folder / str(shard) for shard in shards]
        if outside := [file for file in files if file.resolve().parent != folder.resolve() and not file.is_symlink()]:
            raise CheckpointError(f"{index} names a file outside its folder ({outside[0].name}), which is not read.")
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}, which its index names. Download it again.")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(file for pattern in _PICKLES for file in folder.glob(pattern))
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights (model.safetensors). Name the folder of a whole checkpoint.")
    if not allow_pickle or not (folder / "pytorch_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code. Convert them to "
            "safetensors, or pass --allow-pickle to read a pytorch_model.bin as plain tensors."
        )
    return [folder / "pytorch_model.bin"]


def _check_readable(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            if not list(opened.keys()):
                raise CheckpointError(f"{file} holds no weights. Download it again.")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}). Download it again.") from error


def _check_room(num_bytes: int, folder: Path, device: torch.device) -> None:
    free: float = require("psutil", extra="clinic").virtual_memory().available
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if num_bytes > free:
        raise CheckpointError(
            f"the weights of {folder} need {num_bytes / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Free "
            "some, or take a smaller model."
        )


def _load_model(transformers: Any, name: str, folder: Path, files: list[Path]) -> Any:
    """The model with every weight in place; what it lacks or has too much of is told, not filled in at random."""
    is_pickle = files[0].suffix == ".bin"
    try:
        loaded, told = getattr(transformers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=not is_pickle,
            weights_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, with the sizes
        )
    except Exception as error:  # from_pretrained raises whatever a damaged config or file leads to
        reason = " ".join(str(error).split()[:_MOST_WORDS]) or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded as {name}: {reason}") from error
    if told["mismatched_keys"]:
        key, stored, wanted = min(told["mismatched_keys"])
        raise CheckpointError(
            f"{folder} holds {key} of shape {list(stored)}, where its config.json asks for {list(wanted)}. Download "
            "both again."
        )
    missing = [key for key in told["missing_keys"] if "pooler" not in key]
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights that {name} needs ({', '.join(sorted(missing)[:3])}). Download it again."
        )
    if left_over := _first_of_a_further_layer(loaded, told["unexpected_keys"]):
        raise CheckpointError(
            f"{folder} holds weights of more layers than its config.json names ({left_over}), which would be left out. "
            "Download both again."
        )
    if bad := next((key for key, part in loaded.named_parameters() if not bool(part.isfinite().all())), None):
        raise CheckpointError(f"{folder} holds weights that are not finite ({bad}). Take an earlier checkpoint.")
    return loaded


def _first_of_a_further_layer(model: nn.Module, left_over: Collection[str]) -> str | None:
    """A weight beyond the end of a list of layers; a head, or old buffers of a layer, are left out rightly."""
    ends: dict[str, int] = {}
    for path, part in model.named_modules():
        if isinstance(part, nn.ModuleList):
            name = path.rpartition(".")[2]
            ends[name] = max(len(part), ends.get(name, 0))
    beyond = (
        key
        for key in left_over
        if any(name in ends and int(number) >= ends[name] for name, number in _NUMBERED.findall(key))
    )
    return min(beyond, default=None)


def _load_reader(transformers: Any, kind: Kind, source: Path, folder: Path) -> Any:
    if kind == "image":
        file = source / "preprocessor_config.json"
        return _ImageStatistics(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever a missing or damaged file leads to
        raise CheckpointError(
            f"{source} holds no tokenizer that can be read. Copy its tokenizer.json there, or name its folder with "
            "--tokenizer."
        ) from error


@torch.no_grad()
def _check_shows_itself(subject: Subject) -> None:
    """Of a model of text, that a pass shows what check-ups look at: states and weights between all tokens, by layer.

    It does not where layers have a recurrent state in place of attention (Mamba, Jamba), pool their tokens (Funnel) or
    weigh them in another form (Longformer), nor where what is shown is of another pass than what answers: transformers
    adds the biases by distance of Falcon twice when asked for its weights.
    """
    if subject.kind == "image":
        return
    name = f"{subject.name} ({type(subject.model).__name__})"
    num = min(_TRIED, subject.hard_limit or _TRIED)
    tokens = torch.arange(num, device=subject.device)[None] + 3  # beyond those that pad, begin and end
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        seen, layers = subject.run(inputs, states=True, attentions=True), subject.num_layers
        plain = subject.run(inputs).output
    except Exception as error:  # whatever a model of another build leads to
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{name} does not show its attention: {told.rstrip('.')}. {_SUPPORTED}.") from error
    shown = [tuple(weights.shape[-2:]) for weights in seen.attentions if weights.dim() == 4]
    if len(seen.states) != layers + 1 or shown != [(num, num)] * layers or _is_negative(seen.attentions):
        raise CheckpointError(f"{name} does not have attention between all tokens in each layer. {_SUPPORTED}.")
    looks_ahead = any(bool(weights.triu(1).any()) for weights in seen.attentions)
    if looks_ahead != (subject.kind == "encoder"):
        how = ("write", "see") if looks_ahead else ("read", "do not see")
        raise CheckpointError(
            f"{name} is to {how[0]} text, and its tokens {how[1]} what comes after them. {_SUPPORTED}."
        )
    rounding = max(_SAME, _ROUNDINGS * torch.finfo(plain.dtype).eps)
    if float((seen.output - plain).float().norm()) > rounding * float(plain.float().norm()):
        raise CheckpointError(
            f"{name} answers otherwise where its attention is looked at, so that this would tell of another model. "
            f"{_SUPPORTED}."
        )


def _is_negative(attentions: tuple[Tensor, ...]) -> bool:
    """Whether scores are shown in place of shares."""
    return any(bool((weights < 0).any()) for weights in attentions)


class _ImageStatistics:
    """What an image processor's file says of a model's pixels."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.image_mean, self.image_std = settings.get("image_mean"), settings.get("image_std")
