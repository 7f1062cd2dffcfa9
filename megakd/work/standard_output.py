"""Standard output that is full, closed or cannot encode a name: one line says so, never a traceback."""

from __future__ import annotations

import io
import os
import sys

from megakd.artefacts.durable_files import FULL
from megakd.errors import ExitStatus
from megakd.work.console import tell


def print_any_name() -> None:
    """Let stdout and stderr print file names of any bytes: those that are no text appear escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> OSError | None:
    """Write the buffered output now rather than at the interpreter's end.

    Returns the error where it cannot be written; the output is then dropped.
    """
    if sys.stdout is None:  # closed before the start: nothing was printed
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter would try again
        return error
    return None


def explain_unwritten(error: OSError) -> int:
    """Say on stderr that standard output takes no more; returns the exit status."""
    if isinstance(error, BrokenPipeError):  # whoever read it has seen enough
        return ExitStatus.FAILED
    tell(f"error: standard output: {error.strerror}; what was printed is not complete")
    return ExitStatus.NO_SPACE if error.errno in FULL else ExitStatus.FAILED
