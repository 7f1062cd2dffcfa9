"""Child processes that do not outlive their parent, even where it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends, and leave SIGTERM and SIGINT to the
    parent.

    Does nothing on systems other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    # A launcher signals the whole process group, but a parent that is saving still needs its children.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # the parent ended before the request
        os._exit(1)
