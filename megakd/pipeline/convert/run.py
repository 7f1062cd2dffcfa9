"""Conversions between Hugging Face folders and checkpoints, by one process and in bounded memory."""

from __future__ import annotations

from pathlib import Path

import torch

from megakd.errors import ExitStatus
from megakd.model.checkpoint.foreign import weights_alone
from megakd.model.checkpoint.stream_writer import write_checkpoint
from megakd.model.huggingface.export import export
from megakd.model.huggingface.export_plan import ExportPlan
from megakd.model.huggingface.folder import HfFolder, open_folder
from megakd.model.huggingface.to_checkpoint import pieces_of
from megakd.pipeline.convert.config import ConvertConfig
from megakd.pipeline.convert.preflight import ConvertPlan
from megakd.work.console import tell


def convert(config: ConvertConfig, plan: ConvertPlan) -> ExitStatus:
    """Write the checkpoint that ``plan`` describes; nothing if it is there."""
    save, record = Path(config.save), plan.record
    if plan.is_done:
        tell(f"{save} holds this model already")
        return ExitStatus.COMPLETE
    opened = open_folder(record.path, record.role)
    folder = HfFolder(opened.path, opened.model, plan.shape, opened.stored, opened.expected)
    dtype = torch.bfloat16 if plan.shape.bf16 else torch.float32
    path = write_checkpoint(
        save,
        list(pieces_of(folder, vocab_size=record.vocab_size, dtype=dtype)),
        iteration=0,
        dtype=dtype,
        parameters={
            **weights_alone(plan.shape, vocab_size=record.vocab_size, seq_length=record.seq_length),
            "huggingface": record.huggingface,
        },
        parents={"huggingface": record.fingerprint},
        tokenizer=record.tokenizer,
        what=f"convert {record.path.name}",
    )
    tell(f"wrote {path}: {plan.shape.num_layers} layers, vocabulary {record.vocab_size}")
    return ExitStatus.COMPLETE


def export_folder(config: ConvertConfig, plan: ExportPlan) -> ExitStatus:
    """Write the Hugging Face folder that ``plan`` describes, and say what it is; nothing if it is there."""
    save = Path(config.save)
    if plan.tokenizer.note:
        tell(f"no tokenizer files: {plan.tokenizer.note}")
    if plan.doubt is not None:
        tell(f"warning: {plan.doubt}")
    manifest = export(plan, save, max_shard_bytes=config.max_shard_bytes)
    size = sum(file.size_bytes for file in manifest.files)
    tell(
        f"{save}: {plan.family.architecture} of {plan.record.path}, {plan.rows} rows of vocabulary, "
        f"{len(manifest.files)} files, {size / 1e9:.3f} GB; equal to the checkpoint, tensor by tensor"
    )
    return ExitStatus.COMPLETE
