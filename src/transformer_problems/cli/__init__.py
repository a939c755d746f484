"""The command line: `transformer-problems list | show | measure | report | export`."""

import sys
from typing import cast

from transformer_problems.core.errors import TransformerProblemsError

_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    import typer
    from typer.main import get_command

    from transformer_problems.cli.app import app

    # Typer brings its own copy of click or uses the installed one, depending on its version.
    click_error = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
    try:
        code = get_command(app).main(prog_name="transformer-problems", standalone_mode=False)
    except click_error as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except TransformerProblemsError as error:
        _fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader, such as `head`, has seen enough
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"cannot write {error.filename}: {error.strerror}. Free some space or choose another --out.")
    if code == _INTERRUPTED:  # raised, or returned by versions of Typer that catch it
        print("\nstopped; every finished cell is kept, and the same command goes on from here", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"transformer-problems: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
