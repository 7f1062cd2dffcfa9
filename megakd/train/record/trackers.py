"""Weights & Biases and MLflow, each in a process of its own, so that no server can end or stall a training.

The training process sends figures through a pipe and never waits; see ``writers.ProcessWriter``. No torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

from megakd.train.config import LoggingConfig

Kind = Literal["wandb", "mlflow"]
CLOSE_SECONDS = 30.0
"""Time for the last figures to arrive after the training has ended."""
STEP = "iteration"
_MLFLOW_PARAMS, _MLFLOW_METRICS, _MLFLOW_LENGTH = 100, 500, 500  # limits of a request and of a value in any version
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


@dataclass(frozen=True)
class Tracked:
    """Description of the run for a tracker.

    run_id: the name by which a continued run is found again. name: the name shown to people. resumed: True for a
    continued run. folder: of the run, None without ``--save``. settings: the whole configuration by dotted names.
    """

    kind: Kind
    logging: LoggingConfig
    run_id: str
    name: str | None
    resumed: bool
    folder: str | None
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """A run on a server."""

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of one step."""

    def close(self, complete: bool) -> None:
        """End the run. complete: True if the training did all of its steps."""


def serve(connection: Connection, tracked: Tracked) -> None:
    """Record the figures that come through ``connection`` until a bool ends them or the training process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a launcher signals all processes; the training says when it ends
        signal.signal(number, signal.SIG_IGN)
    tracker: Tracker | None = None
    try:
        tracker = TRACKERS[tracked.kind](tracked)
    except Exception as error:  # a foreign library: its errors cost its record, not the training
        _warn(tracked, "could not begin, nothing is recorded there", error)
    complete, failed = False, False
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            break
        if isinstance(message, bool):
            complete = message
            break
        if tracker is None:
            continue
        try:
            tracker.add(*message)
        except Exception as error:  # as above; the next figures are tried again
            if not failed:
                _warn(tracked, "did not take figures; later ones are tried again", error)
            failed = True
    late = threading.Timer(CLOSE_SECONDS, os._exit, (1,))
    late.daemon = True
    late.start()
    if tracker is not None:
        try:
            tracker.close(complete)
        except Exception as error:  # as above
            _warn(tracked, "did not take the end of the run", error)


class WandbTracker:
    """Run of Weights & Biases. Without a server it is recorded in files that ``wandb sync`` sends later."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb  # late, in this process alone

        logging = tracked.logging
        folder = Path(logging.wandb_save_dir or tracked.folder or ".")
        folder.mkdir(parents=True, exist_ok=True)
        begin: dict[str, Any] = {
            "project": logging.wandb_project,
            "entity": logging.wandb_entity,
            "name": logging.wandb_exp_name or tracked.name,
            "id": tracked.run_id,
            "dir": str(folder),
            "config": dict(tracked.settings),
            "allow_val_change": True,  # a run may go on with other settings
            "settings": wandb.Settings(console="off", init_timeout=15),
        }
        try:
            self._run = wandb.init(**begin, resume="allow" if tracked.resumed else None)
        except Exception as error:  # no server, no key: the files are kept
            _warn(tracked, f"is not reached, the run is recorded in {folder / 'wandb'} for 'wandb sync'", error)
            self._run = wandb.init(**begin, mode="offline")
        # wandb's own step would drop steps that come again after a resume
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of one step."""
        self._run.log({STEP: step, **figures})

    def close(self, complete: bool) -> None:
        """End the run; an unfinished run counts as failed until it goes on."""
        self._run.finish(exit_code=0 if complete else 1)


class MlflowTracker:
    """Run of MLflow, found again by a tag. Figures that a server did not take are sent with the next ones."""

    def __init__(self, tracked: Tracked) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow  # late, in this process alone

        self._mlflow = mlflow
        self._client = mlflow.MlflowClient(tracked.logging.mlflow_tracking_uri)
        self._pending: list[Any] = []
        self._run_id = self._find(tracked) or self._begin(tracked)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of one step."""
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._pending += [metric(name, value, now, step) for name, value in figures.items()]
        while self._pending:
            batch = self._pending[:_MLFLOW_METRICS]
            self._client.log_batch(self._run_id, metrics=batch)
            del self._pending[: len(batch)]

    def close(self, complete: bool) -> None:
        """Send the pending figures and end the run."""
        if self._pending:
            self.add(0, {})
        self._client.set_terminated(self._run_id, "FINISHED" if complete else "KILLED")

    def _experiment(self, tracked: Tracked) -> str:
        name = tracked.logging.mlflow_experiment or "Default"
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _find(self, tracked: Tracked) -> str | None:
        """Return the id of the run that a continued training goes on with; None if there is none."""
        self._experiment_id = self._experiment(tracked)
        if not tracked.resumed:
            return None
        found = self._client.search_runs([self._experiment_id], f"tags.`megakd.run` = '{tracked.run_id}'")
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        then = found[0].data.params
        for name, value in tracked.settings.items():  # MLflow does not change a parameter
            if name in then and then[name] != str(value)[:_MLFLOW_LENGTH]:
                self._client.set_tag(run_id, f"changed {name}", str(value))
        return run_id

    def _begin(self, tracked: Tracked) -> str:
        name = tracked.logging.mlflow_run_name or tracked.name
        run = self._client.create_run(self._experiment_id, tags={"megakd.run": tracked.run_id}, run_name=name)
        param = self._mlflow.entities.Param
        params = [param(name, str(value)[:_MLFLOW_LENGTH]) for name, value in tracked.settings.items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[start : start + _MLFLOW_PARAMS])
        return str(run.info.run_id)


TRACKERS: dict[Kind, Callable[[Tracked], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def _warn(tracked: Tracked, what: str, error: Exception) -> None:
    line = " ".join(str(error).split())[:500]
    print(f"Warning: {tracked.kind} {what}: {type(error).__name__}: {line}", file=sys.stderr, flush=True)
