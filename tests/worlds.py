"""Persistent worlds of gloo processes for tests: each world size is started once, not per test.

``world(4).run(fn, *args)`` calls ``fn(*args)`` on four ranks; the four results come in rank order. ``fn`` must be a
module-level function; it is passed by file and name, arguments and results by value. Each rank has the gloo world group
and one torch thread, nothing else: no GPU either. Process groups that a function makes are taken down when it returns.
All ranks are forked from one process that has imported torch and megatron-core already: an import is four seconds of a
core.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from no_gpu import HIDDEN, hidden_gpus

START_TIMEOUT_SECONDS = 240.0
RUN_TIMEOUT_SECONDS = 240.0
# Imported by the process that all ranks are forked from. No import may start a thread: a fork would leave it behind.
PRELOADED = ["megakd.train.loop", "megakd.pipeline.capture.run", "megakd.pipeline.score.run"]
MOST_THREADS = 64  # what a test leaves referenced keeps its groups' threads alive: a world with more is replaced
STACK_TIMEOUT_SECONDS = 10.0
GRACE_SECONDS = 3.0  # after one rank has failed, the others get this long before they count as stuck in a collective


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the message holds what every rank has to say."""


class World:
    """``size`` processes in one gloo group; started on first use and again after a failure that left them stuck."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = RUN_TIMEOUT_SECONDS) -> list[Any]:
        """Call ``fn(*args)`` on every rank; the results in rank order. Raises RankError."""
        if not self._processes:
            self._start()
        call = (fn.__code__.co_filename, fn.__module__, fn.__qualname__, pickle.dumps(args))
        try:
            for connection in self._connections:
                connection.send(call)
        except OSError:
            pass  # a rank is gone: _collect says which and how
        return self._collect(timeout)

    def close(self) -> None:
        """Stop the processes: politely, then for good."""
        for connection in self._connections:
            connection.close()  # a worker leaves on the end of its pipe
        deadline = time.monotonic() + 1.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="world-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # Not daemons: what runs inside may start processes of its own (asynchronous checkpoints do).
            process = context.Process(target=_serve, args=(theirs, rank, self.size, self._folder.name), daemon=False)
            with hidden_gpus():  # the first start makes the process that all ranks are forked from
                process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        atexit.register(self._kill)  # before multiprocessing's own exit handler, which would join them
        self._collect(START_TIMEOUT_SECONDS)

    def _collect(self, timeout: float) -> list[Any]:
        waiting = dict(zip(self._connections, range(self.size)))
        results: list[Any] = [None] * self.size
        threads = 0
        failures: dict[int, str] = {}
        broken = False
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    failures[rank] = f"no answer; where it stands:\n{self._stack(rank)}"
                broken = True
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, payload, own_threads = connection.recv()
                    threads = max(threads, own_threads)
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1.0)
                    ok, payload, broken = False, f"died with exit code {self._processes[rank].exitcode}", True
                if ok:
                    results[rank] = pickle.loads(payload)
                else:
                    failures[rank] = payload
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if broken or threads > MOST_THREADS:
            self._kill()
        if failures:
            reports = [f"rank {rank} of {self.size}: {text}" for rank, text in sorted(failures.items())]
            raise RankError("\n".join(reports))
        return results

    def _stack(self, rank: int) -> str:
        assert self._folder is not None
        process = self._processes[rank]
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
        path = Path(self._folder.name, f"stack-{rank}")
        deadline = time.monotonic() + STACK_TIMEOUT_SECONDS
        while time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
            time.sleep(0.05)
        time.sleep(0.2)  # the rest of it
        return path.read_text() if path.exists() else ""

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Worlds:
    """One World per size, for a whole test session."""

    def __init__(self) -> None:
        self._by_size: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        return self._by_size.setdefault(size, World(size))

    def close(self) -> None:
        for world in self._by_size.values():
            world.close()


def _serve(connection: Connection, rank: int, size: int, folder: str) -> None:
    """A rank's main loop: join the group, then answer calls until the pipe ends."""
    with open(Path(folder, f"stack-{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to pytest, which then closes the pipe
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), OMP_NUM_THREADS="1", **HIDDEN)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = f"file://{Path(folder, 'store')}"
        limit = timedelta(seconds=RUN_TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=limit)
        connection.send((True, pickle.dumps(None), _num_threads()))
        modules: dict[str, ModuleType] = {}
        while True:
            try:
                file, module_name, name, arguments = connection.recv()
            except (EOFError, ConnectionResetError):
                os._exit(0)  # no goodbye to the group: the other ranks are leaving too
            try:
                if file not in modules:
                    modules[file] = _load(file, module_name)
                result = getattr(modules[file], name)(*pickle.loads(arguments))
                answer: tuple[bool, bytes | str] = (True, pickle.dumps(result))
            except BaseException:  # whatever it was, the test that called must see it
                answer = (False, traceback.format_exc())
            _take_down_groups()
            connection.send((*answer, _num_threads()))


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


def _take_down_groups() -> None:
    """Free every group but the world: each has threads of its own, thousands after a hundred layouts."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import GroupMember, _world

    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        megatron.destroy_model_parallel()
    for group in list(_world.pg_map):
        if group is not GroupMember.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def _load(file: str, module_name: str) -> ModuleType:
    """The module in ``file`` under the name it has in the test's process, so that pickles of its classes find it."""
    loaded = sys.modules.get(module_name)
    if loaded is not None and loaded.__file__ == file:
        return loaded  # once only: a class that exists twice cannot be pickled
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
