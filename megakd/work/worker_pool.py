"""A pool of worker processes: a dead worker is replaced within seconds, a silent one ends the run.

A worker is a module run as a program. It reads lines of JSON, the settings and then one job after another, and
answers each with any number of lines, of which the last is ``{"done": true}`` or ``{"error": name, "message": text}``.
Workers are started anew, never forked, so that they inherit no thread or lock of this process. They end when their
input does, which includes the death of this process.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import megakd
from megakd import errors
from megakd.errors import StoppedBySignal
from megakd.work.console import tell

Job = Mapping[str, Any]
OnMessage = Callable[[Job, dict[str, Any]], object]
"""Callback that takes a job and one answer about it."""

_ATTEMPTS = 2
_POLL_SECONDS = 0.2
_STALL_SECONDS = 600.0
# Workers import the megakd of this process, installed or not, and nothing else from the folder that it lies in.
_START = """
import sys
sys.path.insert(0, sys.argv[1])
import megakd
del sys.path[0]
import runpy
runpy.run_module(sys.argv[2], run_name="__main__")
"""
# One core for each worker: the work is spread over processes.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class WorkerPool:
    """Pool of ``num_workers`` processes that run ``module``. A context manager: leaving it ends them at once.

    stopped: called several times a second; once it returns True, `run` raises StoppedBySignal.
    """

    def __init__(
        self, module: str, settings: Mapping[str, Any], num_workers: int, *, stopped: Callable[[], bool]
    ) -> None:
        self._module, self._settings, self._num_workers, self._stopped = module, settings, num_workers, stopped
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self, jobs: Iterable[Job], on_message: OnMessage) -> None:
        """Do all jobs, in any order. on_message: called with every answer about a job but the last.

        A job whose worker dies is done once more by a new worker.

        Raises the error that a worker raised, if it is one of `megakd.errors`; ChildProcessError for any other, and
        for a job whose worker died twice or said nothing for ten minutes; StoppedBySignal.
        """
        todo = deque((job, 1) for job in jobs)
        while len(self._workers) < min(self._num_workers, len(todo)):
            self._start()
        while todo or any(worker.job is not None for worker in self._workers):
            for worker in self._workers:
                if worker.job is None and todo:
                    worker.give(*todo.popleft())
            for key, _ in self._selector.select(_POLL_SECONDS):
                worker = key.data
                if not worker.read(on_message):
                    self._bury(worker, todo)
            if self._stopped():
                raise StoppedBySignal("stopped by a signal")
            for worker in list(self._workers):
                if worker.job is not None and time.monotonic() - worker.heard > _STALL_SECONDS:
                    raise ChildProcessError(f"worker {worker.pid} has said nothing for {_STALL_SECONDS:.0f} s")

    def close(self) -> None:
        """End every worker now."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._selector.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        worker = _Worker(self._module, self._settings)
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _bury(self, worker: _Worker, todo: deque[tuple[Job, int]]) -> None:
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        status = worker.close()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if worker.job is not None:
            if worker.attempt == _ATTEMPTS:
                raise ChildProcessError(f"worker {worker.pid} died ({how}) on {worker.job}, as did the one before it")
            tell(f"worker {worker.pid} died ({how}); its work is done again")
            todo.appendleft((worker.job, worker.attempt + 1))
        if todo:
            self._start()


class _Worker:
    def __init__(self, module: str, settings: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(Path(megakd.__file__).parents[1]), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0,  # Ctrl-C is for this process, which ends its workers
        )
        self.pid = self.process.pid
        self.job: Job | None = None
        self.attempt = 0
        self.heard = time.monotonic()
        self._buffer = b""
        self._send(settings)

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def give(self, job: Job, attempt: int) -> None:
        self.job, self.attempt, self.heard = job, attempt, time.monotonic()
        self._send(job)

    def read(self, on_message: OnMessage) -> bool:
        """Take the answers that have arrived; False at the end of the worker's output, which is its death."""
        data = os.read(self.output.fileno(), 1 << 16)
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise _error_of(message)
            if "done" in message:
                self.job = None
            elif self.job is not None:
                on_message(self.job, message)
        return bool(data)

    def close(self) -> int:
        """Reap the process; returns its exit status, negative for a signal."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # the worker died before it read a job
        return self.process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # the worker is dead: the end of its output will show that


def _error_of(message: Mapping[str, Any]) -> Exception:
    kind = getattr(errors, message["error"], None)
    text = str(message["message"])
    if kind is errors.NoSpaceError:
        return errors.NoSpaceError(*message["args"])
    if isinstance(kind, type) and issubclass(kind, ValueError):
        return kind(text)
    return ChildProcessError(f"a worker failed: {message['error']}: {text}")
