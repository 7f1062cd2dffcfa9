"""Which tokens a gate leaves out, decided before the sweep from what both heads say about the labels.

Axes: T flattened tokens of one microbatch on this rank, R those that the loss mask keeps, H hidden, v this rank's slice
of the vocabulary.

Tokens are ranked within one microbatch of this rank, without communication: so the size of a microbatch and of the
context-parallel group change which tokens are taken; how vocabulary, layers and data are split does not. Masked tokens
are never read and never count in a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.read import read_head
from megakd.losses.vocab_parallel import VocabShard
from megakd.targets import DenseTargets, SparseTargets, Targets


@dataclass(frozen=True)
class Gates:
    """Shares of a microbatch's tokens, rounded to whole tokens.

    rho_keep: trained on are those with the largest excess loss, the student's LM loss less the teacher's (Rho-1, arXiv
        2404.07965); the others are as if masked. 1 keeps all.
    entropy_gate: of the tokens that are trained on, those with the lowest teacher entropy get no KD (arXiv
        2509.01649). 0 takes it from none.
    """

    rho_keep: float = 1.0
    entropy_gate: float = 0.0

    @property
    def closed(self) -> bool:
        """Whether any token may be left out."""
        return self.rho_keep < 1 or self.entropy_gate > 0


@dataclass(frozen=True)
class Gated:
    """bool ``[T]``: the tokens that are trained on, and those of them that get KD."""

    kept_T: Tensor
    kd_T: Tensor


@torch.no_grad()
def apply_gates(
    gates: Gates,
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    targets: Targets,
    *,
    shard: VocabShard,
    chunk_bytes: int,
) -> Gated:
    """Read the heads where a gate needs them: the teacher's once, the student's for Rho-1. Entropies are those at
    temperature 1.

    A token whose excess loss or entropy is NaN passes every gate, so that the step is refused for it.

    Raises UsageError for sparse targets that lack what a gate needs.
    """
    if not gates.closed:
        return Gated(mask_T, mask_T)
    rows_R = mask_T.nonzero().squeeze(1)
    kept_R = torch.ones_like(rows_R, dtype=torch.bool)
    if isinstance(targets, DenseTargets):
        with_labels = gates.rho_keep < 1
        labels_R = labels_T[rows_R] if with_labels else None
        teacher = read_head(
            targets.hidden_TH[rows_R],
            targets.weight_vH,
            shard=shard,
            ids_T=labels_R,
            entropy=gates.entropy_gate > 0,
            chunk_bytes=chunk_bytes,
        )
        entropy_R = teacher.entropy_T
        if with_labels:
            student = read_head(hidden_TH[rows_R], weight_vH, shard=shard, ids_T=labels_R, chunk_bytes=chunk_bytes)
            assert student.log_prob_T is not None and teacher.log_prob_T is not None
            kept_R = ~_lowest(teacher.log_prob_T - student.log_prob_T, kept_R, 1 - gates.rho_keep)
    else:
        entropy_R = _known_entropy(gates, targets)[rows_R]
    kd_R = kept_R
    if entropy_R is not None and gates.entropy_gate > 0:
        kd_R = kept_R & ~_lowest(entropy_R, kept_R, gates.entropy_gate)
    return Gated(*(torch.zeros_like(mask_T).index_copy_(0, rows_R, flags_R) for flags_R in (kept_R, kd_R)))


def _known_entropy(gates: Gates, targets: Targets) -> Tensor:
    if gates.rho_keep < 1:
        raise UsageError("--rho-keep needs the teacher's loss on every label: a model as teacher")
    if not isinstance(targets, SparseTargets) or targets.entropy_T is None:
        raise UsageError("--kd-entropy-gate needs targets that bring the teacher's entropies, or a model as teacher")
    return targets.entropy_T


def _lowest(values_R: Tensor, among_R: Tensor, share: float) -> Tensor:
    """The tokens with the smallest values, ``share`` of those in ``among_R``; the earlier of two that tie. NaN is the
    largest of all."""
    ranked_R = torch.where(among_R, values_R, torch.inf).argsort(stable=True)
    rank_R = torch.empty_like(ranked_R).scatter_(0, ranked_R, torch.arange(len(ranked_R), device=ranked_R.device))
    return among_R & (rank_R < (among_R.sum().double() * share).round())
