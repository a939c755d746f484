"""Keeps the chatter of exporters and quantisers from the user's terminal; their errors are raised and pass."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

_TALKATIVE = ("torch", "torch.__trace", "onnxscript", "onnx_ir", "onnxruntime", "")  # "" is the root logger


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of these libraries while it lasts; everything is as before afterwards.

    Warnings, standard output and loggers belong to the whole process, so other threads are quiet too.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    placeholder = logging.NullHandler()  # without any handler logging.warning() would add one of its own for good
    loggers[-1].addHandler(placeholder)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        loggers[-1].removeHandler(placeholder)
