"""State of a training run as megatron saves and loads it: which tensors, under which names, cut into which shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups, random_states

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory


def model_state(chunks: list[HiddenGPTModel], groups: Groups, *, layers_apart: bool = False) -> dict[str, Any]:
    """Return the tree of megatron's sharded tensors for this rank's model chunks.

    layers_apart: each layer has tensors of its own, as in some checkpoints that megakd did not write; else a layer is
    a slice of one stacked tensor.
    """
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    metadata = sharding_metadata(groups) | ({"non_homogeneous_layers": True} if layers_apart else {})
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks)}


def set_model_state(chunks: list[HiddenGPTModel], loaded: dict[str, Any]) -> None:
    """Set the weights of the chunks from a tree that `model_state` made and megatron's loader filled."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    for name, chunk in zip(names, chunks):
        chunk.load_state_dict(loaded[name])


def sharding_metadata(groups: Groups) -> dict[str, Any]:
    """Return what megatron is told about cutting: an optimizer state that any layout can load."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.collection.dp_cp}


def random_state(groups: Groups) -> ShardedObject:
    """Return this rank's random generators as its shard of the whole run's.

    They matter only with dropout, and only in the layout that wrote them.
    """
    place = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject("rng_state", random_states(groups), *place, replica_id=0)


def layout_of(groups: Groups) -> dict[str, int]:
    """Return the sizes of the layout as a checkpoint's manifest records them."""
    parallel = groups.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "data": groups.data_size,
    }


def wanted_tensors(tree: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield every sharded tensor of a tree, those that a factory builds included."""
    for value in nested_values(tree):
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
            yield from (part for part in nested_values(value) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value
