"""Targets: a teacher's distributions for one microbatch, as values, without model or file.

Axes: ``T`` flattened tokens, ``K`` slots for listed ids, ``V`` whole vocabulary, ``v`` this rank's slice of it.
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
    """The teacher's whole distribution, as logits ``[T, v]`` that the caller has made. They are only read."""

    logits_Tv: Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Some entries of the teacher's distribution, equal on every rank of the vocabulary's group.

    ids_TK: ``[T, K]`` int64 vocabulary ids, no id twice in a row; any value where the log-probability is -inf (an
        empty slot).
    log_probs_TK: ``[T, K]`` fp32, natural log of the mass each id carries.
    kind: meaning of that mass.
        ``top_p_k``: probabilities under the whole softmax; the mass that is not listed is the tail, ``1 - sum``.
        ``samples``: shares ``count / N`` of N draws, an unbiased estimate that sums to 1 (Sparse Logit Sampling,
        arXiv 2503.16870); for draws from another distribution q, ``count / N · p / q``, which sums to 1 on average.
        ``renormalised_samples``: probabilities of the ids that were drawn, renormalised to 1 (Gemma 3, arXiv
        2503.19786).
    entropy_T: ``[T]`` fp32, the entropy in nats of the whole distribution; None if it is unknown.
    has_targets_T: ``[T]`` bool, True for tokens that have targets, the slots of the others are empty; None if all have.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor
    kind: SparseKind = "top_p_k"
    entropy_T: Tensor | None = None
    has_targets_T: Tensor | None = None

    @staticmethod
    def from_counts(ids_TK: Tensor, counts_TK: Tensor, entropy_T: Tensor | None = None) -> SparseTargets:
        """Make targets of the kind ``samples`` from counts of draws.

        ids_TK: ``[T, K]`` int64. counts_TK: ``[T, K]``, the number of times that each id was drawn; 0 is an empty slot,
        and every row has at least one draw. entropy_T: as in the class.
        """
        counts_TK = counts_TK.float()
        log_probs_TK = (counts_TK / counts_TK.sum(-1, keepdim=True)).log()
        return SparseTargets(ids_TK, log_probs_TK, "samples", entropy_T)

    @staticmethod
    def from_top_1(ids_T: Tensor, mass: float) -> SparseTargets:
        """Make targets that give a fixed mass to the teacher's best id.

        With tail ``label`` and a mass of 0.9 this is the target of Apple's on-device models (arXiv 2407.21075): 0.9 on
        the teacher's top-1 id, 0.1 on the label.

        ids_T: ``[T]`` int64. mass: in (0, 1].
        """
        ids_TK = ids_T.unsqueeze(1)
        return SparseTargets(ids_TK, ids_TK.float().fill_(math.log(mass)))


Targets = DenseTargets | LogitTargets | SparseTargets


@dataclass(frozen=True)
class MixedTargets:
    """Targets of two teachers: stored ones for tokens that have them, those of a model for all other tokens."""

    stored: SparseTargets
    model: DenseTargets


@dataclass(frozen=True)
class Unreadable:
    """Stand-in for targets that could not be read, with the error. The step is to be refused on every rank."""

    error: Exception


Given = Targets | MixedTargets | None
"""Targets of a teacher for one microbatch; None if it has none for any of its tokens."""
