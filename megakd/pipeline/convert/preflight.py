"""Checks of a conversion before anything is written: source and target. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megakd.errors import UsageError
from megakd.model.checkpoint.damage import checkpoint_folders
from megakd.model.checkpoint.record import CheckpointRecord, checkpoint_path, latest_iteration, read_record
from megakd.model.config import ModelShape
from megakd.model.huggingface.folder import is_hf_folder
from megakd.pipeline.convert.config import ConvertConfig


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion that can be done: the model, its shape as it is written, and whether it is there already."""

    record: CheckpointRecord
    shape: ModelShape
    is_done: bool


def check_convert(config: ConvertConfig) -> ConvertPlan:
    """Refuse a source that cannot be read and a target that holds something else.

    Raises:
        UsageError, MismatchError, CorruptError: name folder and reason.
    """
    load, save = Path(config.load), Path(config.save)
    if not load.is_dir():
        raise UsageError(f"--load {load}: no such folder")
    if not is_hf_folder(load):
        raise UsageError(f"--load {load}: expected a Hugging Face folder, with a config.json that names a model_type")
    if save.exists() and not save.is_dir():
        raise UsageError(f"--save {save}: a file; expected a folder, new or empty")
    record = read_record(load, role="--load")
    bf16 = record.shape.bf16 if config.bf16 is None else config.bf16
    shape = dataclasses.replace(
        record.shape, bf16=bf16, make_vocab_size_divisible_by=config.make_vocab_size_divisible_by
    )
    return ConvertPlan(record, shape, _is_done(save, record, shape))


def _is_done(save: Path, record: CheckpointRecord, shape: ModelShape) -> bool:
    """Return whether ``save`` holds this very conversion. Raises UsageError if it holds another checkpoint."""
    latest = latest_iteration(save)
    if latest is None and not checkpoint_folders(save):
        return False
    if latest == 0 and checkpoint_path(save, 0).is_dir():
        written = read_record(save, role="--save")
        if written.parents == {"huggingface": record.fingerprint} and written.shape == shape:
            return True
    raise UsageError(f"--save {save} holds checkpoints of another model; give a new folder")
