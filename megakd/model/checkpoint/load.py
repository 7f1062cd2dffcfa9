"""Loading a checkpoint: held against its hashes, complete, and without running a pickle that someone else wrote.

Any layout can be loaded in any other (the layers are stored stacked, and shards are cut anew).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megakd.artefacts.manifest import faults_in_blocks
from megakd.errors import CorruptError, MismatchError
from megakd.model.checkpoint.damage import damaged
from megakd.model.checkpoint.foreign import KeyForm
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.checkpoint.state import (
    layout_of,
    model_state,
    random_state,
    set_model_state,
    sharding_metadata,
    wanted_tensors,
)
from megakd.model.checkpoint.tensor_names import read_tensor_names
from megakd.model.gpt import HiddenGPTModel
from megakd.model.huggingface.folder import open_folder
from megakd.model.huggingface.load import Slice, fill_slices_inplace
from megakd.parallel import Groups, set_random_states

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding


def load_training_state(record: CheckpointRecord, chunks: list[HiddenGPTModel], optimizer: Any, groups: Groups) -> None:
    """Load weights, optimizer state and (in the same layout) random states of ``record``, in place."""
    tree = model_state(chunks, groups)
    tree["optimizer"] = optimizer.sharded_state_dict(tree, is_loading=True, metadata=sharding_metadata(groups))
    same_layout = record.layout == layout_of(groups)
    if same_layout:
        tree["rng_state"] = random_state(groups)
    loaded = _read_tree(tree, record)
    set_model_state(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        set_random_states(loaded["rng_state"])


def load_weights(record: CheckpointRecord, chunks: list[HiddenGPTModel], groups: Groups) -> None:
    """Load the weights of ``record`` and nothing else, in place."""
    if record.form == "huggingface":
        _fill_from_folder_inplace(model_state(chunks, groups, layers_apart=True), record)
        return
    form = KeyForm.of(read_tensor_names(record.path))
    tree = model_state(chunks, groups, layers_apart=form.layers_apart)
    set_model_state(chunks, _read_weights(tree, record, form))


def load_teacher(
    record: CheckpointRecord,
    chunks: list[HiddenGPTModel],
    groups: Groups,
    student: Groups,
    *,
    rows: int,
) -> Tensor | None:
    """Load the teacher's weights in its own layout, in place, and return its head in the student's layout.

    Returns this rank's rows of the head, ``[rows, H]``, on the student's last stage; None on other stages. rows: number
    of rows that a student rank holds. Rows of the padded vocabulary that the checkpoint lacks are 0.
    """
    is_folder = record.form == "huggingface"
    form = KeyForm("", layers_apart=True) if is_folder else KeyForm.of(read_tensor_names(record.path))
    tree = model_state(chunks, groups, layers_apart=form.layers_apart)
    head = None
    if student.is_last_stage:
        config = chunks[0].config
        head = torch.zeros(rows, config.hidden_size, dtype=config.params_dtype, device=student.device)
        key = "embedding.word_embeddings.weight" if record.shape.tied else "output_layer.weight"
        tree["head"] = ShardedTensor.from_rank_offsets(
            key,
            head,
            (0, student.tensor_rank, student.parallel.tensor_model_parallel_size),
            replica_id=(0, 0, student.collection.dp_cp.rank()),
            allow_shape_mismatch=True,
        )
    if is_folder:
        _fill_from_folder_inplace(tree, record)
        return head
    loaded = _read_weights(tree, record, form, reads_twice=True)
    set_model_state(chunks, loaded)
    return loaded.get("head")


def _fill_from_folder_inplace(tree: dict[str, Any], record: CheckpointRecord) -> None:
    """Fill the tensors of a tree from a Hugging Face folder, in place; they are the model's own, or views of them.

    tree: with a name for each layer.
    """
    if record.checked:
        _check_content(record)
    folder = open_folder(record.path, record.role)
    fill_slices_inplace(map(_slice_of, wanted_tensors(tree)), folder)


def _slice_of(tensor: ShardedTensor) -> Slice:
    """Return the part of a tensor that this rank holds; an axis before those of the part counts experts."""
    experts = tensor.prepend_axis_num
    expert = tensor.global_offset[0] if experts else None
    return Slice(tensor.key, expert, tuple(tensor.global_offset[experts:]), tensor.data)


def _read_weights(
    tree: dict[str, Any], record: CheckpointRecord, form: KeyForm, *, reads_twice: bool = False
) -> dict[str, Any]:
    """Read tensors alone, under the checkpoint's own names; no pickled object of a foreign checkpoint is read."""
    if form.prefix:
        add_prefix_for_sharding(tree, form.prefix)
    if record.foreign:
        dict_list_map_inplace(_without_object, tree)
    return _read_tree(tree, record, common=_NoCommonState(), reads_twice=reads_twice)


def _read_tree(
    tree: dict[str, Any],
    record: CheckpointRecord,
    *,
    common: LoadCommonStrategy | None = None,
    reads_twice: bool = False,
) -> dict[str, Any]:
    """Check a checkpoint and read it into a tree of sharded tensors.

    common: reads the objects in ``common.pt``; None for megatron's own reader. reads_twice: some tensor of the tree is
    read by several ranks or names.

    Raises:
        CorruptError: the files are damaged. MismatchError: a weight is missing or has another shape.
    """
    if record.checked:
        _check_content(record)
    path = record.path
    names = read_tensor_names(path)  # refuses a file that megatron's own reader would run code from
    _check_complete(tree, path, record.role)
    dict_list_map_inplace(lambda value: _own_if_missing(value, names), tree)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            tree, str(path), common_strategy=common, validate_access_integrity=not reads_twice
        )
    except CheckpointException as error:  # torch: some rank could not read its part, and all ranks raise
        raise CorruptError(f"{record.role}: {path} cannot be read: {_reason(error)}") from error
    return loaded


def _reason(error: CheckpointException) -> str:
    """Return torch's reasons in one line; only the first rank has them."""
    reasons = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]
    return "; ".join(reason.splitlines()[0] for reason in reasons) or "see what rank 0 says"


def _without_object(value: Any) -> Any:
    """Leave a module's extra state, such as FP8 scaling, as it was built: it is a pickle in the checkpoint."""
    return LocalNonpersistentObject(None) if isinstance(value, ShardedObject) else value


def _own_if_missing(value: Any, names: set[str]) -> Any:
    """Leave a module's extra state as it was built, if the checkpoint has none: other layers may have written it.

    Transformer Engine's norms have such a state, even without FP8, where local layers have none. names: those of
    everything in the checkpoint.
    """
    missing = isinstance(value, ShardedObject) and value.key.endswith("_extra_state") and value.unique_key not in names
    return LocalNonpersistentObject(value.data) if missing else value


class _NoCommonState(LoadCommonStrategy):  # type: ignore[misc]
    """Reader of no common state: weights need nothing of ``common.pt``, which is a pickle."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        raise NotImplementedError("torch_dist holds its objects itself")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """Accept every backend: `read_record` has checked it."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """Accept every version: `read_record` has checked it."""


def _check_content(record: CheckpointRecord) -> None:
    """Compare every byte of the checkpoint with its manifest, each on one rank; either every rank raises or none.

    Loading reads the files from the page cache right after.

    Raises:
        CorruptError: names file and block, and the whole checkpoint before it.
    """
    assert record.manifest is not None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    own_faults = faults_in_blocks(record.manifest, share=rank, num_shares=num_ranks)
    gathered: list[list[str]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(gathered, own_faults)
    faults = sorted(fault for rank_faults in gathered for fault in rank_faults)
    if not faults:
        return
    error: list[CorruptError | None] = [None]
    if rank == 0:
        error = [damaged(record.path, faults, role=record.role, flag=record.flag, hash_all=True)]
    dist.broadcast_object_list(error)
    assert error[0] is not None
    raise error[0]


def _check_complete(tree: dict[str, Any], path: Path, role: str) -> None:
    """Refuse a checkpoint that lacks a weight of the model or has it in another shape; every rank raises or none."""
    available = dist_checkpointing.load_tensors_metadata(str(path))
    problems = []
    for tensor in wanted_tensors(tree):
        stored = available.get(tensor.key)
        if stored is None:
            problems.append(f"{tensor.key} is missing")
        elif not tensor.allow_shape_mismatch and tuple(stored.global_shape) != tuple(tensor.global_shape):
            problems.append(f"{tensor.key} is {tuple(stored.global_shape)} there, {tuple(tensor.global_shape)} here")
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    merged = sorted({problem for rank in gathered for problem in rank})
    if merged:
        raise MismatchError(f"{role}: {path} does not fit the model: {'; '.join(merged[:5])} ({len(merged)} in all)")
