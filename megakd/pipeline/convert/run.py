"""The conversion of a Hugging Face folder to a checkpoint, by one process and in bounded memory."""

from __future__ import annotations

from pathlib import Path

import torch

from megakd.config.tree import to_dict
from megakd.errors import ExitStatus
from megakd.model.checkpoint.stream_writer import write_checkpoint
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
            "foreign": True,
            "shape": to_dict(plan.shape),
            "vocab_size": record.vocab_size,
            "seq_length": record.seq_length,
            "loader_state": {},
            "layout": {},
            "use_distributed_optimizer": False,
            "rng_states": False,
            "huggingface": record.huggingface,
        },
        parents={"huggingface": record.fingerprint},
        tokenizer=record.tokenizer,
        what=f"convert {record.path.name}",
    )
    tell(f"wrote {path}: {plan.shape.num_layers} layers, vocabulary {record.vocab_size}")
    return ExitStatus.COMPLETE
