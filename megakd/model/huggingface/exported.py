"""Folders that were exported, recognised by their manifest. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, find_finished
from megakd.errors import UsageError
from megakd.model.huggingface.export_plan import ExportPlan

FORMAT, VERSION = "megakd-hf-export", 1
MANIFEST = "export.json"


def parameters_of(plan: ExportPlan, max_shard_bytes: int) -> dict[str, Any]:
    """Return what decides an export's files beside the checkpoint, as its manifest records it."""
    return {
        "iteration": plan.record.iteration,
        "model_type": plan.family.model_type,
        "rows": plan.rows,
        "dtype": plan.dtype,
        "max_position_embeddings": plan.max_position_embeddings,
        "max_shard_bytes": max_shard_bytes,
        "tokenizer_files": sorted({**plan.tokenizer.copied, **plan.tokenizer.written}),
    }


def find_export(folder: Path, plan: ExportPlan, parameters: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the export at ``folder`` if it is the one that would be made; None if nothing is there.

    Raises:
        UsageError: something else is there. MismatchError: an export of another checkpoint, or one made otherwise.
    """
    finished = find_finished(
        folder / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters=parameters,
        parents={"checkpoint": plan.record.fingerprint},
        tokenizer=plan.tokenizer.record,
        flag="--save",
    )
    if finished is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--save {folder} is there already, and is no whole export: give another folder, or remove it")
    return finished
