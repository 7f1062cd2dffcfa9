"""Standard streams that are closed, full, or cannot encode a name: long work goes on, a command says so in one line."""

from __future__ import annotations

import io
import os
import sys
from typing import Literal

from megakd.artefacts.durable_files import FULL
from megakd.errors import ExitStatus


def keep_stream_numbers() -> None:
    """Open the standard streams that were closed before the start (``2>&-``) on /dev/null.

    Else the first file that the work opens would take the free number, and libraries, which write warnings to number 2,
    would write them into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def tell(text: str, *, on: Literal["stdout", "stderr"] = "stderr") -> None:
    """Print ``text`` at once; where the stream cannot be written, drop it and all that follows on that stream.

    For work that goes on whether its lines are read or not. A command that is run for its output should use ``print``.
    """
    stream = getattr(sys, on)
    if stream is None:  # closed before the start
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # Else the text in the stream's buffer would be written, and fail, again: at the next line and at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if on == "stdout" and not isinstance(error, BrokenPipeError):
            tell(f"standard output cannot be written: {error.strerror}; the work goes on without it")


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
