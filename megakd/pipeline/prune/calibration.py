"""A model over the calibration samples: its loss, and what an observer sees on the way.

Axes: ``S`` sequence, ``B`` microbatch, ``T`` = S x B tokens, sequence first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.data.blend import Blend
from megakd.data.loader import Loader, Microbatch
from megakd.data.samples.protocol import Samples
from megakd.errors import CorruptError
from megakd.losses.read import read_head
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.pipeline.frozen.batches import alike_plans, plan_microbatches, read_microbatch
from megakd.pipeline.prune.observer import Observer
from megakd.targets import DenseTargets
from megakd.teachers.model_teacher import ModelTeacher

_STAGE_MICROBATCHES = 8  # in flight for each pipeline stage


@dataclass(frozen=True)
class _Batch:
    """Microbatches in the form in which a `ModelTeacher` takes those of a step."""

    microbatches: list[Microbatch]

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        return self.microbatches[index]


class Calibration:
    """The calibration samples ``ids``, divided over the copies of a model.

    vocab_size: refuses samples with larger ids, and no other id takes part in a softmax.
    """

    def __init__(
        self,
        samples: Samples,
        ids: NDArray[np.int64],
        groups: Groups,
        *,
        micro_batch_size: int,
        vocab_size: int,
        chunk_bytes: int,
    ) -> None:
        self._ids, self._groups = ids[groups.data_rank :: groups.data_size], groups
        self._samples, self._vocab_size, self._chunk_bytes = samples, vocab_size, chunk_bytes
        self._micro_batch_size = micro_batch_size
        self._loader = Loader(
            Blend([samples], None, seed=0),
            seq_length=samples.seq_length,
            micro_batch_size=1,
            global_batch_size=1,
            vocab_size=vocab_size,
        )

    def run(self, model: HiddenGPTModel, *, observer: Observer | None = None, ticked: Callable[[float], None]) -> float:
        """Run a model over the samples. All ranks call it.

        ticked: called with the share of this copy's samples that is done. Returns the mean over all tokens of minus
        their log-probability, in nats, on every rank.

        Raises:
            CorruptError: it is not finite. Every rank raises.
        """
        head_weight_vH = model.output_weight() if self._groups.is_last_stage else None
        teacher = ModelTeacher([model], head_weight_vH, self._groups, self._groups)
        sums_2 = torch.zeros(2, dtype=torch.float64, device=self._groups.device)  # of losses, and of tokens
        done = 0
        with observer or nullcontext():
            for batch in self._batches():
                if observer is not None:
                    masks = [torch.from_numpy(microbatch.loss_mask_BS.T.copy()) for microbatch in batch.microbatches]
                    observer.expect(masks)
                for microbatch, targets in zip(batch.microbatches, teacher.targets(batch)):
                    assert isinstance(targets, DenseTargets)
                    sums_2 += self._loss(targets, microbatch)
                done += sum(len(microbatch.sample_ids_B) for microbatch in batch.microbatches)
                ticked(done / len(self._ids))
        if self._groups.tensor_rank > 0:
            sums_2.zero_()  # all ranks of a tensor group have the same
        dist.all_reduce(sums_2)
        loss = float(sums_2[0] / sums_2[1])
        if not np.isfinite(loss):
            raise CorruptError(
                f"the loss on the calibration samples is {loss}: the weights are broken, or the precision (--bf16) "
                "does not hold them"
            )
        return loss

    def _batches(self) -> Iterator[_Batch]:
        parallel, lengths = self._groups.parallel, self._samples.lengths(self._ids)
        plans = plan_microbatches(
            lengths,
            micro_batch_size=self._micro_batch_size,
            seq_length=self._samples.seq_length,
            tensor_size=parallel.tensor_model_parallel_size,
        )
        for alike in alike_plans(plans, limit=_STAGE_MICROBATCHES * parallel.pipeline_model_parallel_size):
            yield _Batch([read_microbatch(self._loader, self._ids[plan.places], plan.width) for plan in alike])

    def _loss(self, targets: DenseTargets, microbatch: Microbatch) -> torch.Tensor:
        rows = targets.weight_vH.shape[0] * self._groups.parallel.tensor_model_parallel_size
        device = self._groups.device
        log_prob_T = read_head(
            targets.hidden_TH,
            targets.weight_vH,
            shard=self._groups.vocab_shard(self._vocab_size, padded_vocab_size=rows),
            ids_T=torch.from_numpy(microbatch.labels_BS.T.reshape(-1).copy()).to(device),
            chunk_bytes=self._chunk_bytes,
        ).log_prob_T
        assert log_prob_T is not None
        mask_T = torch.from_numpy(microbatch.loss_mask_BS.T.reshape(-1).copy()).to(device)
        return torch.stack([-log_prob_T[mask_T].double().sum(), mask_T.sum().double()])
