"""Checkpoints of Hugging Face folders in any layout, inside a world of the tests, and folders compared by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megakd.layout import ParallelConfig


def write_checkpoint(folder: str, save: str, sizes: dict[str, Any]) -> None:
    """Write a checkpoint, without an optimizer, of the model in a Hugging Face folder."""
    import torch.distributed as dist

    from megakd.model.checkpoint.load import load_weights
    from megakd.model.checkpoint.record import checkpoint_path, read_record
    from megakd.model.checkpoint.save import _commit, record_parameters
    from megakd.model.checkpoint.state import model_state
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    groups, record = init_parallel(ParallelConfig(**sizes), seed=1), read_record(folder)
    from megatron.core import dist_checkpointing

    chunks = build_model(record.shape, groups, vocab_size=record.vocab_size, seq_length=16)
    load_weights(record, chunks, groups)
    final = checkpoint_path(save, 1)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(model_state(chunks, groups), str(partial))
    parameters = record_parameters(
        record.shape,
        groups,
        iteration=1,
        vocab_size=record.vocab_size,
        seq_length=16,
        loader_state={},
        objective_state={},
    )
    _commit(
        partial,
        final,
        parameters=parameters | {"huggingface": record.huggingface},
        parents={"weights": record.fingerprint},
        tokenizer=record.tokenizer,
    )


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, sizes and bytes of every tensor in a folder, read by the safetensors package."""
    import torch
    from safetensors import safe_open

    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape), content)
    return tensors
