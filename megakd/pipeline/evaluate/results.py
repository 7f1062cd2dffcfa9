"""Results of an evaluation: a JSON file beside the checkpoint, a table for people, entries of TensorBoard."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
import xxhash

from megakd import __version__
from megakd.artefacts.manifest import atomic_write
from megakd.config.tree import to_dict
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.preflight import EvaluatePlan, FrozenPlan
from megakd.pipeline.frozen.config import precision
from megakd.work.text_table import columns

FORMAT, VERSION = "megakd-evaluation", 1
# flags that say where and how results are shown, and not what they are
_SHOWN = {"output", "tensorboard_dir", "log_interval", "log_samples", "distributed_timeout_minutes"}


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that an evaluation found. held_out, tasks: plain data of their parts, None where nothing was asked
    for. requests: figures of each file by the task's name. samples: answers to single documents, by a file's name."""

    held_out: dict[str, Any] | None
    tasks: dict[str, Any] | None
    requests: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    seconds: float


def write_results(config: EvaluateConfig, plan: EvaluatePlan, results: Results) -> Path:
    """Write the results and return their path: the checkpoint's name and a hash of what was asked for.

    The same evaluation writes over its own earlier results, and different ones stand side by side.
    """
    settings = {key: value for key, value in to_dict(config).items() if key not in _SHOWN}
    identity = {**settings, "model": plan.model.record.fingerprint}
    digest = xxhash.xxh3_64_hexdigest(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS))[:8]
    record = plan.model.record
    name = f"{record.path.name}-{digest}"
    body = {
        "format": FORMAT,
        "version": VERSION,
        "megakd": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(results.seconds, 3),
        "model": _describe(plan.model),
        "teacher": None if plan.teacher is None else _describe(plan.teacher),
        "tokenizer": plan.tokenizer_record,
        "seq_length": plan.seq_length,
        "held_out": results.held_out,
        "lm_eval": results.tasks,
        "requests": results.requests,
        "settings": settings,
    }
    plan.output.mkdir(parents=True, exist_ok=True)
    if config.log_samples:
        for task, entries in results.samples.items():
            lines = [json.dumps(entry, default=str, sort_keys=True) for entry in entries]
            file = plan.output / f"{name}-{task.replace('/', '-')}.jsonl"
            atomic_write(file, ("\n".join(lines) + "\n").encode())
    path = plan.output / f"{name}.json"
    atomic_write(path, json.dumps(body, indent=2, sort_keys=True).encode() + b"\n")
    return path


def table(plan: EvaluatePlan, results: Results) -> list[str]:
    """Return the lines of a table: part, figure, value, standard error, and what it is a mean over."""
    rows = [("part", "figure", "value", "stderr", "over")]
    if results.held_out is not None:
        parts = {"held-out": results.held_out, **results.held_out.get("datasets", {})}
        for part, found in parts.items():
            flat = {**{key: value for key, value in found.items() if key != "teacher"}, **found.get("teacher", {})}
            over = f"{found['num_tokens']} tokens"
            rows += [(part, key, f"{value:.4f}", "", over) for key, value in flat.items() if isinstance(value, float)]
    for name, figures in (results.tasks or {}).get("tasks", {}).items():
        shown = f"{name} ({figures['num_fewshot']}-shot)"
        rows += _metric_rows(shown, figures["metrics"], f"{figures['num_documents']} documents")
    mean = (results.tasks or {}).get("mean")
    if mean is not None:
        error = f"{mean['stderr']:.4f}" if "stderr" in mean else ""
        rows.append(
            ("mean of tasks", "acc_norm or acc", f"{mean['value']:.4f}", error, f"{mean['num_tasks']:.0f} tasks")
        )
    for name, figures in results.requests.items():
        rows += _metric_rows(name, figures["metrics"], f"{figures['metrics']['num_documents']} documents")
    return [line.rstrip() for line in _left(rows)]


def add_to_tensorboard(folder: Path, step: int, results: Results) -> None:
    """Add the figures to TensorBoard under ``evaluate/``, at the checkpoint's step."""
    from torch.utils.tensorboard import SummaryWriter  # late: it takes a second, and only the first rank needs it

    board: Any = SummaryWriter(str(folder))
    for name, value in scalars(results).items():
        board.add_scalar(f"evaluate/{name}", value, step)
    board.close()


def scalars(results: Results) -> dict[str, float]:
    """Return the figures by names for plots: ``held_out/lm_loss``, ``arc_easy/acc_norm``, ``mean_of_tasks``."""
    found: dict[str, float] = {}
    if results.held_out is not None:
        flat = {**results.held_out, **results.held_out.get("teacher", {})}
        found |= {f"held_out/{key}": value for key, value in flat.items() if isinstance(value, float)}
    for name, figures in (results.tasks or {}).get("tasks", {}).items():
        found |= {f"{name}/{key}": value for key, value in figures["metrics"].items() if not key.endswith("_stderr")}
    if (mean := (results.tasks or {}).get("mean")) is not None:
        found["mean_of_tasks"] = mean["value"]
    for name, figures in results.requests.items():
        kept = {key: value for key, value in figures["metrics"].items() if isinstance(value, float)}
        found |= {f"{name}/{key}": value for key, value in kept.items() if not key.endswith("_stderr")}
    return found


def _metric_rows(part: str, metrics: Mapping[str, float], over: str) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for key, value in metrics.items():
        if "_stderr" in key or not isinstance(value, float):
            continue
        error = metrics.get(f"{key}_stderr")
        rows.append((part, key, f"{value:.4f}", "" if error is None else f"{error:.4f}", over))
    return rows


def _left(rows: list[tuple[str, str, str, str, str]]) -> list[str]:
    """Return aligned lines: names to the left, numbers to the right."""
    width = max(len(row[1]) for row in rows)
    return columns([(row[0], row[1].ljust(width), *row[2:]) for row in rows])


def _describe(model: FrozenPlan) -> dict[str, Any]:
    record = model.record
    return {
        "path": str(record.path),
        "iteration": record.iteration,
        "fingerprint": record.fingerprint,
        "vocab_size": record.vocab_size,
        "precision": precision(model.shape),
    }
