"""Exports beside checkpoints while a run trains: a process of their own, one at a time, that the run does not wait for.

The first rank starts them from checkpoints that are whole. A run that is stopped leaves an export unfinished, and the
next one makes those that are missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from megakd.model.checkpoint.damage import MANIFEST, checkpoint_folders
from megakd.model.huggingface.exported import MANIFEST as EXPORTED
from megakd.train.config import CheckpointConfig

_PROCESS = "megakd.train.hf_export_process"


class HfExporter:
    """Exporter of the checkpoints of one run, every ``hf_export_interval`` steps and of the last one.

    options: of `plan_export`, as plain data. last_step: of the run. is_first: False on ranks that export nothing.
    say: prints a line.
    """

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        *,
        options: dict[str, Any],
        last_step: int,
        is_first: bool,
        say: Callable[[str], None],
    ) -> None:
        self._interval, self._options, self._last_step, self._say = (
            checkpoint.hf_export_interval, options, last_step, say,
        )  # fmt: skip
        self._folder = Path(checkpoint.hf_exports or ".")
        self._waiting: list[Path] = []
        self._running: tuple[Path, subprocess.Popen[bytes], IO[bytes]] | None = None
        self._is_first = is_first and self._interval is not None
        if self._is_first and checkpoint.save:
            for path in checkpoint_folders(Path(checkpoint.save)):
                if (path / MANIFEST).is_file() and not (self._folder / path.name / EXPORTED).is_file():
                    self.saved(path)

    def saved(self, path: Path) -> None:
        """Take note of a checkpoint that is whole; its export starts if it is due and none is running."""
        step = int(path.name.removeprefix("iter_"))
        assert self._interval is not None or not self._is_first
        if not self._is_first or (step % (self._interval or 1) and step != self._last_step):
            return
        self._waiting.append(path)
        self.poll()

    def poll(self) -> None:
        """Say how the running export ended, if it has, and start the next one; called at every step."""
        if self._running is not None and self._running[1].poll() is not None:
            self._end()
        if self._running is None and self._waiting:
            self._start(self._waiting.pop(0))

    def finish(self, *, stopped: bool) -> None:
        """Wait for all exports; of a run that was ``stopped``, end the running one, which the next run continues."""
        if stopped and self._running is not None:
            self._running[1].kill()
            self._running[1].wait()
            self._say(f"the export of {self._running[0]} is unfinished; the same command goes on with it")
            self._running = None
            return
        while not stopped and (self._running is not None or self._waiting):
            if self._running is not None:
                self._say(f"waiting for the export of {self._running[0]} ({len(self._waiting)} more)")
                self._running[1].wait()
            self.poll()

    def _start(self, path: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        out = self._folder / path.name
        log = open(out.with_name(out.name + ".log"), "w+b")
        job = json.dumps({"load": str(path), "save": str(out), "options": self._options})
        process = subprocess.Popen(
            [sys.executable, "-m", _PROCESS, job],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # signals of the terminal are for the run, which ends it in its own way
        )
        self._running = path, process, log

    def _end(self) -> None:
        assert self._running is not None
        path, process, log = self._running
        self._running = None
        log.seek(0)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        log.close()
        if process.returncode == 0:
            Path(log.name).unlink(missing_ok=True)
            self._say(f"exported {path} to {self._folder / path.name}")
            return
        reason = lines[-1] if lines else f"status {process.returncode}"
        self._say(
            f"Warning: the export of {path} failed: {reason} ({log.name} has the rest); training goes on. Later: "
            f"megakd convert --load {path} --save {self._folder / path.name}"
        )
