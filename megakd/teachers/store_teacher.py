"""A teacher that reads a logits store: rows that were captured once are read while the student runs.

Axes: B microbatch, S sequence (this rank's part under context parallelism), K slots for ids, T = S x B tokens in
megatron's order (sequence first).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.blend import Blend
from megakd.data.samples.protocol import Samples
from megakd.data.samples.selected import ids_in_dataset, selection_of
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.codec import empty_rows
from megakd.logits.read_ahead import ReadAhead
from megakd.logits.store import BatchRows, LogitsStore
from megakd.model.attention import slice_sequence
from megakd.parallel import Groups
from megakd.targets import Given, SparseTargets, Unreadable
from megakd.teachers.protocol import Batch


class StoreTeacher:
    """Teacher that reads the rows of this rank's microbatches from the stores of their datasets.

    Each rank of the student's last stage reads for itself; the others need no targets. Rows are found by the sample's
    id in the whole dataset, so order, blend, selection and layout do not matter.

    stores: one for each dataset of the blend, None for a dataset without; all of one kind.
    vocab_size: size of the true vocabulary; ids of a store from there on are left out.
    threads: threads that read and decode microbatches. ahead: microbatches that are held besides the one in use.
    """

    def __init__(
        self,
        stores: Sequence[LogitsStore | None],
        blend: Blend,
        groups: Groups,
        *,
        vocab_size: int,
        threads: int = 1,
        ahead: int = 2,
    ) -> None:
        self._stores = tuple(stores)
        (self._kind,) = {store.spec.kind for store in self._stores if store is not None}
        self._datasets, self._vocab_size = blend.datasets, vocab_size
        self._groups = groups
        self._read_ahead = ReadAhead(threads=threads, ahead=ahead + 1)

    @property
    def incomplete(self) -> NDArray[np.bool_]:
        """Bool ``[datasets]``, True if samples that are trained on may lack targets, by the manifests."""
        return np.array([not _is_complete(*both) for both in zip(self._stores, self._datasets)])

    def targets(self, batch: Batch) -> Iterator[Given | Unreadable]:
        """Yield the targets of this rank's microbatches in order; reading begins at once.

        After one that cannot be read, all later ones are ``Unreadable`` with the same error.
        """
        if not self._groups.is_last_stage:
            return iter(())
        return self._in_turn(self._read_ahead(partial(self._read, batch), range(batch.num_microbatches)))

    def _in_turn(self, read: Generator[SparseTargets | None]) -> Iterator[Given | Unreadable]:
        while True:
            targets: SparseTargets | None = None
            fault: Exception | None = None
            try:
                targets = next(read)
            except StopIteration:
                return
            except (UsageError, OSError) as error:  # a file or its disk is gone
                fault = CorruptError(f"stored targets cannot be read: {error}")
            except (MismatchError, CorruptError) as error:
                fault = error
            fault = self._agree(fault)
            while fault is not None:
                yield Unreadable(fault)
            yield None if targets is None else self._to_device(targets)

    def _agree(self, fault: Exception | None) -> Exception | None:
        """Share a fault over the tensor group: its ranks take part in the head's collectives, so all or none go on."""
        group = self._groups.tensor
        if group.size() == 1:
            return fault
        any_fault = torch.tensor(fault is not None, dtype=torch.int32, device=self._groups.device)
        dist.all_reduce(any_fault, op=dist.ReduceOp.MAX, group=group)
        if not any_fault.item():
            return None
        faults: list[Exception | None] = [None] * group.size()
        dist.all_gather_object(faults, fault, group=group)
        return next(entry for entry in faults if entry is not None)

    def _read(self, batch: Batch, index: int) -> SparseTargets | None:
        """Read the targets of a microbatch, on the host; None if none of its samples has any. Runs on a thread."""
        microbatch = batch.microbatch(index)
        rows = self._rows(microbatch.dataset_ids_B, microbatch.sample_ids_B, microbatch.tokens_BS)
        if not rows.has_targets_BS.any():
            return None
        return SparseTargets(
            self._tokens_first(rows.ids_BSK),
            self._tokens_first(rows.log_probs_BSK),
            self._kind,
            self._tokens_first(rows.entropy_BS),
            None if rows.has_targets_BS.all() else self._tokens_first(rows.has_targets_BS),
        )

    def _rows(
        self, dataset_ids_B: NDArray[np.int64], sample_ids_B: NDArray[np.int64], tokens_BS: NDArray[np.int64]
    ) -> BatchRows:
        found: list[tuple[NDArray[np.bool_], BatchRows]] = []
        for dataset in np.unique(dataset_ids_B).tolist():
            store, here_B = self._stores[dataset], dataset_ids_B == dataset
            if store is not None:
                ids = ids_in_dataset(self._datasets[dataset], sample_ids_B[here_B])
                rows = store.read_batch(ids, tokens_BS[here_B])
                if (
                    store.spec.vocab_size > self._vocab_size
                ):  # weighted draws estimate p itself, so they are not renormalised
                    rows = rows.within(self._vocab_size, conditional=not store.spec.row_format.weighted)
                found.append((here_B, rows))
        width = max((rows.ids_BSK.shape[-1] for _, rows in found), default=0)
        if width and len(found) == 1 and found[0][0].all():
            return found[0][1]
        joined = empty_rows(tokens_BS.shape, max(width, 1))  # the head refuses rows without slots
        joined.ids_TK[:], joined.log_probs_TK[:], joined.entropy_T[:] = 0, -np.inf, 0
        has_targets_BS = np.zeros(tokens_BS.shape, np.bool_)
        for here_B, rows in found:
            joined.ids_TK[here_B, :, : rows.ids_BSK.shape[-1]] = rows.ids_BSK
            joined.log_probs_TK[here_B, :, : rows.ids_BSK.shape[-1]] = rows.log_probs_BSK
            joined.entropy_T[here_B] = rows.entropy_BS
            has_targets_BS[here_B] = rows.has_targets_BS
        return BatchRows(joined.ids_TK, joined.log_probs_TK, joined.entropy_T, has_targets_BS)

    def _tokens_first(self, array_BS: NDArray[Any]) -> Tensor:
        """Turn ``[B, S, ...]`` of the whole sequence into ``[T, ...]`` of this rank's part of it."""
        size = self._groups.parallel.context_parallel_size
        part_BS = slice_sequence(torch.from_numpy(array_BS), dim=1, rank=self._groups.context_rank, size=size)
        tokens_T = part_BS.transpose(0, 1).flatten(0, 1).contiguous()
        return tokens_T.pin_memory() if self._groups.device.type == "cuda" else tokens_T

    def _to_device(self, targets: SparseTargets) -> SparseTargets:
        if self._groups.device.type == "cpu":
            return targets
        moved: dict[str, Any] = {
            field.name: value.to(self._groups.device, non_blocking=True)
            for field in fields(targets)
            if isinstance(value := getattr(targets, field.name), Tensor)
        }
        return replace(targets, **moved)


def _is_complete(store: LogitsStore | None, samples: Samples) -> bool:
    if store is None:
        return False
    wanted, selection = store.spec.num_samples, selection_of(samples)
    if selection is not None and store.spec.parents.get("selection") == selection.fingerprint:
        wanted = len(selection)
    return int(store.manifest.parameters["samples_with_targets"]) == wanted
