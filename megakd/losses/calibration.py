"""Expected calibration error: the difference between a model's confidence in its best id and that id's accuracy.

Axes: T tokens, H hidden, v this rank's slice of the vocabulary, b bins of confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.head import VocabShard
from megakd.losses.kernels.choose import Implementation
from megakd.losses.read import HeadReading, read_head

NUM_BINS = 15


def calibration_sums(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    *,
    shard: VocabShard,
    implementation: Implementation,
    chunk_bytes: int,
) -> Tensor:
    """Return float64 ``[2, b]``: for each bin, the number of tokens whose best id is the label, and the sum of its
    probability. All ranks of the group get it. A bin is open on the left: ``(m / b, (m + 1) / b]``.

    The arguments are those of ``losses.read.read_head``; labels_T: int64; mask_T: bool, the tokens that count.
    """
    reading = read_head(
        hidden_TH[mask_T], weight_vH, shard=shard, top_k=1, implementation=implementation, chunk_bytes=chunk_bytes
    )
    return calibration_sums_of(reading, labels_T[mask_T])


def calibration_sums_of(reading: HeadReading, labels_T: Tensor) -> Tensor:
    """Return what `calibration_sums` returns, from a reading with the best id of each token.

    labels_T: int64, the labels of the tokens that were read.
    """
    assert reading.top_ids_TK is not None and reading.top_log_probs_TK is not None
    confidence_T = reading.top_log_probs_TK[:, 0].exp().double()
    right_T = (reading.top_ids_TK[:, 0] == labels_T).double()
    edges = torch.arange(1, NUM_BINS, device=confidence_T.device, dtype=torch.float64) / NUM_BINS
    bins_T = torch.bucketize(confidence_T, edges)
    sums = confidence_T.new_zeros(2, NUM_BINS)
    return sums.index_add_(1, bins_T, torch.stack([right_T, confidence_T]))


def calibration_error(sums: Tensor, num_tokens: int) -> float:
    """Return the mean over tokens of ``|accuracy - mean confidence|`` of their bin (arXiv 1706.04599, equation 3).

    sums: results of `calibration_sums`, added up over any number of calls; num_tokens: the tokens of all those calls.
    Raises UsageError for 0 tokens.
    """
    if num_tokens < 1:
        raise UsageError("a calibration error of 0 tokens; expected held-out data that the loss mask does not empty")
    return float((sums[0] - sums[1]).abs().sum()) / num_tokens
