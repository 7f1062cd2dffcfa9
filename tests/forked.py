"""Verbs in processes of their own that begin with torch loaded: forked, so that being killed costs no import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from no_gpu import hidden_gpus
from worlds import PRELOADED


class ForkedVerb:
    """``megakd VERB ...`` in a process, with one thread; what tests use of ``subprocess.Popen``."""

    def __init__(self, words: Sequence[str], *, folder: Path | None = None) -> None:
        """Start ``megakd`` with these words, in ``folder`` or where the tests run."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._streams = tuple(tempfile.NamedTemporaryFile("r") for _ in range(2))
        names = [stream.name for stream in self._streams]
        self._process = context.Process(target=_run, args=(list(words), *names, folder))
        with hidden_gpus():  # the first start makes the process that all others are forked from
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, less than 0 after a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; returns what stands on standard output and error."""
        self._process.join(timeout)
        assert self.returncode is not None, f"process {self.pid} did not end within {timeout} s"
        output, errors = (stream.read() for stream in self._streams)
        return output, errors


def _run(words: list[str], output: str, errors: str, folder: Path | None) -> None:
    if folder is not None:
        os.chdir(folder)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # As many ranks as cores on this machine, for all that it knows: one thread, on one that tests keep busy.
    os.environ.update(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE=str(len(os.sched_getaffinity(0))))
    from megakd.__main__ import main

    sys.exit(main(words))
