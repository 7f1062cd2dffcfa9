"""Gates: tokens left out of the loss or of KD, chosen before the sweep by the losses and entropies of both heads.

Axes: T flattened tokens of one microbatch on this rank, R those that the loss mask keeps, H hidden, v this rank's slice
of the vocabulary.

Tokens are ranked within one microbatch of this rank, without communication. So the choice depends on the sizes of a
microbatch and of the context-parallel group, but not on how vocabulary, layers and data are split. Masked tokens are
never read and never count in a share.
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

    rho_keep: share that is trained on, with the largest excess loss: the student's LM loss less the teacher's (Rho-1,
        arXiv 2404.07965). The other tokens are treated as masked. 1 keeps all.
    entropy_gate: share of the tokens trained on, those with the lowest teacher entropy, that gets no KD (arXiv
        2509.01649). 0 leaves none out.
    """

    rho_keep: float = 1.0
    entropy_gate: float = 0.0

    @property
    def closed(self) -> bool:
        """True if any token may be left out."""
        return self.rho_keep < 1 or self.entropy_gate > 0


@dataclass(frozen=True)
class Gated:
    """Tokens that are trained on, and those of them that get KD; bool ``[T]`` each."""

    kept_T: Tensor
    kd_T: Tensor


def tokens_with_targets(targets: Given, mask_T: Tensor) -> Tensor:
    """Return the tokens of the mask that the teacher has targets for, bool ``[T]``."""
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
    """Apply the gates, reading the heads if they need it: the teacher's once, the student's for Rho-1.

    Entropies are at temperature 1; stored ones are used if there are any. Tokens without targets get no KD and do not
    count in the entropy gate's share.

    A token whose excess loss or entropy is NaN passes every gate, so that the step is refused for it.

    Raises UsageError for sparse targets that lack what a gate needs.
    """
    with_targets_T = tokens_with_targets(targets, mask_T)
    if not gates.closed or targets is None:
        return Gated(mask_T, with_targets_T)
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
    kd_R = kept_R & with_targets_T[rows_R]
    if gates.entropy_gate > 0:
        if stored is not model or entropy_R is None:
            entropy_R = _stored_entropy(stored, rows_R, entropy_R)
        kd_R = kd_R & ~_lowest(entropy_R, kd_R, gates.entropy_gate)
    return Gated(*(torch.zeros_like(mask_T).index_copy_(0, rows_R, flags_R) for flags_R in (kept_R, kd_R)))


def _stored_entropy(targets: Given, rows_R: Tensor, model_R: Tensor | None) -> Tensor:
    """Return the stored entropies ``[R]``; for tokens without stored targets, those of the model in ``model_R``."""
    if not isinstance(targets, SparseTargets) or targets.entropy_T is None:
        raise UsageError("--kd-entropy-gate needs targets that bring the teacher's entropies, or a model as teacher")
    entropy_R = targets.entropy_T[rows_R]
    if model_R is None or targets.has_targets_T is None:
        return entropy_R
    return torch.where(targets.has_targets_T[rows_R], entropy_R, model_R)


def _lowest(values_R: Tensor, among_R: Tensor, share: float) -> Tensor:
    """Return the tokens with the smallest values, ``share`` of those in ``among_R``, bool ``[R]``.

    Of equal values the earlier counts as smaller; NaN is larger than any number.
    """
    ranked_R = torch.where(among_R, values_R, torch.inf).argsort(stable=True)
    rank_R = torch.empty_like(ranked_R).scatter_(0, ranked_R, torch.arange(len(ranked_R), device=ranked_R.device))
    return among_R & (rank_R < (among_R.sum().double() * share).round())
