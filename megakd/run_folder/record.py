"""The folder of a training run, read back: every step and evaluation, the configuration, the checkpoints. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from megakd.errors import CorruptError, UsageError
from megakd.model.checkpoint.record import MANIFEST, TRACKER

METRICS, CONFIG = "metrics.jsonl", "config.yaml"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of training. Losses in nats a token. None: not recorded.

    tokens: those of the run up to this step. seconds: duration of this step. flops, teacher_flops: floating-point
    operations of this step, which older files do not have.
    """

    step: int
    tokens: int
    lm_loss: float | None
    kd_loss: float | None
    total_loss: float | None
    seconds: float | None
    flops: float | None
    teacher_flops: float | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. values: figures by name. held_out: record of its data; empty in older files.

    checkpoint: fingerprint of the evaluated checkpoint, if nothing was trained; None in the course of training.
    """

    step: int
    values: Mapping[str, float]
    held_out: Mapping[str, Any]
    checkpoint: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """Record of a run, without steps that were rolled back. config: its tree; empty without a file."""

    folder: Path
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    config: Mapping[str, Any]

    def setting(self, group: str, name: str, default: Any = None) -> Any:
        """A value of the configuration; ``default`` if the file, the group or the key is missing or null."""
        settings = self.config.get(group) or {}
        value = settings.get(name) if isinstance(settings, Mapping) else None
        return default if value is None else value


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that ``megakd train --save`` writes to."""
    return any((folder / name).is_file() for name in (METRICS, CONFIG, TRACKER))


def read_run(folder: Path, *, flag: str) -> RunRecord:
    """Read the record and the configuration of the run in ``folder``. flag: the flag that named it, for messages.

    A run that went on from a checkpoint records the steps after it again. The later line counts, and makes void what
    earlier lines recorded about that step and all after it. A last line that is cut short, as in a run that is in
    progress or was killed, is left out.

    Raises UsageError without a record, CorruptError for a line that is no step or evaluation.
    """
    path = folder / METRICS
    if not path.is_file():
        problem = "no such folder" if not folder.is_dir() else f"no {METRICS} there"
        raise UsageError(f"{flag}{folder}: {problem}; expected the --save folder of a run of 'megakd train'")
    steps: dict[int, Step] = {}
    evaluations: list[Evaluation] = []
    last, lines = 0, path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = orjson.loads(line)
            step = int(entry["step"])
            if "valid" in entry:
                valid = {str(key): float(value) for key, value in entry["valid"].items()}
                held_out = dict(entry.get("held_out") or {})
                evaluations.append(Evaluation(step, valid, held_out, entry.get("checkpoint")))
                continue
            new = _step(step, entry)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise CorruptError(f"{path}: line {number} is no record of a step or an evaluation: {error!r}") from None
        if step <= last:
            steps = {earlier: record for earlier, record in steps.items() if earlier < step}
            evaluations = [record for record in evaluations if record.step < step or record.checkpoint is not None]
        steps[step], last = new, step
    return RunRecord(folder, tuple(steps.values()), tuple(evaluations), read_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the resolved configuration of a run; empty without a file. Raises CorruptError for another kind of file."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path}: {' '.join(str(error).split())}; expected the configuration of a run") from None
    if not isinstance(tree, dict):
        raise CorruptError(f"{path}: holds {type(tree).__name__}; expected the configuration of a run")
    return tree


def checkpoints(folder: Path) -> list[int]:
    """Iterations of the complete checkpoints in a folder, ascending."""
    found = (path.parent.name.removeprefix("iter_") for path in folder.glob(f"iter_*/{MANIFEST}"))
    return sorted(int(name) for name in found if name.isdecimal())


def _step(step: int, entry: Mapping[str, Any]) -> Step:
    def number(name: str) -> float | None:
        return None if entry.get(name) is None else float(entry[name])

    return Step(
        step=step,
        tokens=int(entry["tokens"]),
        lm_loss=number("lm_loss"),
        kd_loss=number("kd_loss"),
        total_loss=number("loss"),
        seconds=number("seconds"),
        flops=number("flops"),
        teacher_flops=number("teacher_flops"),
    )
