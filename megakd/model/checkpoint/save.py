"""Saving a checkpoint in megatron-core's ``torch_dist`` form: written aside, hashed, renamed, then announced."""

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
    """Writer of the checkpoints of one run, in the foreground or, with ``background``, while training goes on.

    saved: called on every rank with the folder of each checkpoint once it is whole and announced.
    """

    def __init__(
        self, folder: str | Path, *, background: bool, saved: Callable[[Path], None] = lambda path: None
    ) -> None:
        self.folder = Path(folder)
        self._partial = self.folder  # the folder of the checkpoint that is being written
        self._saved = saved
        self._queue = AsyncCallsQueue(persistent=False) if background else None
        _end_results_process_with_this()

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

        parameters: those of `record_parameters`, and others that the manifest keeps. optimizer: megatron's.
        """
        tree = model_state(chunks, groups)
        tree["optimizer"] = optimizer.sharded_state_dict(tree, is_loading=False, metadata=sharding_metadata(groups))
        tree["rng_state"] = random_state(groups)
        self._write(iteration, tree, groups, parameters=parameters, parents=parents, tokenizer=tokenizer)

    def save_weights(
        self,
        iteration: int,
        chunks: list[HiddenGPTModel],
        groups: Groups,
        *,
        parameters: dict[str, Any],
        parents: dict[str, str],
        tokenizer: dict[str, Any] | None,
    ) -> None:
        """Write a checkpoint of weights alone, to start from: its manifest says that there is no run to continue.

        parameters: those of `record_parameters`, and others that the manifest keeps. All ranks call it.
        """
        parameters = {**parameters, "foreign": True, "rng_states": False}
        tree = model_state(chunks, groups)
        self._write(iteration, tree, groups, parameters=parameters, parents=parents, tokenizer=tokenizer)

    def _write(
        self,
        iteration: int,
        tree: dict[str, Any],
        groups: Groups,
        *,
        parameters: dict[str, Any],
        parents: dict[str, str],
        tokenizer: dict[str, Any] | None,
    ) -> None:
        self.finish()
        final = checkpoint_path(self.folder, iteration)
        self._partial = partial = final.with_name(final.name + ".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
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
        """Announce a background checkpoint that has been written since the last call. All ranks call it, every step."""
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
    """Return the parameters of a manifest that ``record.read_record`` reads back."""
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


def _end_results_process_with_this() -> None:
    """Replace megatron's process for its writers' results, which outlives a killed rank, by one that ends with it.

    filesystem_async.py:51 would start it at the first checkpoint, for the life of the rank.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _check_space(tree: dict[str, Any], folder: Path, groups: Groups) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold; either every rank raises or none.

    Raises:
        NoSpaceError: with the bytes needed and free. Earlier checkpoints are not touched.
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
    """Hash the files (each rank its own), write the manifest and rename the folder. All ranks call it."""
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
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed in between
        if final.exists():  # this iteration was saved before, and came again after a resume from an earlier one
            os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _durable(path: Path) -> FileRecord:
    """Force a file to disk and return its hash."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)
