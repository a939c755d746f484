"""Files that take their place only when they are whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformer_problems.core.errors import OutputError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A draft of the same name in a folder beside `path`; at the end it and its companions are moved there.

    After an error nothing is moved and the draft is gone.

    Raises:
        OutputError: If the folder of `path` is not there or cannot be written, or `path` is a folder.
    """
    try:
        folder = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"path must lie in a folder that can be written; got {path}: {error}.") from error
    with folder as name:
        draft = Path(name, path.name)
        yield draft
        try:
            for file in sorted(draft.parent.iterdir(), reverse=True):  # weights first, for the model points to them
                file.replace(path.parent / file.name)
        except OSError as error:
            raise OutputError(f"path must be a file that can be written; got {path}: {error}.") from error


def bytes_of(draft: Path) -> int:
    """Bytes of a draft and its companions."""
    return sum(file.stat().st_size for file in draft.parent.iterdir())
