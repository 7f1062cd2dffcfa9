"""Checkpoints in megatron-core's ``torch_dist`` form: written aside, hashed, renamed, then announced.

Any layout can be loaded in any other (the layers are stored stacked, and shards are cut anew).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakd.artefacts.manifest import FileRecord, atomic_write, hash_file, write_manifest
from megakd.config.tree import to_dict
from megakd.errors import NoSpaceError
from megakd.model.checkpoint.record import FORMAT, MANIFEST, TRACKER, VERSION, checkpoint_path
from megakd.model.checkpoint.save_failure import explained
from megakd.model.checkpoint.state import layout_of, model_state, random_state, sharding_metadata, wanted_tensors
from megakd.model.config import ModelShape
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.work.die_with_parent import die_with_parent

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue


class CheckpointWriter:
    """Saves checkpoints of one run, in the foreground or, with ``background``, while training goes on.

    saved: told the folder of each checkpoint once it is whole and announced, on every rank.
    """

    def __init__(
        self, folder: str | Path, *, background: bool, saved: Callable[[Path], None] = lambda path: None
    ) -> None:
        self.folder = self._partial = Path(folder)  # the latter: of the checkpoint that is being written
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
        self._partial = partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        tree = model_state(chunks, groups)
        tree["optimizer"] = optimizer.sharded_state_dict(tree, is_loading=False, metadata=sharding_metadata(groups))
        tree["rng_state"] = random_state(groups)
        _check_space(tree, self.folder, groups)

        def announce() -> None:
            _commit(partial, final, parameters=parameters, parents=parents, tokenizer=tokenizer)
            if dist.get_rank() == 0:
                atomic_write(self.folder / TRACKER, f"{iteration}\n".encode())
            dist.barrier()
            self._saved(final)

        with explained(partial):
            request = dist_checkpointing.save(tree, str(partial), async_sharded_save=self._queue is not None)
            if self._queue is None:
                announce()
            else:
                request.add_finalize_fn(announce)
                self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Announce a background checkpoint that has been written meanwhile. All ranks call it, every step."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with explained(self._partial):
                self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background checkpoint and announce it."""
        if self._queue is not None:
            with explained(self._partial):
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
        "layout": layout_of(groups),
        "use_distributed_optimizer": groups.parallel.use_distributed_optimizer,
        "rng_states": True,
        "torch": torch.__version__,
    }


def _use_mortal_results_queue() -> None:
    """The process that megatron keeps for the results of its writers would outlive a killed rank; this one does not.

    It is started at the first checkpoint by filesystem_async.py:51, for the life of the rank.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _check_space(tree: dict[str, Any], folder: Path, groups: Groups) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold; every rank raises or none.

    Raises:
        NoSpaceError: with the bytes needed and free. The checkpoint before stays as it is.
    """
    mine = sum(
        tensor.data.nbytes
        for tensor in wanted_tensors(tree)
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
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed in between
        if final.exists():  # the same iteration again, after a resume from an earlier one
            os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _durable(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)
