"""Points of training curves, compute against held-out loss: from the records of runs, or from a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megakd.errors import UsageError
from megakd.model.checkpoint.record import read_record
from megakd.pipeline.planning.costs import shape_parameters
from megakd.pipeline.planning.csv_tables import open_table, positive
from megakd.run_folder.record import METRICS, read_run

Points = Literal["all", "last"]
_NUMBERS = {"loss", "flops", "tokens", "parameters"}


@dataclass(frozen=True)
class Curve:
    """Points of one curve. parameters: N of the model; None if the points have several sizes, or an unknown one."""

    name: str
    parameters: float | None
    flops_n: NDArray[np.float64]
    loss_n: NDArray[np.float64]


@dataclass(frozen=True)
class _Point:
    curve: str
    parameters: float | None
    flops: float
    loss: float


def read_curves(sources: Sequence[str], *, points: Points, from_tokens: float) -> list[Curve]:
    """Read the curves of ``[NAME=]PATH[,PATH...]``: each PATH the folder of a run (its metrics.jsonl) or a CSV file.

    The paths of one entry make one curve. A CSV file has the columns ``loss`` and ``flops`` (or ``tokens`` and
    ``parameters``: C = 6 x parameters x tokens), and may have ``curve``, a name for each row. points: every evaluation
    of a run, or the last alone. from_tokens: earlier evaluations of a run are left out.

    Raises:
        UsageError: no such file, no evaluations, a missing column, or a field that is no number.
        CorruptError: a damaged record.
    """
    curves: dict[str, list[_Point]] = {}
    for source in sources:
        name, _, paths = source.rpartition("=")
        for path in map(Path, paths.split(",")):
            if path.is_dir():
                new = _read_run(path, name or path.name, points, from_tokens)
            elif path.is_file() and path.name != METRICS:
                new = _read_csv(path, name)
            elif path.is_file():
                raise UsageError(f"--fit {path}: give the folder of the run; its checkpoint tells the model's size")
            else:
                raise UsageError(f"--fit {path}: no such file or folder; expected the folder of a run, or a CSV file")
            for point in new:
                curves.setdefault(point.curve, []).append(point)
    return [_join(name, together) for name, together in curves.items()]


def _join(name: str, points: list[_Point]) -> Curve:
    sizes = {point.parameters for point in points}
    return Curve(
        name,
        sizes.pop() if len(sizes) == 1 else None,
        np.array([point.flops for point in points]),
        np.array([point.loss for point in points]),
    )


def _read_run(folder: Path, name: str, points: Points, from_tokens: float) -> list[_Point]:
    run = read_run(folder, flag="--fit ")
    record = read_record(folder, role="--fit")
    parameters = shape_parameters(record.shape, record.vocab_size)
    tokens_of = {step.step: step.tokens for step in run.steps}
    losses = {each.step: each.values["lm_loss"] for each in run.evaluations if "lm_loss" in each.values}
    chosen = sorted(step for step in losses if tokens_of.get(step, 0) >= max(from_tokens, 1))
    if not chosen:
        raise UsageError(
            f"--fit {folder}: {len(losses)} evaluations, none of them after {from_tokens:g} tokens or more of "
            "training; train with --valid-data-path and --eval-interval, or lower --fit-from-tokens"
        )
    return [
        _Point(name, parameters, 6 * parameters * tokens_of[step], losses[step])
        for step in (chosen[-1:] if points == "last" else chosen)
    ]


def _read_csv(path: Path, name: str) -> list[_Point]:
    table = open_table("--fit", path)
    columns = set(table.fieldnames or ())
    if not ("loss" in columns and ("flops" in columns or {"tokens", "parameters"} <= columns)):
        raise UsageError(
            f"--fit {path}: columns {', '.join(sorted(columns)) or 'none'}; expected loss and flops, or loss, tokens "
            "and parameters (and curve, where there are several)"
        )
    points = []
    for row in table:
        values = {key: positive("--fit", path, table, key, row.get(key)) for key in columns & _NUMBERS}
        flops = values["flops"] if "flops" in values else 6 * values["parameters"] * values["tokens"]
        label = " ".join(part for part in (name, row.get("curve") or "") if part) or path.stem
        points.append(_Point(label, values.get("parameters"), flops, values["loss"]))
    return points
