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
from megakd.targets import DenseTargets, Given, MixedTargets, SparseTargets


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


def tokens_with_targets(targets: Given, mask_T: Tensor) -> Tensor:
    """bool ``[T]``: the tokens of the mask that the teacher says anything about."""
    if targets is None:
        return torch.zeros_like(mask_T)
    if isinstance(targets, SparseTargets) and targets.has_targets_T is not None:
        return mask_T & targets.has_targets_T
    return mask_T


@torch.no_grad()
def apply_gates(
    gates: Gates,
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    targets: Given,
    *,
    shard: VocabShard,
    chunk_bytes: int,
) -> Gated:
    """Read the heads where a gate needs them: the teacher's once, the student's for Rho-1. Entropies are those at
    temperature 1; stored ones where they are. Tokens without targets get no KD and do not count in the gate's share.

    A token whose excess loss or entropy is NaN passes every gate, so that the step is refused for it.

    Raises UsageError for sparse targets that lack what a gate needs.
    """
    told_T = tokens_with_targets(targets, mask_T)
    if not gates.closed or targets is None:
        return Gated(mask_T, told_T)
    stored, model = (targets.stored, targets.model) if isinstance(targets, MixedTargets) else (targets, targets)
    rows_R = mask_T.nonzero().squeeze(1)
    kept_R = torch.ones_like(rows_R, dtype=torch.bool)
    entropy_R = None
    if isinstance(model, DenseTargets):
        with_labels = gates.rho_keep < 1
        labels_R = labels_T[rows_R] if with_labels else None
        teacher = read_head(
            model.hidden_TH[rows_R],
            model.weight_vH,
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
    elif gates.rho_keep < 1:
        raise UsageError("--rho-keep needs the teacher's loss on every label: a model as teacher")
    kd_R = kept_R & told_T[rows_R]
    if gates.entropy_gate > 0:
        if stored is not model or entropy_R is None:
            entropy_R = _stored_entropy(stored, rows_R, entropy_R)
        kd_R = kd_R & ~_lowest(entropy_R, kd_R, gates.entropy_gate)
    return Gated(*(torch.zeros_like(mask_T).index_copy_(0, rows_R, flags_R) for flags_R in (kept_R, kd_R)))


def _stored_entropy(targets: Given, rows_R: Tensor, others_R: Tensor | None) -> Tensor:
    """What targets bring; where they bring nothing about a token, the model's."""
    if not isinstance(targets, SparseTargets) or targets.entropy_T is None:
        raise UsageError("--kd-entropy-gate needs targets that bring the teacher's entropies, or a model as teacher")
    entropy_R = targets.entropy_T[rows_R]
    if others_R is None or targets.has_targets_T is None:
        return entropy_R
    return torch.where(targets.has_targets_T[rows_R], entropy_R, others_R)


def _lowest(values_R: Tensor, among_R: Tensor, share: float) -> Tensor:
    """The tokens with the smallest values, ``share`` of those in ``among_R``; the earlier of two that tie. NaN is the
    largest of all."""
    ranked_R = torch.where(among_R, values_R, torch.inf).argsort(stable=True)
    rank_R = torch.empty_like(ranked_R).scatter_(0, ranked_R, torch.arange(len(ranked_R), device=ranked_R.device))
    return among_R & (rank_R < (among_R.sum().double() * share).round())
