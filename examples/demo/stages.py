"""Stages of an example: command lines that are printed, and skipped where their result is there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megakd.model.checkpoint.record import latest_iteration

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), "PYTHONWARNINGS": "ignore"}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

Word = str | Path | int


@dataclass(frozen=True)
class Stage:
    """A verb and its flags. done: whether the result is there."""

    name: str
    done: bool
    words: tuple[Word, ...]


def begin() -> None:
    """Go to the root of the repository, which all printed paths start from, with few threads for each rank."""
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    print("export " + " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()))


def stage(done: bool, name: str, make: Callable[[], None]) -> None:
    """Say what comes, and make it unless it is there."""
    print(f"\n== {name}" + (": done" if done else ""), flush=True)
    if not done:
        make()


def megakd(name: str, done: bool, verb: str, *flags: Word) -> None:
    """A stage that is one verb in one process."""
    stage(done, name, partial(run, [sys.executable, "-m", "megakd", verb, *flags]))


def megakd_on_two_ranks(name: str, done: bool, verb: str, *flags: Word) -> None:
    """A stage that is one verb under torchrun."""
    stage(done, name, partial(run, [*LAUNCHER, "-m", "megakd", verb, *flags]))


def megakd_two_at_once(stages: Sequence[Stage]) -> None:
    """Run each stage in one process, two at any time; what one prints is shown when it ends.

    Two processes of half the cores each get further than one command on two ranks, which wait for one another.
    """
    for stage in stages:
        print(f"\n== {stage.name}" + (": done" if stage.done else ""), flush=True)
    pool = ThreadPoolExecutor(2)
    try:
        for result in [pool.submit(_run_quietly, stage) for stage in stages if not stage.done]:
            print(result.result(), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_quietly(stage: Stage) -> str:
    """Run a stage; returns its name, its command line and what it printed. Exits like ``run`` if it fails."""
    words = [str(word) for word in (sys.executable, "-m", "megakd", *stage.words)]
    env = os.environ | {"LOCAL_WORLD_SIZE": "2"}  # half of the cores, as a rank of two has
    ended = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shown = f"\n== {stage.name}\n{shown_command(words)}\n{ended.stdout.rstrip()}"
    if ended.returncode:
        sys.exit(f"{shown}\n{failure(ended.returncode)}")
    return shown


def trained(save: Path, steps: int) -> bool:
    """Whether a run's last checkpoint is there."""
    return save.is_dir() and (latest_iteration(save) or 0) >= steps


def run(command: Sequence[Word]) -> None:
    """Print a command so that a reader can run it alone, then run it; end with its status if it fails."""
    words = [str(word) for word in command]
    print(shown_command(words), flush=True)
    status = subprocess.run(words).returncode
    if status:
        sys.exit(failure(status))


def shown_command(words: Sequence[str]) -> str:
    """A command line as a reader can run it from the root of the repository."""
    executable = os.path.relpath(words[0]) if words[0].startswith(str(ROOT)) else words[0]
    return "$ " + shlex.join([executable, *words[1:]])


def failure(status: int) -> str:
    """Message of an example that ends because one of its commands did."""
    return f"error: that command ended with status {status}; what is finished is kept: start again to continue"
