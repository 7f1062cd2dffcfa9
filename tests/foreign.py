"""Checkpoints as Megatron-LM and plain megatron-core write them, of a run's weights; inside a world of the tests."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

from megakd.layout import ParallelConfig, padded_vocab_size
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.parallel import Groups, init_parallel


def write_foreign(run: str, folder: str, iteration: int = 7) -> None:
    """Of the newest checkpoint of ``run``: ``mlm`` with Megatron-LM's files, ``plain``, ``prefixed``, ``apart``.

    The last has a prefix too, and a name for each layer. All come from a GPTModel that is megatron-core's own.
    """
    groups = init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.transformer.enums import AttnBackend

    record = read_record(run)
    model, out = _plain_model(record, groups), Path(folder)
    metadata = {"dp_cp_group": groups.collection.dp_cp}

    def save(name: str, tree: dict[str, Any]) -> None:
        (out / name).mkdir(parents=True)
        dist_checkpointing.save(tree, str(out / name))

    args = Namespace(**args_of(record), attention_backend=AttnBackend.auto)
    random_state = [{"random_rng_state": random.getstate()}]
    tree = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": model.sharded_state_dict(metadata=metadata),
        "opt_param_scheduler": {"max_lr": 1e-3},
        "rng_state": ShardedObject("rng_state", random_state, (1, 1), (0, 0), replica_id=0),
        "num_floating_point_operations_so_far": 1e9,
    }
    save(f"mlm/iter_{iteration:07d}", tree)
    (out / "mlm" / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    save("plain", model.sharded_state_dict(metadata=metadata))
    save("prefixed", model.sharded_state_dict(prefix="model.", metadata=metadata))
    save("apart", model.sharded_state_dict(prefix="model.", metadata={**metadata, "non_homogeneous_layers": True}))


def args_of(record: CheckpointRecord) -> dict[str, Any]:
    """The part of Megatron-LM's arguments that tells the model."""
    import torch

    shape = record.shape
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "norm_epsilon")
    return {name: getattr(shape, name) for name in same} | {
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "num_query_groups": 1,  # Megatron-LM's default, without the flag before
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": shape.add_qkv_bias,
        "swiglu": True,
        "qk_layernorm": shape.qk_layernorm,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rotary_base),
        "rotary_percent": shape.rotary_percent,
        "untie_embeddings_and_output_weights": not shape.tied,
        "padded_vocab_size": padded_vocab_size(record.vocab_size, divisible_by=128, tensor_model_parallel_size=1),
        "make_vocab_size_divisible_by": 128,
        "seq_length": record.seq_length,
        "params_dtype": torch.float32,
        "num_experts": None,
        "spec": None,
    }


def plain_weights(run: str) -> dict[str, Any]:
    """The weights that a GPTModel of megatron-core's own reads of the newest checkpoint of ``run``, as lists."""
    groups = init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing

    record = read_record(run)
    model = _plain_model(record, groups, filled=False)
    tree = model.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})
    model.load_state_dict(dist_checkpointing.load(tree, str(record.path)), strict=False)
    return {name: weight.tolist() for name, weight in model.state_dict().items() if weight is not None}


def own_weights(run: str) -> dict[str, Any]:
    """The weights that megakd's model reads of it, as lists."""
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.gpt import build_model

    groups, record = init_parallel(ParallelConfig(), seed=1), read_record(run)
    chunks = build_model(record.shape, groups, vocab_size=record.vocab_size, seq_length=16)
    load_weights(record, chunks, groups)
    return {name: weight.tolist() for name, weight in chunks[0].state_dict().items() if weight is not None}


def _plain_model(record: CheckpointRecord, groups: Groups, *, filled: bool = True) -> Any:
    from megatron.core.models.gpt import GPTModel

    from megakd.model.checkpoint.load import load_weights
    from megakd.model.gpt import build_model

    chunks = build_model(record.shape, groups, vocab_size=record.vocab_size, seq_length=16)
    own = chunks[0]
    model = GPTModel(
        config=own.config,
        transformer_layer_spec=own.transformer_layer_spec,
        vocab_size=own.vocab_size,
        max_sequence_length=16,
        share_embeddings_and_output_weights=record.shape.tied,
        position_embedding_type="rope",
        rotary_base=int(record.shape.rotary_base),
        pg_collection=groups.collection,
    )
    if filled:
        load_weights(record, chunks, groups)
        model.load_state_dict(own.state_dict())
    return model
