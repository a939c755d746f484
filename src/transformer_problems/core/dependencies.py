"""Optional packages, loaded where they are used."""

import importlib
from types import ModuleType

from transformer_problems.core.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package or say which command installs it.

    Args:
        module: Import name, e.g. "onnxruntime".
        extra: The extra of this package that brings it.

    Raises:
        MissingDependencyError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module} is not installed. Install it with: pip install 'transformer-problems[{extra}]'"
        ) from error
