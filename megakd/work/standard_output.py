"""Standard output that may be full, closed or asked to print any bytes: told in a line, never in a traceback."""

from __future__ import annotations

import io
import os
import sys

from megakd.artefacts.durable_files import FULL
from megakd.errors import ExitStatus
from megakd.work.console import tell


def print_any_name() -> None:
    """Let both standard streams print the names of files whatever their bytes, escaped, as stderr does by itself."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> OSError | None:
    """Write what was printed, now and not as the interpreter ends; what cannot be is dropped, and the reason told."""
    if sys.stdout is None:  # closed: nothing was printed
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it would be tried, and fail, once more
        return error
    return None


def explain_unwritten(error: OSError) -> int:
    """Say on stderr that standard output takes no more; returns the exit status."""
    if isinstance(error, BrokenPipeError):  # whoever read it has seen enough
        return ExitStatus.FAILED
    tell(f"error: standard output: {error.strerror}; what was printed is not complete")
    return ExitStatus.NO_SPACE if error.errno in FULL else ExitStatus.FAILED
