"""Folders as training runs leave them, made from their figures: no model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

from megakd.artefacts.manifest import hash_file, write_manifest
from megakd.model.checkpoint.foreign import BACKENDS
from megakd.model.checkpoint.record import FORMAT, MANIFEST, TRACKER, VERSION, checkpoint_path
from megakd.model.config import ModelConfig

HELD_OUT = {"fingerprint": "f" * 32, "num_samples": 8, "num_tokens": 800, "num_bytes": 3200, "tokenizer": "t" * 32}


def write_run(
    folder: Path,
    evaluated: Mapping[int, float],
    *,
    steps: int = 4,
    seed: int = 1,
    held_out: Mapping[str, Any] | None = HELD_OUT,
    teacher_flops: float | None = None,
    train_iters: int | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    values: Mapping[str, float] | None = None,
) -> Path:
    """A run of 100 tokens and 600 FLOPs a step, half a second each. evaluated: LM loss by step.

    held_out: None for a record from before it was there. values: what else each evaluation tells.
    """
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        own = {"step": step, "samples": step, "tokens": 100 * step, "loss": 5.0, "lm_loss": 5.0, "seconds": 0.5}
        own |= {"flops": 600.0} | ({} if teacher_flops is None else {"teacher_flops": teacher_flops, "kd_loss": 1.0})
        lines.append(own)
        if step in evaluated:
            lines.append(evaluation(step, evaluated[step], held_out, values or {}))
    write_lines(folder, lines)
    tree: dict[str, dict[str, Any]] = {
        "training": {"train_iters": train_iters or steps, "seed": seed, "global_batch_size": 1},
        "student": {"num_layers": 2},
        "teacher": {"load": None, "logits_load_dir": []},
        "objective": {"kd_alpha": 0.9},
        "data": {"data_path": ["text"], "valid_data_path": ["held"], "seq_length": 100, "selection": []},
        "checkpoint": {"save": str(folder)},
    }
    for group, own in (config or {}).items():
        tree.setdefault(group, {}).update(own)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def evaluation(
    step: int, loss: float, held_out: Mapping[str, Any] | None, values: Mapping[str, float]
) -> dict[str, Any]:
    tokens = HELD_OUT["num_tokens"] if held_out is None else held_out["num_tokens"]
    own = {"step": step, "valid": {"lm_loss": loss, "num_tokens": tokens, **values}}
    return own if held_out is None else {**own, "held_out": dict(held_out)}


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def write_checkpoint(folder: Path, iteration: int, *, num_layers: int = 1) -> str:
    """The manifest of a checkpoint without its weights, announced; its fingerprint."""
    model = ModelConfig(num_layers=num_layers, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
    path = checkpoint_path(folder, iteration)
    path.mkdir(parents=True)
    (path / BACKENDS).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    manifest = write_manifest(
        path / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={
            "iteration": iteration,
            "shape": vars(model.resolve("student")),
            "vocab_size": 8,
            "seq_length": 16,
            "loader_state": {},
            "layout": {},
            "use_distributed_optimizer": False,
            "rng_states": True,
        },
        parents={},
        tokenizer=None,
        files=[hash_file(path / BACKENDS)],
    )
    (folder / TRACKER).write_text(f"{iteration}\n")
    return manifest.fingerprint
