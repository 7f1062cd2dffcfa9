"""The worker's end of a `worker_pool`: settings and jobs come in, answers go out, as lines of JSON.

It uses Python's own JSON, which carries file names of any bytes.
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
"""Callable that sends one answer about the job at hand."""
Work = Callable[[Mapping[str, Any], Report], object]
"""Callable that does one job and reports about it."""


def serve(prepare: Callable[[dict[str, Any]], Work]) -> int:
    """Do jobs until the input ends. prepare: takes the settings and returns the function that does a job.

    An error ends the process: it is sent to the pool, and its exit status is returned.
    """
    gc.disable()  # no cycles are made, and the collector would walk the records of each batch again and again
    # The output of libraries must not mix with the answers.
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
    """Queue the messages that come in. At the end of the input, when the parent closed it or died, end at once."""
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    os._exit(0)
