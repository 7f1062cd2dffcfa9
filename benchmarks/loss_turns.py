"""Cases of bench_loss.py in processes of their own, which build, warm up and take a turn when they are told to.

While one case works the others wait, holding little: inputs are made for each turn and dropped after it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import loss_peers
import torch
import torch.distributed as dist
from loss_inputs import HeadInputs, LogitInputs, Problem, head_inputs, logit_inputs, no_inputs, sparse_inputs
from torch.utils._python_dispatch import TorchDispatchMode

ANSWER_SECONDS = 900.0
_CHECKED_TOKENS = 64


class SkippedError(Exception):
    """A case cannot run here; the text says why."""


class FailedError(Exception):
    """A case that must run does not, or computes something else."""


@dataclass(frozen=True)
class Case:
    """build: see loss_peers. inputs: given a problem, a function that makes its inputs anew. held: memory at its peak,
    inputs included, in units of the bf16 logits, generously."""

    build: Callable[[Problem], loss_peers.Run]
    inputs: Callable[[Problem], Callable[[], Any]]
    held: float
    compiles: bool = False


CASES: dict[str, dict[str, Case]] = {
    "head": {
        "megakd": Case(loss_peers.head_megakd, head_inputs, 3),
        "products": Case(loss_peers.head_products, head_inputs, 3),
        "liger KD": Case(loss_peers.head_liger_distil, head_inputs, 8, compiles=True),
        "liger LM + KD": Case(loss_peers.head_liger, head_inputs, 8, compiles=True),
        "unfused": Case(loss_peers.head_unfused, head_inputs, 16),
    },
    "dense": {
        "megakd": Case(loss_peers.dense_megakd, logit_inputs, 2.3),
        "copy": Case(loss_peers.dense_copy, logit_inputs, 2.3),
        "naive": Case(loss_peers.dense_naive, logit_inputs, 16),
        "compiled": Case(loss_peers.dense_compiled, logit_inputs, 5, compiles=True),
        "modelopt": Case(loss_peers.dense_modelopt, logit_inputs, 16),
    },
    "tp": {
        "megakd": Case(loss_peers.dense_megakd_one_chunk, logit_inputs, 2.5),
        "megakd, small chunks": Case(loss_peers.dense_megakd, logit_inputs, 2.5),
        "modelopt": Case(loss_peers.dense_modelopt, logit_inputs, 18),
    },
    "sparse": {
        "megakd": Case(loss_peers.sparse_megakd, sparse_inputs, 1.5),
        "megatron": Case(loss_peers.sparse_megatron, sparse_inputs, 9),
    },
}

MACHINE: dict[str, Case] = {
    "copy bandwidth": Case(loss_peers.machine_copy, no_inputs, 0),
    "matmul rate": Case(loss_peers.machine_matmul, no_inputs, 0),
}


class Worker:
    """One case, in one process a rank."""

    def __init__(self, name: str, case: Case, problem: Problem, threads: int) -> None:
        self._case, self._problem, self._ours = case, problem, name.startswith("megakd")
        context = multiprocessing.get_context("forkserver")  # a fresh process, but torch is imported once
        context.set_forkserver_preload(["torch", "megakd.losses.head", "megakd.losses.logits"])
        self._folder = tempfile.TemporaryDirectory(prefix="bench-loss-")
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(problem.world):
            connection, theirs = context.Pipe()
            arguments = (theirs, case, replace(problem, rank=rank), threads, self._folder.name)
            process = context.Process(target=serve, args=arguments)
            process.start()
            theirs.close()
            self._ranks.append((process, connection))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []
        self._folder.cleanup()

    def first_turn(self) -> tuple[float | None, int | None]:
        """Take the turn that compiles and warms up.

        Returns the error of the gradient, in units of what precision explains, and the number of collectives of a
        forward pass; None each if there is none.

        Raises SkippedError for a peer that cannot run, FailedError for a case of ours.
        """
        held = int(self._case.held * self._problem.tokens * self._problem.vocab * 2)
        free = _available_bytes()
        if self._problem.device == "cpu" and held > free:
            raise SkippedError(f"takes about {held / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        answers = self._ask("first")
        errors = [answer[0] for answer in answers if answer[0] is not None]
        return (float(torch.tensor(errors).max()) if errors else None), answers[0][1]  # a NaN wins

    def turn(self) -> tuple[float, int]:
        """Take a turn; return the seconds of the slowest rank and the bytes of all ranks."""
        answers = self._ask("turn")
        return max(answer[0] for answer in answers), sum(answer[1] for answer in answers)

    def _ask(self, what: str) -> list[Any]:
        answers = []
        try:
            for _, connection in self._ranks:
                connection.send(what)
            for _, connection in self._ranks:
                if not connection.poll(ANSWER_SECONDS):
                    raise EOFError
                answers.append(connection.recv())
        except (EOFError, OSError) as error:
            if self._ours:
                raise FailedError("a process of ours has ended or does not answer") from error
            raise SkippedError("its process has ended or does not answer") from error
        for answer in answers:
            if isinstance(answer, SkippedError):
                raise answer
        return answers


def serve(connection: Connection, case: Case, problem: Problem, threads: int, folder: str) -> None:
    """One rank of one case: build it, then do as told until the pipe closes."""
    torch.set_num_threads(threads)
    actions: dict[str, Callable[[], Any]] = {}
    refusal = SkippedError()
    try:
        _open_group(problem, folder)
        run, make = case.build(problem), case.inputs(problem)
        actions = {
            "first": lambda: _first_turn(run, make, case.compiles, problem),
            "turn": lambda: _turn(run, make, problem),
        }
    except (ImportError, SkippedError) as error:
        refusal = SkippedError(str(error))
    while True:
        try:
            told = connection.recv()
        except EOFError:
            break
        try:
            connection.send(actions[told]() if actions else refusal)
        except torch.cuda.OutOfMemoryError as error:
            connection.send(SkippedError(str(error).splitlines()[0]))
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_group(problem: Problem, folder: str) -> None:
    """Join the processes that share the problem, if there are several."""
    if problem.world == 1:
        return
    backend = "gloo"
    if problem.device != "cpu":
        if torch.cuda.device_count() < problem.world:
            raise SkippedError(f"takes {problem.world} GPUs, here are {torch.cuda.device_count()}")
        backend = "nccl"
        torch.cuda.set_device(problem.rank)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=problem.rank, world_size=problem.world)


def _first_turn(
    run: loss_peers.Run, make: Callable[[], Any], compiles: bool, problem: Problem
) -> tuple[float | None, int | None]:
    inputs, error = make(), None
    collectives = _Collectives()
    with collectives if problem.world > 1 else nullcontext():  # nothing is compiled while it looks on
        loss = run(inputs)
    if loss is not None:
        loss.backward()
    if isinstance(inputs, LogitInputs) and inputs.gradient_Tv is not None:
        error = inputs.error(problem)
    if isinstance(inputs, HeadInputs) and loss is not None and not compiles:  # another shape would be compiled anew
        few = HeadInputs.make(replace(problem, tokens=min(_CHECKED_TOKENS, problem.tokens)))
        found = run(few)
        assert found is not None
        found.backward()
        error = few.error(problem)
    return error, collectives.count if problem.world > 1 else None


class _Collectives(TorchDispatchMode):
    """Counts collectives as they are started."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def _turn(run: loss_peers.Run, make: Callable[[], Any], problem: Problem) -> tuple[float, int]:
    """Seconds of one forward and backward, and the rise of the memory's peak in bytes."""
    inputs = make()
    if problem.world > 1:
        dist.barrier()
    held = _reset_peak(problem.device)
    start = time.perf_counter()
    loss = run(inputs)
    if loss is not None:
        loss.backward()
    if problem.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, _peak(problem.device) - held


def _reset_peak(device: str) -> int:
    """Reset the peak and return the bytes held now."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would hide as much of the rise
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("/proc/self/status", "VmRSS") << 10


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else _kilobytes("/proc/self/status", "VmHWM") << 10


def _available_bytes() -> int:
    return _kilobytes("/proc/meminfo", "MemAvailable") << 10


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
