"""Columns of scores: computed from a model's hidden states for a microbatch, gathered over a range of samples.

Axes: ``S`` sequence, ``B`` microbatch, ``H`` hidden, ``T`` = S x B tokens, sequence first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.loader import Microbatch
from megakd.data.scores.artefact import COUNTS, DTYPES, LOG_PROBS, PER_TOKEN, TOKEN_ENTROPIES, TOKEN_LOG_PROBS, UNSCORED
from megakd.errors import CorruptError
from megakd.losses.kernels.choose import Implementation
from megakd.losses.read import HeadReading, read_head
from megakd.losses.vocab_parallel import VocabShard
from megakd.model.proxy.artefact import Proxy
from megakd.model.proxy.head import ValueHead
from megakd.pipeline.frozen.batches import Stretches
from megakd.targets import DenseTargets

_LOWEST_HALF = -65504.0


class LogProbColumns:
    """Log-probabilities of the labels under the model's own head.

    columns: file names of the scores that are wanted. model: named in messages. shard: this rank's slice of the
    vocabulary. chunk_bytes: memory for the logits of one chunk of tokens.
    """

    def __init__(
        self,
        columns: Sequence[str],
        model: Path,
        shard: VocabShard,
        device: torch.device,
        *,
        implementation: Implementation,
        chunk_bytes: int,
    ) -> None:
        self._columns, self._model, self._shard, self._device = columns, model, shard, device
        self._implementation, self._chunk_bytes = implementation, chunk_bytes

    def __call__(self, targets: DenseTargets, microbatch: Microbatch) -> dict[str, NDArray[Any]]:
        """Columns by file name, one row for each stretch of the microbatch, for `RangeColumns.add`."""
        labels_T = torch.from_numpy(microbatch.labels_BS).to(self._device).t().reshape(-1)
        reading = read_head(
            targets.hidden_TH,
            targets.weight_vH,
            shard=self._shard,
            ids_T=labels_T,
            entropy=TOKEN_ENTROPIES in self._columns,
            implementation=self._implementation,
            chunk_bytes=self._chunk_bytes,
        )
        return log_prob_columns(reading, microbatch, self._model, per_token=TOKEN_LOG_PROBS in self._columns)


def log_prob_columns(
    reading: HeadReading, microbatch: Microbatch, model: str | Path, *, per_token: bool = False
) -> dict[str, NDArray[Any]]:
    """Columns by file name, for `RangeColumns.add`, from the labels' log-probabilities in ``reading``.

    per_token: add the log-probability of each position. Entropies are added if the reading has them.

    Raises CorruptError, which names ``model``, for a log-probability that is not finite.
    """
    shape, mask_BS = microbatch.tokens_BS.shape, microbatch.loss_mask_BS
    log_prob_BS = _to_numpy(reading.log_prob_T, shape)
    bad_B = (mask_BS & ~np.isfinite(log_prob_BS)).any(axis=1)
    if bad_B.any():
        raise CorruptError(
            f"{model}: the log-probabilities of samples {microbatch.sample_ids_B[bad_B][:8].tolist()} "
            "are not finite: the weights are broken, or the precision (--bf16, --fp8-format) does not hold them"
        )
    # by numpy, whose order of addition does not depend on threads
    sums_B = np.where(mask_BS, log_prob_BS, 0.0).astype(np.float64).sum(axis=1)
    columns = {LOG_PROBS: sums_B, COUNTS: mask_BS.sum(axis=1)}
    if per_token:
        columns[TOKEN_LOG_PROBS] = _to_half(np.maximum(log_prob_BS, _LOWEST_HALF), mask_BS)
    if reading.entropy_T is not None:
        columns[TOKEN_ENTROPIES] = _to_half(_to_numpy(reading.entropy_T, shape), mask_BS)
    return columns


class PredictedColumns:
    """Predictions of a proxy: ``log_probs`` is the predicted difference of log-probabilities, summed over a sample.

    The NLL per token of such scores is minus the predicted difference per token, so ``megakd select`` ranks by the
    prediction with a weight of -1.
    """

    def __init__(self, proxy: Proxy, device: torch.device) -> None:
        self._folder, self._device = proxy.folder, device
        self._head = ValueHead(proxy.record.shape.hidden_size, device=device).requires_grad_(False)
        with torch.no_grad():
            self._head.weight.copy_(torch.from_numpy(proxy.head[:-1].copy()))
            self._head.bias.copy_(torch.from_numpy(proxy.head[-1:].copy()))

    def __call__(self, targets: DenseTargets, microbatch: Microbatch) -> dict[str, NDArray[Any]]:
        """Columns by file name, one row for each sample of the microbatch, for `RangeColumns.add`."""
        batch, width = microbatch.tokens_BS.shape
        mask_BS = torch.from_numpy(microbatch.loss_mask_BS).to(self._device)
        per_token_B = self._head(targets.hidden_TH.view(width, batch, -1), mask_BS).cpu().numpy().astype(np.float64)
        counts_B = microbatch.loss_mask_BS.sum(axis=1)
        bad_B = (counts_B > 0) & ~np.isfinite(per_token_B)
        if bad_B.any():
            raise CorruptError(
                f"{self._folder}: what is predicted for samples {microbatch.sample_ids_B[bad_B][:8].tolist()} is not "
                "finite: the weights are broken, or the precision (--bf16, --fp8-format) does not hold them"
            )
        return {LOG_PROBS: np.where(counts_B > 0, per_token_B * counts_B, 0.0), COUNTS: counts_B}


class RangeColumns:
    """Columns ``names`` over the samples ``[start, stop)``, of which ``ids`` (ascending) are scored."""

    def __init__(self, names: Sequence[str], start: int, stop: int, ids: NDArray[np.int64], seq_length: int) -> None:
        shapes = {name: (stop - start, seq_length)[: 1 + (name in PER_TOKEN)] for name in names}
        self._columns = {name: np.full(shapes[name], UNSCORED[name], DTYPES[name]) for name in names}
        self._places = ids - start
        self._sums, self._counts = np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64)

    def add(self, stretches: Stretches, values: Mapping[str, NDArray[Any]]) -> None:
        """Add the values of one microbatch.

        stretches: ``B`` of them; places are positions in the scored ids. values: by column; ``LOG_PROBS`` (float64)
        and ``COUNTS`` are ``[B]`` and summed over the stretches of a sample; columns with a value for each position
        are ``[B, S]``, and only as many positions count as a stretch has labels.
        """
        np.add.at(self._sums, stretches.places, values[LOG_PROBS])
        np.add.at(self._counts, stretches.places, values[COUNTS])
        for name in PER_TOKEN:
            if name in self._columns:
                within_BS = np.arange(values[name].shape[1]) < stretches.lengths[:, None] - 1
                row, position = np.nonzero(within_BS)
                rows, columns = self._places[stretches.places[row]], stretches.starts[row] + position
                self._columns[name][rows, columns] = values[name][within_BS]

    def finish(self) -> dict[str, NDArray[Any]]:
        """Return the columns by file name, over all samples of the range."""
        self._columns[LOG_PROBS][self._places] = self._sums
        self._columns[COUNTS][self._places] = self._counts
        return self._columns


def _to_numpy(values_T: torch.Tensor | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``[B, S]`` fp32 from ``[T]`` values in Megatron's order, sequence first."""
    assert values_T is not None
    array: NDArray[np.float32] = values_T.view(shape[1], shape[0]).t().float().contiguous().cpu().numpy()
    return array


def _to_half(values_BS: NDArray[np.float32], mask_BS: NDArray[np.bool_]) -> NDArray[np.float16]:
    """Round to fp16, with NaN where the mask is false."""
    return np.where(mask_BS, values_BS, np.nan).astype(np.float16)
