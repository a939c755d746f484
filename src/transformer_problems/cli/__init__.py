"""The command line: `transformer-problems list | show | measure | report | diagnose | apply | export`."""

import errno
import os
import signal
import sys
from typing import NoReturn, cast

from transformer_problems.core.errors import TransformerProblemsError

_INTERRUPTED = 130  # the shell's exit code for Ctrl-C
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    import typer
    from typer.main import get_command

    from transformer_problems.cli.app import app

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end, a run ends as on Ctrl-C
    # Typer brings its own copy of click or uses the installed one, depending on its version.
    click_error = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
    try:
        code = get_command(app).main(prog_name="transformer-problems", standalone_mode=False)
        sys.stdout.flush()  # here, where an error can still be told
    except click_error as error:
        _fail(error.format_message().replace("Value error, ", ""))  # newer versions of Typer quote their own checker
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except TransformerProblemsError as error:
        _fail(str(error))
    except (BrokenPipeError, SystemExit) as error:
        # the reader, such as `head`, has seen enough, which click and rich answer by an exit with code 1
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()
        code = 0
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM:
            raise
        _fail(
            f"cannot write {error.filename or 'the output'}: {error.strerror}. "
            "Free some space, or use a place that you may write to."
        )
    if code == _INTERRUPTED:  # raised, or returned by versions of Typer that catch it
        goes_on = "measure" in sys.argv[1:2]  # only cells are kept from one run to the next
        kept = "; every finished cell is kept, and the same command goes on from here" if goes_on else ""
        print(f"\nstopped{kept}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    print(f"transformer-problems: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _drop_output() -> None:
    """Leave what is still to be printed unprinted: the end of the process would try once more, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
