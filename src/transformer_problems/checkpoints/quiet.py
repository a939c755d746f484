"""transformers, kept from telling of what it does."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Inside, transformers, and what it imports, tell nothing but errors and draw no bars; afterwards as before."""
    log = transformers.utils.logging
    level, bars, disabled = log.get_verbosity(), log.is_progress_bar_enabled(), logging.root.manager.disable
    log.set_verbosity_error()
    log.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
