"""Journal of the model in training: rows of its own distribution on its batches, read off its head.

Axes: ``S`` sequence (this rank's part under context parallelism), ``B`` microbatch, ``H`` hidden, ``T`` = S x B tokens,
``N`` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.blend import Blend
from megakd.data.loader import Microbatch
from megakd.data.samples.selected import ids_in_dataset
from megakd.errors import UsageError
from megakd.logits.codec import Rows
from megakd.logits.journal import SEGMENTS, JournalWriter, Segment, commit_steps, cut_back
from megakd.logits.spec import StoreSpec
from megakd.losses.read import HeadReading
from megakd.model.attention import gather_sequence, slice_sequence
from megakd.parallel import Groups
from megakd.teachers.head_rows import RowReader, draw_numbers, finite_samples, split_samples
from megakd.train.journal_config import journal_folder
from megakd.train.objective.objective import Objective

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

Keep = Callable[[Tensor, Tensor, Microbatch], None]
"""Takes the last stage's hidden states of a microbatch, the head's weight, and the microbatch."""


class TrainingJournal:
    """Rows of every sample of every step from ``from_step`` on, one journal for each dataset of the blend.

    Ranks of the last stage read their slice of the head, as the loss does, before the update of the step; the first
    of each copy writes.

    specs: one for each dataset; without any, nothing is kept. start_step: the step that the run goes on from; counted:
    the segments that its checkpoint names, all others are taken out of the journal. num_records: most records of a
    segment. say: prints a line for the user.
    """

    def __init__(
        self,
        folder: str,
        specs: Sequence[StoreSpec],
        blend: Blend,
        objective: Objective,
        groups: Groups,
        *,
        start_step: int,
        counted: Sequence[str] | None,
        from_step: int,
        num_records: int,
        say: Callable[[str], None],
    ) -> None:
        self._specs, self._datasets, self._groups = specs, blend.datasets, groups
        self._committed, self._from_step, self._say = start_step, from_step, say
        self.counted = list(counted or ())
        """Fingerprints of the segments committed so far, on rank 0; a checkpoint that names them makes them count."""
        if not specs:
            return
        self._waiting: list[tuple[int, str, int, NDArray[Any], Rows | None]] = []  # rows of the step under way
        self._folders = {spec.parents["dataset"]: journal_folder(folder, spec) for spec in specs}
        if groups.rank == 0:
            for journal in self._folders.values():
                _make_folder(journal)
                for first, last in cut_back(journal, start_step, counted):
                    say(f"{journal}: took out steps {first} to {last}, which this run does not go on from")
        dist.barrier()
        self._reader = RowReader(
            specs[0],  # they differ in their samples alone, which the reading of the head does not depend on
            shard=objective.shard,
            implementation=objective.implementation,
            chunk_bytes=objective.chunk_bytes,
        )
        self._writers, self._left_out = {}, dict.fromkeys(self._folders, 0)
        if groups.is_last_stage and groups.tensor_rank == groups.context_rank == 0:
            self._writers = {
                spec.parents["dataset"]: JournalWriter(
                    self._folders[spec.parents["dataset"]],
                    spec,
                    writer=f"r{groups.rank:05d}",
                    num_records=num_records,
                )
                for spec in specs
            }

    def at(self, step: int) -> Keep | None:
        """Return the function that keeps the microbatches of a step; None if they are not kept.

        All steps before it must have been applied.
        """
        if not self._specs or step < self._from_step:
            return None
        self._hand_over(step - 1)
        return partial(self._keep, step)

    def commit(self, step: int) -> None:
        """Commit the rows up to ``step``, before its checkpoint is saved. All ranks call it.

        A run that is killed before that checkpoint is whole goes on from an earlier one and takes these rows out again.
        """
        first, self._committed = max(self._committed + 1, self._from_step), step
        if not self._specs or first > step:
            return
        self._hand_over(step)
        mine = {dataset: (writer.flush(), self._left_out[dataset]) for dataset, writer in self._writers.items()}
        self._left_out = dict.fromkeys(self._folders, 0)
        everyone: list[dict[str, tuple[list[Segment], int]]] = [{} for _ in range(self._groups.world_size)]
        dist.all_gather_object(everyone, mine)
        if self._groups.rank == 0:
            for spec in {spec.parents["dataset"]: spec for spec in self._specs}.values():
                dataset = spec.parents["dataset"]
                folder, written = self._folders[dataset], [rank[dataset] for rank in everyone if dataset in rank]
                segments = [segment for several, _ in written for segment in several]
                left_out = sum(number for _, number in written)
                if left_out:
                    self._say(
                        f"Warning: {folder}: {left_out} samples of steps {first} to {step} have no rows: logits of "
                        "theirs that the loss mask hides are not finite"
                    )
                if segments:
                    commit = commit_steps(folder, spec, segments, steps=(first, step), left_out=left_out)
                    self.counted.append(commit.fingerprint)

    def _hand_over(self, last_step: int) -> None:
        """Give the writers the waiting rows up to ``last_step``; drop later ones, whose step was refused."""
        for step, dataset, sample_id, tokens_S, rows in self._waiting:
            if step > last_step:
                continue
            if rows is None:
                self._left_out[dataset] += 1
            else:
                self._writers[dataset].add(sample_id, step, tokens_S, rows)
        self._waiting.clear()

    @torch.no_grad()
    def _keep(self, step: int, hidden_SBH: Tensor, weight_vH: Tensor, microbatch: Microbatch) -> None:
        if self._groups.parallel.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self._groups.tensor
            )
        uniforms_TN = self._uniforms(microbatch) if self._reader.draws else None
        reading = self._reader.read(hidden_SBH.flatten(0, 1), weight_vH, uniforms_TN=uniforms_TN)
        batch = hidden_SBH.shape[1]
        reading = self._whole_sequence(reading, batch)
        if not self._writers:
            return
        # a loss that is not finite refuses the whole step; a sample whose masked logits are not finite has no rows
        finite_B, lengths_B = finite_samples(reading, batch), np.zeros(batch, np.int64)
        ids_B = np.zeros(batch, np.int64)
        for dataset in np.unique(microbatch.dataset_ids_B).tolist():
            here_B, samples = microbatch.dataset_ids_B == dataset, self._datasets[dataset]
            sample_ids = microbatch.sample_ids_B[here_B]
            lengths_B[here_B], ids_B[here_B] = samples.lengths(sample_ids), ids_in_dataset(samples, sample_ids)
        num_rows_B = np.minimum(lengths_B - 1, microbatch.tokens_BS.shape[1])
        rows_B = split_samples(self._reader.rows(reading), num_rows_B)
        for place, rows in enumerate(rows_B):
            fingerprint = self._datasets[int(microbatch.dataset_ids_B[place])].dataset.fingerprint
            tokens_S = microbatch.tokens_BS[place, : rows.num_rows]
            if rows.num_rows or not finite_B[place]:
                kept = rows if finite_B[place] else None
                self._waiting.append((step, fingerprint, int(ids_B[place]), tokens_S, kept))

    def _uniforms(self, microbatch: Microbatch) -> Tensor:
        """Return the random numbers of the draws, float64 ``[T, N]``, for this rank's part of the sequence."""
        batch, width = microbatch.tokens_BS.shape
        numbers_SBN = np.empty((width, batch, self._specs[0].draws))
        for dataset in np.unique(microbatch.dataset_ids_B).tolist():
            here_B = microbatch.dataset_ids_B == dataset
            starts_B = self._datasets[dataset].starts(microbatch.sample_ids_B[here_B])
            numbers_SBN[:, here_B] = draw_numbers(starts_B, width, self._specs[dataset])
        size, rank = self._groups.parallel.context_parallel_size, self._groups.context_rank
        own_SBN = slice_sequence(torch.from_numpy(numbers_SBN), dim=0, rank=rank, size=size)
        return own_SBN.flatten(0, 1).to(self._groups.device)

    def _whole_sequence(self, reading: HeadReading, batch: int) -> HeadReading:
        """Join the readings of the parts of the sequence that context-parallel ranks hold."""
        if self._groups.parallel.context_parallel_size == 1:
            return reading
        group = self._groups.collection.cp
        whole: dict[str, Any] = {
            field.name: gather_sequence(value.view(-1, batch, *value.shape[1:]), group).flatten(0, 1)
            for field in fields(reading)
            if isinstance(value := getattr(reading, field.name), Tensor)
        }
        return replace(reading, **whole)


def _make_folder(folder: Path) -> None:
    """Make the folder at the start: the first rows, and with them an error, may come hours later."""
    try:
        (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--logits-save-dir {folder.parent}: {error.strerror}: {error.filename}") from error
