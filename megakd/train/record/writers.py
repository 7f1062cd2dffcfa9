"""Writers of a run's figures beside its own record: TensorBoard, Weights & Biases, MLflow, by one interface.

All get the same names and values. Only the rank that logs builds writers, and only those that are asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import orjson

from megakd.artefacts.manifest import atomic_write, printable
from megakd.errors import UsageError
from megakd.train.config import LoggingConfig
from megakd.train.record.trackers import CLOSE_SECONDS, Kind, Tracked, serve

RUN_ID = "tracked_run.json"
Say = Callable[[str], None]


class Writer(Protocol):
    """Destination of figures by name."""

    def add(self, figures: Mapping[str, float], *, step: int, samples: int | None = None) -> None:
        """Record figures of one step. samples: consumed so far, for plots against samples; None leaves those out."""

    def close(self, *, complete: bool) -> None:
        """Close the writer. complete: True if the run did all of its steps."""


@dataclass(frozen=True)
class Opening:
    """Everything that a writer is built from.

    folder: of the run, None without ``--save``. settings: the whole configuration as plain data. start_step: the step
    that the run goes on from; 0 for a new one. continues: the run has a record already, under its id on servers.
    """

    logging: LoggingConfig
    folder: Path | None
    settings: Mapping[str, Any]
    start_step: int
    continues: bool
    say: Say


def check_writers(config: LoggingConfig) -> None:
    """Raise UsageError if a package that is asked for is not installed."""
    for kind, (flag, asked) in _asked(config).items():
        spec = find_spec(kind) if asked else None
        # a folder of that name, such as wandb's own files, is found too, and has no origin
        if asked and (spec is None or spec.origin is None):
            raise UsageError(f"{flag}: the package {kind} is not installed; pip install 'megakd[{kind}]' or {kind}")


def build_writers(opening: Opening) -> list[Writer]:
    """Build the writers that the configuration asks for."""
    return [writer for build in WRITERS.values() if (writer := build(opening)) is not None]


class TensorBoardWriter:
    """Scalars by step, and "NAME vs samples" by samples."""

    def __init__(self, folder: str, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second, and only one rank needs it

        self._board: Any = SummaryWriter(folder, purge_step=start_step + 1)

    def add(self, figures: Mapping[str, float], *, step: int, samples: int | None = None) -> None:
        """Record figures of one step."""
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
            if samples is not None:
                self._board.add_scalar(f"{name} vs samples", value, samples)

    def close(self, *, complete: bool) -> None:
        """Write the pending figures."""
        self._board.close()


class ProcessWriter:
    """Sender of figures to a tracker in a process of its own. Only closing waits for it, for a bounded time."""

    def __init__(self, tracked: Tracked, say: Say) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch without its threads
        reader, self._connection = context.Pipe(duplex=False)
        self._process = context.Process(target=serve, args=(reader, tracked), daemon=True)
        self._process.start()
        reader.close()
        self._kind, self._say = tracked.kind, say
        self._figures: queue.SimpleQueue[tuple[int, dict[str, float]] | bool] = queue.SimpleQueue()
        threading.Thread(target=self._send, daemon=True).start()
        # before multiprocessing's own handler, which would wait for the process without telling it to end
        atexit.register(self._end, False)

    def add(self, figures: Mapping[str, float], *, step: int, samples: int | None = None) -> None:
        """Record figures of one step; returns at once."""
        values = dict(figures) if samples is None else {**figures, "samples": samples}
        self._figures.put((step, values))

    def close(self, *, complete: bool) -> None:
        """Wait for the figures to arrive, for at most `CLOSE_SECONDS`."""
        atexit.unregister(self._end)
        self._end(complete)

    def _end(self, complete: bool) -> None:
        self._figures.put(complete)
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._say(f"Warning: {self._kind} did not take everything within {CLOSE_SECONDS:.0f} s; the run ends")
            self._process.kill()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the process has ended and has said why
            while True:
                message = self._figures.get()
                self._connection.send(message)
                if isinstance(message, bool):
                    return


def _asked(config: LoggingConfig) -> dict[Kind, tuple[str, bool]]:
    """Return for each tracker the flag that asks for it, and True if that flag is given."""
    by_server = config.mlflow_tracking_uri is not None or config.mlflow_experiment is not None
    flag = "--mlflow-tracking-uri" if config.mlflow_tracking_uri is not None else "--mlflow-experiment"
    return {"wandb": ("--wandb-project", bool(config.wandb_project)), "mlflow": (flag, by_server)}


def _open_board(opening: Opening) -> Writer | None:
    board = opening.logging.tensorboard_dir
    if board is None and opening.folder is not None:
        board = str(opening.folder / "tensorboard")
    if board is None:
        return None
    if printable(board) != board:
        opening.say("no TensorBoard: its writer takes only names in UTF-8; --tensorboard-dir gives it another folder")
        return None
    return TensorBoardWriter(board, start_step=opening.start_step)


def _open_tracker(kind: Kind, opening: Opening) -> Writer | None:
    folder = opening.folder
    if not _asked(opening.logging)[kind][1]:
        return None
    run_id, resumed = _run_id(folder, opening.continues)
    tracked = Tracked(
        kind=kind,
        logging=opening.logging,
        run_id=run_id,
        name=None if folder is None else folder.resolve().name,
        resumed=resumed,
        folder=None if folder is None else str(folder),
        settings=dict(_flat(opening.settings)),
    )
    return ProcessWriter(tracked, opening.say)


WRITERS: dict[str, Callable[[Opening], Writer | None]] = {
    "tensorboard": _open_board,
    "wandb": partial(_open_tracker, "wandb"),
    "mlflow": partial(_open_tracker, "mlflow"),
}


def _run_id(folder: Path | None, continues: bool) -> tuple[str, bool]:
    """Return the run's id on servers, and True if it had one already: a continued run keeps its id."""
    path = None if folder is None else folder / RUN_ID
    if path is not None and continues and path.is_file():
        return str(orjson.loads(path.read_bytes())["id"]), True
    new = secrets.token_hex(8)
    if path is not None:
        atomic_write(path, orjson.dumps({"id": new}) + b"\n")
    return new, False


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a tree by dotted names."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return leaves
