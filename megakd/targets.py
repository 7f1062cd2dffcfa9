"""What a teacher says about one microbatch: values only, no model and no file.

Axes: ``T`` flattened tokens, ``K`` listed entries, ``V`` whole vocabulary, ``v`` this rank's slice of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

SparseKind = Literal["top_p_k", "samples", "renormalised_samples"]


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as its hidden states and this rank's rows of its output weight.

    The head multiplies the two chunk by chunk, so that no ``[T, V]`` tensor of teacher logits ever exists.

    hidden_TH: ``[T, H_teacher]``, the teacher's hidden states after its last norm, in the student's token order.
    weight_vH: ``[v, H_teacher]``, the teacher's output weight for the same vocabulary rows as the student's shard.
    """

    hidden_TH: Tensor
    weight_vH: Tensor


@dataclass(frozen=True)
class LogitTargets:
    """The teacher's whole distribution, as logits ``[T, v]`` that somebody else has made. They are only read."""

    logits_Tv: Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Some entries of the teacher's distribution. The same on every rank of the vocabulary's group.

    ids_TK: ``[T, K]`` int64 vocabulary ids, no id twice in a row; any value where the log-probability is -inf (an
        empty slot).
    log_probs_TK: ``[T, K]`` fp32, natural log of the mass each id carries.
    kind: what that mass is.
        ``top_p_k``: probabilities under the whole softmax; what is not listed is the tail, ``1 - sum``.
        ``samples``: shares ``count / N`` of N draws, an unbiased estimate that sums to 1 (Sparse Logit Sampling,
        arXiv 2503.16870); of draws from another distribution q, ``count / N · p / q``, which sums to 1 on average.
        ``renormalised_samples``: probabilities of the ids that were drawn, renormalised to 1 (Gemma 3).
    entropy_T: ``[T]`` fp32, the entropy in nats of the whole distribution, if it is known.
    has_targets_T: ``[T]`` bool, the tokens about which anything is said; None where that is all of them. The slots of
        the others are empty.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor
    kind: SparseKind = "top_p_k"
    entropy_T: Tensor | None = None
    has_targets_T: Tensor | None = None

    @staticmethod
    def from_counts(ids_TK: Tensor, counts_TK: Tensor, entropy_T: Tensor | None = None) -> SparseTargets:
        """Sampled targets from how often each id was drawn; a count of 0 is an empty slot."""
        counts_TK = counts_TK.float()
        log_probs_TK = (counts_TK / counts_TK.sum(-1, keepdim=True)).log()
        return SparseTargets(ids_TK, log_probs_TK, "samples", entropy_T)

    @staticmethod
    def from_top_1(ids_T: Tensor, mass: float) -> SparseTargets:
        """The teacher's best id with a fixed mass. With the tail on the label this is the mix of Apple's on-device
        models (2024): 0.9 on the teacher's top-1, 0.1 on the label."""
        ids_TK = ids_T.unsqueeze(1)
        return SparseTargets(ids_TK, ids_TK.float().fill_(math.log(mass)))


Targets = DenseTargets | LogitTargets | SparseTargets


@dataclass(frozen=True)
class MixedTargets:
    """Stored targets where there are any, those of a model for the other tokens."""

    stored: SparseTargets
    model: DenseTargets


@dataclass(frozen=True)
class Unreadable:
    """In the place of targets that could not be read: why. The step is to be refused, on every rank."""

    error: Exception


Given = Targets | MixedTargets | None
"""What a teacher gives for one microbatch; None where it says nothing about any of its tokens."""
