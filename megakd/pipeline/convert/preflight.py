"""Checks of a conversion before anything is written: source and target. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megakd.errors import UsageError
from megakd.model.checkpoint.damage import checkpoint_folders
from megakd.model.checkpoint.foreign import read_shape
from megakd.model.checkpoint.record import CheckpointRecord, checkpoint_path, latest_iteration, read_record
from megakd.model.config import ModelShape
from megakd.model.huggingface.export_plan import ExportPlan, plan_export
from megakd.model.huggingface.exported import find_export, parameters_of
from megakd.model.huggingface.folder import is_hf_folder
from megakd.pipeline.convert.config import ConvertConfig


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion that can be done: the model, its shape as it is written, and whether it is there already."""

    record: CheckpointRecord
    shape: ModelShape
    is_done: bool


def check_convert(config: ConvertConfig) -> ConvertPlan | ExportPlan:
    """Refuse a source that cannot be read and a target that holds something else; return what is to be done.

    Raises:
        UsageError, MismatchError, CorruptError: name folder and reason.
    """
    load, save = Path(config.load), Path(config.save)
    if not load.is_dir():
        raise UsageError(f"--load {load}: no such folder")
    is_folder = is_hf_folder(load)
    if config.saver == ("huggingface" if is_folder else "checkpoint"):
        there = "a Hugging Face folder" if is_folder else "a checkpoint, or none"
        raise UsageError(f"--load {load} is {there} already, and --saver {config.saver} asks for one: leave it out")
    if is_folder and config.of_exports():
        raise UsageError(f"--load {load} is a Hugging Face folder: {', '.join(config.of_exports())} is for exports")
    if not is_folder and config.bf16 is not None:
        raise UsageError("--bf16 is for checkpoints that are written; --dtype bfloat16 is for Hugging Face folders")
    return _check_import(config, load, save) if is_folder else _check_export(config, load, save)


def _check_export(config: ConvertConfig, load: Path, save: Path) -> ExportPlan:
    shape = None if config.model_config is None else read_shape(config.model_config, "--model-config")
    plan = plan_export(
        read_record(load, config.ckpt_step, role="--load", flag="--ckpt-step", shape=shape),
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        tokenizer_files=not config.no_tokenizer_files,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        dtype=config.dtype,
    )
    find_export(save, plan, parameters_of(plan, config.max_shard_bytes))  # refuses what is there and is another
    return plan


def _check_import(config: ConvertConfig, load: Path, save: Path) -> ConvertPlan:
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
