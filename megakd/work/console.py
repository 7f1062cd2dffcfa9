"""Lines that long work prints by the way: it goes on where nobody reads them, or where the log's disk is full."""

from __future__ import annotations

import os
import sys
from typing import Literal


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
