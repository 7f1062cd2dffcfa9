"""Checkpoints in megatron-core's ``torch_dist`` form: written aside, hashed, renamed, then announced.

Any layout can be loaded in any other (the layers are stored stacked, and shards are cut anew).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.config import to_dict
from megakd.errors import CorruptError, MismatchError, NoSpaceError
from megakd.manifest import FileRecord, atomic_write, faults_in_blocks, hash_file, write_manifest
from megakd.model.config import ModelShape
from megakd.model.damage import damaged
from megakd.model.gpt import HiddenGPTModel
from megakd.model.metadata import read_tensor_names
from megakd.model.record import FORMAT, MANIFEST, TRACKER, VERSION, CheckpointRecord, checkpoint_path
from megakd.mortal import die_with_parent
from megakd.parallel import Groups, random_states, set_random_states

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue


class CheckpointWriter:
    """Saves checkpoints of one run, in the foreground or, with ``background``, while training goes on.

    saved: told the folder of each checkpoint once it is whole and announced, on every rank.
    """

    def __init__(
        self, folder: str | Path, *, background: bool, saved: Callable[[Path], None] = lambda path: None
    ) -> None:
        self.folder = Path(folder)
        self._saved = saved
        self._queue = AsyncCallsQueue(persistent=False) if background else None
        _use_mortal_results_queue()

    def save(
        self,
        iteration: int,
        chunks: list[HiddenGPTModel],
        optimizer: Any,
        groups: Groups,
        *,
        parameters: dict[str, Any],
        parents: dict[str, str],
        tokenizer: dict[str, Any] | None,
    ) -> None:
        """Write ``iter_...`` and move the tracker to it. All ranks call it.

        parameters: what ``CheckpointRecord`` reads back, beside what is known here. optimizer: megatron's.
        """
        self.finish()
        final = checkpoint_path(self.folder, iteration)
        partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        tree = _model_state(chunks, groups)
        tree["optimizer"] = optimizer.sharded_state_dict(tree, is_loading=False, metadata=_metadata(groups))
        tree["rng_state"] = _rng_state(groups)
        _check_space(tree, self.folder, groups)

        def announce() -> None:
            _commit(partial, final, parameters=parameters, parents=parents, tokenizer=tokenizer)
            if dist.get_rank() == 0:
                atomic_write(self.folder / TRACKER, f"{iteration}\n".encode())
            dist.barrier()
            self._saved(final)

        request = dist_checkpointing.save(tree, str(partial), async_sharded_save=self._queue is not None)
        if self._queue is None:
            announce()
        else:
            request.add_finalize_fn(announce)
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Announce a background checkpoint that has been written meanwhile. All ranks call it, every step."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background checkpoint and announce it."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)


def record_parameters(
    shape: ModelShape,
    groups: Groups,
    *,
    iteration: int,
    vocab_size: int,
    seq_length: int,
    loader_state: dict[str, Any],
    objective_state: dict[str, Any],
    journal: Sequence[str] = (),
) -> dict[str, Any]:
    """The part of a manifest that ``read_record`` understands."""
    return {
        "iteration": iteration,
        "shape": to_dict(shape),
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "loader_state": loader_state,
        "objective_state": objective_state,
        "journal": list(journal),
        "layout": _layout(groups),
        "use_distributed_optimizer": groups.parallel.use_distributed_optimizer,
        "rng_states": True,
        "torch": torch.__version__,
    }


def load_training_state(record: CheckpointRecord, chunks: list[HiddenGPTModel], optimizer: Any, groups: Groups) -> None:
    """Weights, optimizer state and (in the same layout) random states of ``record``, in place."""
    tree = _model_state(chunks, groups)
    tree["optimizer"] = optimizer.sharded_state_dict(tree, is_loading=True, metadata=_metadata(groups))
    same_layout = record.layout == _layout(groups)
    if same_layout:
        tree["rng_state"] = _rng_state(groups)
    loaded = _load(tree, record)
    _set_model_state(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        set_random_states(loaded["rng_state"])


def load_weights(record: CheckpointRecord, chunks: list[HiddenGPTModel], groups: Groups) -> None:
    """The weights of ``record`` and nothing else, in place."""
    _set_model_state(chunks, _load(_model_state(chunks, groups), record))


def load_teacher(
    record: CheckpointRecord,
    chunks: list[HiddenGPTModel],
    groups: Groups,
    student: Groups,
    *,
    rows: int,
) -> Tensor | None:
    """The teacher's weights in its own layout, and its head's shard ``[rows, H]`` in the student's, on its last stage.

    rows: the head's rows a student rank holds. Rows of the padded vocabulary that the checkpoint lacks are 0.
    """
    tree = _model_state(chunks, groups)
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
    loaded = _load(tree, record, reads_twice=True)
    _set_model_state(chunks, loaded)
    return loaded.get("head")


def _use_mortal_results_queue() -> None:
    """The process that megatron keeps for the results of its writers would outlive a killed rank; this one does not.

    It is started at the first checkpoint by filesystem_async.py:51, for the life of the rank.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _model_state(chunks: list[HiddenGPTModel], groups: Groups) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=_metadata(groups)) for name, chunk in zip(names, chunks)}


def _set_model_state(chunks: list[HiddenGPTModel], loaded: dict[str, Any]) -> None:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    for name, chunk in zip(names, chunks):
        chunk.load_state_dict(loaded[name])


def _metadata(groups: Groups) -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.collection.dp_cp}


def _load(tree: dict[str, Any], record: CheckpointRecord, *, reads_twice: bool = False) -> dict[str, Any]:
    _check_content(record)
    path = record.path
    read_tensor_names(path)  # refuses a file that megatron's own reader would run code from
    _check_complete(tree, path, record.role)
    loaded: dict[str, Any] = dist_checkpointing.load(tree, str(path), validate_access_integrity=not reads_twice)
    return loaded


def _check_content(record: CheckpointRecord) -> None:
    """Hold every byte of the checkpoint against its manifest, each on one rank; every rank raises or none.

    It is read from the page cache right after.

    Raises:
        CorruptError: names file and block, and the checkpoint before it.
    """
    assert record.manifest is not None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = faults_in_blocks(record.manifest, share=rank, num_shares=num_ranks)
    gathered: list[list[str]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(gathered, found)
    faults = sorted(fault for own in gathered for fault in own)
    if not faults:
        return
    error: list[CorruptError | None] = [None]
    if rank == 0:
        error = [damaged(record.path, faults, role=record.role, flag=record.flag, hash_all=True)]
    dist.broadcast_object_list(error)
    assert error[0] is not None
    raise error[0]


def _check_complete(tree: dict[str, Any], path: Path, role: str) -> None:
    """Every weight that the model has must be in the checkpoint, in its shape; every rank raises or none."""
    available = dist_checkpointing.load_tensors_metadata(str(path))
    problems = []
    for tensor in _wanted_tensors(tree):
        found = available.get(tensor.key)
        if found is None:
            problems.append(f"{tensor.key} is missing")
        elif not tensor.allow_shape_mismatch and tuple(found.global_shape) != tuple(tensor.global_shape):
            problems.append(f"{tensor.key} is {tuple(found.global_shape)} there, {tuple(tensor.global_shape)} here")
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    merged = sorted({problem for rank in gathered for problem in rank})
    if merged:
        raise MismatchError(f"{role}: {path} does not fit the model: {'; '.join(merged[:5])} ({len(merged)} in all)")


def _wanted_tensors(tree: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(tree):
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
            yield from (part for part in nested_values(value) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def _check_space(tree: dict[str, Any], folder: Path, groups: Groups) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold; every rank raises or none.

    Raises:
        NoSpaceError: with the bytes needed and free. The checkpoint before stays as it is.
    """
    mine = sum(
        tensor.data.nbytes
        for tensor in _wanted_tensors(tree)
        if is_main_replica(tensor.replica_id) and tensor.data is not None
    )
    needed = torch.tensor([mine, 0], dtype=torch.int64, device=groups.device)
    if dist.get_rank() == 0:
        needed[1] = shutil.disk_usage(folder).free
    dist.all_reduce(needed)
    needed_bytes, free_bytes = needed.tolist()
    if needed_bytes > free_bytes:
        raise NoSpaceError(
            f"{folder}: a checkpoint needs {needed_bytes / 1e9:.3f} GB, {free_bytes / 1e9:.3f} GB are free; free some "
            "space and start again, the run continues from the checkpoint before"
        )


def _layout(groups: Groups) -> dict[str, int]:
    parallel = groups.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual": parallel.virtual_pipeline_model_parallel_size or 1,
        "context": parallel.context_parallel_size,
        "data": groups.data_size,
    }


def _rng_state(groups: Groups) -> ShardedObject:
    """Every rank's generators. They matter only with dropout, and only in the layout that wrote them."""
    place = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject("rng_state", random_states(groups), *place, replica_id=0)


def _commit(
    partial: Path, final: Path, *, parameters: dict[str, Any], parents: dict[str, str], tokenizer: dict[str, Any] | None
) -> None:
    """Hash (each rank the files it wrote), write the manifest, rename the folder. All ranks call it."""
    dist.barrier()
    rank = dist.get_rank()
    names = sorted(path.name for path in partial.iterdir())
    mine = [name for name in names if name.startswith(f"__{rank}_")]
    if rank == 0:
        mine += [name for name in names if not name.startswith("__")]
    gathered: list[list[FileRecord]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, [_durable(partial / name) for name in mine])
    if rank == 0:
        files = sorted((record for records in gathered for record in records), key=lambda record: record.name)
        write_manifest(
            partial / MANIFEST,
            format=FORMAT,
            version=VERSION,
            parameters=parameters,
            parents=parents,
            tokenizer=tokenizer,
            files=files,
        )
        old = final.with_name(final.name + ".old")
        if final.exists():  # the same iteration again, after a resume from an earlier one
            os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _durable(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)
