"""Description of a training run, line by line: its progress, settings, last figures and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megakd.model.checkpoint.record import latest_iteration
from megakd.run_folder.figures import tokens_per_second
from megakd.run_folder.record import METRICS, RunRecord, checkpoints, read_config, read_run

Rows = Iterator[tuple[str, object]]
_LOCK = ".lock"
_SHAPE = (
    "preset", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_experts",
    "bf16", "fp8_format", "fp4_format",
)  # fmt: skip
_OBJECTIVE = ("kd_alpha", "kd_alpha_schedule", "kd_divergence", "kd_temperature", "kd_tail", "lm_weight")
_BATCHES = ("global_batch_size", "micro_batch_size", "seed")
_OPTIM = ("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "clip_grad")


def describe_run(folder: Path) -> list[str]:
    """Describe the run that saves to ``folder``. Raises CorruptError for a damaged record."""
    if (folder / METRICS).is_file():
        run = read_run(folder, flag="")
    else:
        run = RunRecord(folder, (), (), read_config(folder))
    rows = [("artefact", "training run"), *_progress(run), *_setting(run), *_figures(run), *_checkpoints(folder)]
    return [f"{name:<18} {value}" for name, value in rows]


def _progress(run: RunRecord) -> Rows:
    asked, done = run.setting("training", "train_iters"), run.steps[-1].step if run.steps else 0
    if is_locked(run.folder / _LOCK):
        state = "a process of this machine is training it"
    elif asked is not None and done >= asked:
        state = "complete"
    elif run.steps:
        state = "not complete; no process of this machine is training it"
    elif run.evaluations:
        state = "evaluations alone, of a checkpoint that lies elsewhere"
    elif checkpoints(run.folder):
        state = "checkpoints without the record of their training"
    else:
        state = "nothing was trained here"
    yield "state", state
    yield "steps", f"{done}" if asked is None else f"{done} of {asked}"
    if run.steps:
        last = run.steps[-1]
        yield "tokens", f"{last.tokens:,}"
        rate = tokens_per_second(run.steps)
        seconds = sum(step.seconds or 0.0 for step in run.steps)
        speed = "" if rate is None else f", median {rate:,.0f} tokens/s"
        yield "time of the steps", f"{seconds:,.0f} s{speed}"
        written = time.localtime((run.folder / METRICS).stat().st_mtime)
        yield "last record", time.strftime("%Y-%m-%d %H:%M:%S", written)


def _setting(run: RunRecord) -> Rows:
    if not run.config:
        yield "configuration", "not recorded"
        return
    teacher = _given(run, "teacher")
    yield "student", _flat({name: value for name, value in _given(run, "student").items() if name in _SHAPE})
    stores = [folder for folder in run.setting("teacher", "logits_load_dir", []) if folder != "none"]
    teachers = [name for name in (teacher.get("load"), *(f"logits store {folder}" for folder in stores)) if name]
    yield "teacher", ", ".join(map(str, teachers)) or "none"
    if teachers:
        yield "objective", _flat({name: run.setting("objective", name) for name in _OBJECTIVE})
    yield "data", _prefixes(run, "data_path")
    selection = run.setting("data", "selection", [])
    if selection:
        yield "selection", " ".join(map(str, selection))
    yield "held-out data", _prefixes(run, "valid_data_path") or "none"
    sizes = {"seq_length": run.setting("data", "seq_length"), "packing": run.setting("data", "packing")}
    yield "batches", _flat({name: run.setting("training", name) for name in _BATCHES} | sizes)
    yield "optimizer", _flat({name: run.setting("optim", name) for name in _OPTIM})


def _figures(run: RunRecord) -> Rows:
    if run.steps:
        last = run.steps[-1]
        losses = {"lm loss": last.lm_loss, "kd loss": last.kd_loss, "total loss": last.total_loss}
        yield f"step {last.step}", _flat({name: f"{value:.4f}" for name, value in losses.items() if value is not None})
    yield "evaluations", len(run.evaluations)
    for evaluation in run.evaluations[-3:]:
        values = {name.replace("_", " "): f"{value:.6g}" for name, value in evaluation.values.items()}
        yield f"  at step {evaluation.step}", _flat(values)


def _checkpoints(folder: Path) -> Rows:
    iterations, latest = checkpoints(folder), latest_iteration(folder)
    yield "checkpoints", " ".join(map(str, iterations)) or "none"
    if latest is not None:
        yield "continues from", f"iteration {latest}" + ("" if latest in iterations else ", which is not there")


def _given(run: RunRecord, group: str) -> dict[str, Any]:
    """Settings of a group, without those that are empty or off."""
    tree = run.config.get(group) or {}
    return {name: value for name, value in tree.items() if value not in (None, [], False)}


def _prefixes(run: RunRecord, name: str) -> str:
    return " ".join(map(str, run.setting("data", name, [])))


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def is_locked(path: Path) -> bool:
    """Return whether a process of this machine holds the file's lock, without taking it; False except on Linux."""
    table = Path("/proc/locks")
    if not path.is_file() or not table.is_file():
        return False
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(len(words := line.split()) > 5 and words[5] == device for line in table.read_text().splitlines())
