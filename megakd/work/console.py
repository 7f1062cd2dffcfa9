"""Lines that long work prints by the way: that nobody reads them, or a log's disk is full, is no reason to stop."""

from __future__ import annotations

import os
import sys
from typing import Literal


def keep_stream_numbers() -> None:
    """Open what was closed before the start (``2>&-``) as nothing, so that no file of the work's takes its number.

    Libraries write warnings to number 2, whatever that is: the record of a run, else.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def tell(text: str, *, on: Literal["stdout", "stderr"] = "stderr") -> None:
    """Print ``text`` at once, or drop it, and all that follows on that stream, where it cannot be written.

    For what goes on whether it is read or not. A command that is run for what it prints should use ``print``.
    """
    stream = getattr(sys, on)
    if stream is None:  # closed before the start
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What waits in the stream's buffer would be tried, and fail, again: at the next line, and at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if on == "stdout" and not isinstance(error, BrokenPipeError):
            tell(f"standard output cannot be written: {error.strerror}; the work goes on without it")
