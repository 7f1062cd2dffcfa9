"""A frozen model over ranges of samples: its hidden states and head, microbatch after microbatch.

Axes: ``S`` sequence, ``B`` microbatch, ``H`` hidden.

Which samples meet in one matrix product depends on ``--range-samples`` and ``--micro-batch-size`` alone
(`plan_microbatches`), so a range has the same bits in whichever job it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.blend import Blend
from megakd.data.loader import Loader, Microbatch
from megakd.data.samples.boundaries import begins_document, ids_end_documents
from megakd.data.samples.protocol import Samples
from megakd.layout import ParallelConfig
from megakd.losses.vocab_parallel import VocabShard
from megakd.model.checkpoint.load import load_teacher
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.checkpoint.tensor_names import check_weights
from megakd.model.config import ModelShape
from megakd.model.gpt import build_model
from megakd.parallel import Groups
from megakd.pipeline.frozen.batches import (
    AlikeMicrobatches,
    Stretches,
    alike_plans,
    plan_microbatches,
    read_microbatch,
)
from megakd.targets import DenseTargets
from megakd.teachers.model_teacher import ModelTeacher

_STAGE_MICROBATCHES = 8  # in flight for each pipeline stage: fills it, and bounds the hidden states that are held
_ROWS_AT_ONCE = 64


class FrozenModel:
    """One copy of a model, applied to samples of a dataset.

    parallel: layout of the model. vocab_size: refuses samples with larger ids. eod_mask_loss: mask each label with
    which a document starts. eod_token: id that ends a document besides the index; None: none. by_document: the model
    sees each document of a sample alone.
    """

    def __init__(
        self,
        samples: Samples,
        teacher: ModelTeacher,
        parallel: ParallelConfig,
        *,
        micro_batch_size: int,
        vocab_size: int,
        eod_mask_loss: bool = False,
        eod_token: int | None = None,
        by_document: bool = False,
    ) -> None:
        self._samples, self._teacher, self._parallel = samples, teacher, parallel
        self._micro_batch_size = micro_batch_size
        self._by_document = by_document
        self._eod_token = eod_token if ids_end_documents(samples.dataset) else None
        self._loader = Loader(
            Blend([samples], None, seed=0),
            seq_length=samples.seq_length,
            micro_batch_size=1,
            global_batch_size=1,
            eod_token=eod_token,
            eod_mask_loss=eod_mask_loss,
            vocab_size=vocab_size,
        )

    def outputs(self, ids: NDArray[np.int64]) -> Iterator[tuple[Stretches, Microbatch, DenseTargets, float]]:
        """Run the model over the samples ``ids``. All ranks of the copy iterate; only the last stage is given anything.

        Yields for each microbatch: its stretches (``places`` are positions in ``ids``), the microbatch, the model's
        hidden states and head, and the share of all stretches that is done with it, from 0 to 1.
        """
        stretches, done = self.stretches(ids), 0
        for batch in self.batches(ids, stretches):
            for part, microbatch, targets in zip(batch.stretches, batch, self._teacher.targets(batch)):
                assert isinstance(targets, DenseTargets)
                done += len(part.places)
                yield part, microbatch, targets, done / len(stretches.places)

    def stretches(self, ids: NDArray[np.int64]) -> Stretches:
        """Return the parts of the samples ``ids`` that the model sees one at a time: whole samples, or documents."""
        if len(ids):
            self._samples.prefetch(ids)
        lengths = self._samples.lengths(ids)
        if not self._by_document:
            return Stretches.of_samples(lengths)
        parts = []
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            chunk = slice(first, first + _ROWS_AT_ONCE)
            rows = self._samples.read(ids[chunk])
            begins = begins_document(self._samples, ids[chunk], rows, eod_token=self._eod_token)
            part = Stretches.of_documents(begins, lengths[chunk])
            parts.append(replace(part, places=part.places + first))
        return Stretches.join(parts)

    def batches(self, ids: NDArray[np.int64], stretches: Stretches) -> Iterator[AlikeMicrobatches]:
        """Read the microbatches of ``stretches`` of the samples ``ids``, as many together as keep the stages busy."""
        plans = plan_microbatches(
            stretches.lengths,
            micro_batch_size=self._micro_batch_size,
            seq_length=self._samples.seq_length,
            tensor_size=self._parallel.tensor_model_parallel_size,
        )
        for batch in alike_plans(plans, limit=in_flight(self._parallel)):
            parts = [stretches[plan.places] for plan in batch]
            microbatches = [
                read_microbatch(self._loader, ids[part.places], plan.width, part) for part, plan in zip(parts, batch)
            ]
            yield AlikeMicrobatches(microbatches, parts)


def in_flight(parallel: ParallelConfig) -> int:
    """Microbatches that go through the stages of a layout together."""
    return _STAGE_MICROBATCHES * parallel.pipeline_model_parallel_size


def build_frozen(
    record: CheckpointRecord, shape: ModelShape, groups: Groups, *, seq_length: int, rows: int | None = None
) -> ModelTeacher:
    """Build and load a checkpoint's model in the layout of ``groups``. All ranks call it.

    rows: rows of the output weight that each tensor rank holds, padding included (default: those of `vocab_shard`).
    """
    check_weights(record.path, record.shape, "--load")
    chunks = build_model(shape, groups, vocab_size=record.vocab_size, seq_length=seq_length, with_head=False)
    head_weight_vH = load_teacher(
        record, chunks, groups, groups, rows=rows or vocab_shard(record, shape, groups).num_rows
    )
    return ModelTeacher(chunks, head_weight_vH, groups, groups)


def vocab_shard(record: CheckpointRecord, shape: ModelShape, groups: Groups) -> VocabShard:
    """Slice of the vocabulary whose rows of the output weight this rank holds."""
    padded = shape.rows(record.vocab_size, groups.parallel.tensor_model_parallel_size)
    return groups.vocab_shard(record.vocab_size, padded_vocab_size=padded)


def provenance_of(
    parallel: ParallelConfig, *, micro_batch_size: int, range_samples: int, head_chunk_mbytes: int
) -> dict[str, Any]:
    """Settings, device and torch version that the last bits of a model's outputs depend on, for manifests."""
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "micro_batch_size": micro_batch_size,
        "range_samples": range_samples,
        "head_chunk_mbytes": head_chunk_mbytes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
