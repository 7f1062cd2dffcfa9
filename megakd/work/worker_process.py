"""The worker's end of a pool (see `workers`): settings and jobs come in, answers go out, as lines of JSON.

Python's own JSON, which carries the names of files whatever their bytes.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Report = Callable[[Mapping[str, Any]], object]
"""Sends one answer about the job that is being done."""
Work = Callable[[Mapping[str, Any], Report], object]
"""Does one job."""


def serve(prepare: Callable[[dict[str, Any]], Work]) -> int:
    """Do jobs until the input ends. prepare: makes of the settings what does them.

    Returns the exit status after an error, which the pool is told.
    """
    gc.disable()  # nothing here makes cycles, and the collector would walk the records of a batch again and again
    # What a library prints must not mix with the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    def answer(message: Mapping[str, Any]) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    try:
        work = prepare(inbox.get())
        while True:
            work(inbox.get(), answer)
            answer({"done": True})
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or not hasattr(error, "status"):
            traceback.print_exc()
        details = [value for value in error.args if isinstance(value, (int, str))]
        if isinstance(error, OSError) and error.filename is not None:
            details.append(str(error.filename))
        answer({"error": type(error).__name__, "message": str(error), "args": details})
        return 1


def _listen(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on what comes in. The end of the input is the end of the parent, or its wish: end at once, mid-job too."""
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    os._exit(0)
