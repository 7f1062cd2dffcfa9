"""Runs over ranges that are killed at points of the work, and what is there in the end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forked import ForkedVerb
from no_gpu import HIDDEN

Process = ForkedVerb | subprocess.Popen[str]


@dataclass(frozen=True)
class FrozenVerb:
    """A verb that commits ranges. verb: its name. flags: all but ``--output``. run: the whole of it, where
    nothing must happen to it; its status. whole: the files it leaves. parts: the folder of ranges, in the output.
    manifest: what makes the whole whole. num_ranges: how many there are."""

    verb: str
    flags: list[str]
    run: Callable[[Path], int]
    whole: dict[str, bytes]
    parts: str
    manifest: str
    num_ranges: int

    def start(self, output: Path, *flags: str, ranks: int = 0) -> Process:
        """The command in a process of its own, or on so many ranks under torchrun."""
        words = [self.verb, *self.flags, "--output", str(output), *flags]
        if not ranks:
            return ForkedVerb(words)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        env = os.environ | HIDDEN | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, "-m", "megakd", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def num_parts(self, folder: Path) -> int:
        """Ranges that are committed."""
        return len(list((folder / self.parts).glob("[0-9]*.json")))

    def wait_for_parts(self, process: Process, folder: Path, count: int) -> None:
        deadline = time.monotonic() + 240  # other work may keep the machine busy
        while self.num_parts(folder) < count and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)

    def kill_and_rerun(self, folder: Path, kills: int) -> None:
        """So many times kill -9, each somewhat further on; then once to the end: the same bytes."""
        rng = random.Random(kills)
        step = max(1, (self.num_ranges - 2) // kills)
        effective = 0
        for kill in range(kills):
            process = self.start(folder)
            self.wait_for_parts(process, folder, min(kill * step + 1, self.num_ranges))
            time.sleep(rng.uniform(0, 0.06))
            effective += process.poll() is None
            process.kill()
            process.communicate(timeout=200)
            # Whatever has its final name is whole.
            if (folder / self.manifest).exists():
                there = {name: data for name, data in files(folder).items() if name in self.whole}
                assert there == self.whole
        assert self.run(folder) == 0
        assert effective >= kills // 2, "most kills came too late: the test shows little"
        assert files(folder) == self.whole


def files(folder: Path) -> dict[str, bytes]:
    """By their paths in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
