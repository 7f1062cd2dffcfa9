"""How an example runs: stages that are skipped where their result is there, each a command line that is printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megakd.model.checkpoint.record import latest_iteration

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)), "PYTHONWARNINGS": "ignore"}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

Word = str | Path | int


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


def trained(save: Path, steps: int) -> bool:
    """Whether a run's last checkpoint is there."""
    return save.is_dir() and (latest_iteration(save) or 0) >= steps


def run(command: Sequence[Word]) -> None:
    """Print a command so that a reader can run it alone, then run it; end with its status if it fails."""
    words = [str(word) for word in command]
    executable = os.path.relpath(words[0]) if words[0].startswith(str(ROOT)) else words[0]
    print("$ " + shlex.join([executable, *words[1:]]), flush=True)
    status = subprocess.run(words).returncode
    if status:
        sys.exit(f"error: that command ended with status {status}; what is finished is kept: start again to continue")
