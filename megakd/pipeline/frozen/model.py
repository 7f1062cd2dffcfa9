"""A frozen model over ranges of samples: what it says about stretches of them, microbatch after microbatch.

Axes: ``S`` sequence, ``B`` microbatch, ``H`` hidden.

Which samples meet in one matrix product depends on ``--range-samples`` and ``--micro-batch-size`` alone
(`range_batches`), so a range has the same bits whoever works on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.blend import Blend
from megakd.data.loader import Loader, Microbatch
from megakd.data.samples.boundaries import begins_document, ids_end_documents
from megakd.data.samples.protocol import Samples
from megakd.layout import ParallelConfig, padded_vocab_size
from megakd.losses.vocab_parallel import VocabShard
from megakd.model.checkpoint.load import load_teacher
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.checkpoint.tensor_names import check_weights
from megakd.model.config import ModelShape
from megakd.model.gpt import build_model
from megakd.parallel import Groups
from megakd.pipeline.frozen.batches import Stretches, alike_plans, plan_microbatches, read_microbatch
from megakd.targets import DenseTargets
from megakd.teachers.model_teacher import ModelTeacher

_STAGE_MICROBATCHES = 8  # in flight for each pipeline stage: fills it, and bounds the hidden states that are held
_ROWS_AT_ONCE = 64


class FrozenModel:
    """One copy of a model over samples of a dataset.

    eod_mask_loss: the labels with which another document starts are masked; eod_token: what else ends one, beside the
    index. by_document: the model sees every document of a sample by itself.
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
        """What the model says about the samples ``ids``, on its last stage; nothing elsewhere. All its ranks walk it.

        Yields stretches (of the samples by their places in ``ids``), the microbatch, the model's hidden states and
        head, and the share of all stretches that is done with it.
        """
        stretches, done = self._stretches(ids), 0
        for batch in self._batches(ids, stretches):
            for part, microbatch, targets in zip(batch.stretches, batch, self._teacher.targets(batch)):
                assert isinstance(targets, DenseTargets)
                done += len(part.places)
                yield part, microbatch, targets, done / len(stretches.places)

    def _stretches(self, ids: NDArray[np.int64]) -> Stretches:
        """What of the samples the model sees by itself."""
        if len(ids):
            self._samples.prefetch(ids)
        lengths = self._samples.lengths(ids)
        if not self._by_document:
            return Stretches.of_samples(lengths)
        parts = []
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            rows = self._samples.read(ids[some])
            begins = begins_document(self._samples, ids[some], rows, eod_token=self._eod_token)
            part = Stretches.of_documents(begins, lengths[some])
            parts.append(replace(part, places=part.places + first))
        return Stretches.join(parts)

    def _batches(self, ids: NDArray[np.int64], stretches: Stretches) -> Iterator[_Batch]:
        """The microbatches, as many at once as the pipeline likes."""
        plans = plan_microbatches(
            stretches.lengths,
            micro_batch_size=self._micro_batch_size,
            seq_length=self._samples.seq_length,
            tensor_size=self._parallel.tensor_model_parallel_size,
        )
        for batch in alike_plans(plans, limit=_STAGE_MICROBATCHES * self._parallel.pipeline_model_parallel_size):
            parts = [stretches[plan.places] for plan in batch]
            microbatches = [
                read_microbatch(self._loader, ids[part.places], plan.width, part) for part, plan in zip(parts, batch)
            ]
            yield _Batch(microbatches, parts)


@dataclass(frozen=True)
class _Batch:
    """Microbatches of this copy, in the form in which a teacher takes those of a step, and where each comes from."""

    microbatches: list[Microbatch]
    stretches: list[Stretches]

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        """This copy's, whatever the rank: the copies work on ranges of their own."""
        return self.microbatches[index]

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)


def build_frozen(record: CheckpointRecord, shape: ModelShape, groups: Groups, *, seq_length: int) -> ModelTeacher:
    """A checkpoint's model in the layout of ``groups``, ready to be read. All ranks call it."""
    check_weights(record.path, record.shape, "--load")
    chunks = build_model(shape, groups, vocab_size=record.vocab_size, seq_length=seq_length, with_head=False)
    head_weight_vH = load_teacher(record, chunks, groups, groups, rows=vocab_shard(record, shape, groups).num_rows)
    return ModelTeacher(chunks, head_weight_vH, groups, groups)


def vocab_shard(record: CheckpointRecord, shape: ModelShape, groups: Groups) -> VocabShard:
    """The slice of the vocabulary whose rows of the output weight this rank holds."""
    padded = padded_vocab_size(
        record.vocab_size,
        divisible_by=shape.make_vocab_size_divisible_by,
        tensor_model_parallel_size=groups.parallel.tensor_model_parallel_size,
    )
    return groups.vocab_shard(record.vocab_size, padded_vocab_size=padded)


def provenance_of(
    parallel: ParallelConfig, *, micro_batch_size: int, range_samples: int, head_chunk_mbytes: int
) -> dict[str, Any]:
    """What the last bits of a model's answers depend on."""
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
