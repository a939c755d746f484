"""Treated models on disk: one safetensors file, read back by the transform that made the model."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.transforms import ModelTransform


def save_treated(model: nn.Module, path: Path | str) -> int:
    """Write every parameter and persistent buffer, shared ones once, and return the bytes of the file.

    Raises:
        OutputError: If the file cannot be written.
    """
    path = Path(path)
    try:
        save_model(model, str(path))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"path must be writable; got {path}: {error}. Choose another.") from error
    return path.stat().st_size


def load_treated(path: Path | str, model: nn.Module, transform: ModelTransform) -> nn.Module:
    """The treated model that `save_treated` wrote, with equal outputs.

    Args:
        model: An untreated model of the same architecture, with any weights; left as it is.
        transform: What made the saved model, or an equal one.

    Raises:
        ArgumentError: If the file is missing, truncated, or does not fit the model and the transform.
    """
    path = Path(path)
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"path must be a whole safetensors file; got {path}: {error}. Save it again.") from error
    treated = transform.rebuild(model, tensors)
    try:
        load_model(treated, str(path))
    except RuntimeError as error:
        raise ArgumentError(
            f"{path} must hold a {type(model).__name__} treated by {transform!r}; its tensors do not fit: {error}"
        ) from error
    for name, tensor in treated.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArgumentError(f"{path} must hold finite numbers; {name} has NaN or infinity. Save it again.")
    return treated
