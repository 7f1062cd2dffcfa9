"""Rows of a sweep: the tokens that carry weight, with their labels, terms and checks, and the values that come back.

Axes: ``T`` tokens, ``R`` rows (the tokens that carry weight), ``K`` listed ids, ``v`` this rank's slice of the
vocabulary ``V``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.logit_sources import GivenLogits, Logits, ProductLogits
from megakd.losses.sparse import Buckets
from megakd.losses.sweep import SweepRows, Swept, SweptTerm
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import VocabShard
from megakd.targets import DenseTargets, LogitTargets, SparseTargets, Targets


@dataclass(frozen=True)
class KD:
    """One distillation term: the comparison, its targets, and the weight of each token, ``[T]``."""

    term: KDTerm
    targets: Targets
    weight_T: Tensor


@dataclass(frozen=True)
class KDOutput:
    """Values of one term for ``T`` tokens, detached; 0 for tokens that were not computed.

    value_T: the divergence, temperature² included, fp32 (fp64 for fp64 inputs), nats.
    agree_T: bool, True if student and teacher have the same top-1 id (any shared one, where logits tie); for sampled
        targets the teacher's is the id that was drawn most.
    entropy_T: the teacher's entropy in nats after its temperature; for sparse targets their own ``entropy_T``, or None.
    """

    value_T: Tensor
    agree_T: Tensor
    entropy_T: Tensor | None


@dataclass(frozen=True)
class HeadOutput:
    """Loss over ``T`` tokens and values per token, which are detached, fp32 (fp64 for fp64 inputs), in nats.

    loss: scalar, sum over tokens of lm_weight · lm + z_weight · log_z² + each term's weight · value; differentiable.
    lm_T: cross-entropy with the label; 0 where the token was not computed or the label is no vocabulary id.
    log_z_T: log-sum-exp of the student's logits; 0 where the token was not computed.
    kd: one entry for each term, in the order of the terms.
    """

    loss: Tensor
    lm_T: Tensor
    log_z_T: Tensor
    kd: tuple[KDOutput, ...]


@dataclass(frozen=True)
class Select:
    """Selection of the tokens that carry weight, out of ``[T, ...]`` and back among zeros; no copies if all do."""

    rows_R: Tensor
    num_tokens: int

    @staticmethod
    def of(num_tokens: int, lm_weight_T: Tensor, z_weight_T: Tensor | None, kd: Sequence[KD]) -> Select:
        """Select the tokens of which any weight is not 0. Raises UsageError for weights that are not ``[T]``."""
        weights = _weights(num_tokens, lm_weight_T, z_weight_T, kd)
        keep_T = torch.stack([weight_T != 0 for weight_T in weights]).any(0)
        return Select(keep_T.nonzero().squeeze(1), num_tokens)

    @staticmethod
    def all_of(num_tokens: int, lm_weight_T: Tensor, z_weight_T: Tensor | None, kd: Sequence[KD]) -> Select:
        """Select every token, for a caller who knows what `of` would find; `of` waits for the device to tell it."""
        _weights(num_tokens, lm_weight_T, z_weight_T, kd)
        return Select(torch.arange(num_tokens, device=lm_weight_T.device), num_tokens)

    @property
    def everything(self) -> bool:
        return self.rows_R.shape[0] == self.num_tokens

    def __call__(self, values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        return values_T if self.everything else values_T.index_select(0, self.rows_R)

    def put(self, values_R: Tensor) -> Tensor:
        if self.everything:
            return values_R
        return values_R.new_zeros(self.num_tokens, *values_R.shape[1:]).index_copy_(0, self.rows_R, values_R)

    def clear_others(self, values_T: Tensor) -> None:
        """Set the values of tokens without weight to 0, in place."""
        is_dropped_T = torch.ones(self.num_tokens, dtype=torch.bool, device=values_T.device)
        is_dropped_T[self.rows_R] = False
        values_T[is_dropped_T] = 0


def _weights(num_tokens: int, lm_weight_T: Tensor, z_weight_T: Tensor | None, kd: Sequence[KD]) -> list[Tensor]:
    """List the weights that a token may carry. Raises UsageError for weights that are not ``[T]``."""
    weights = [("lm_weight_T", lm_weight_T)] + [("KD.weight_T", entry.weight_T) for entry in kd]
    if z_weight_T is not None:
        weights.append(("z_weight_T", z_weight_T))
    check_shapes(*((name, weight_T, (num_tokens,)) for name, weight_T in weights))
    return [weight_T for _, weight_T in weights]


def make_rows(
    select: Select,
    labels_T: Tensor,
    lm_weight_T: Tensor,
    z_weight_T: Tensor | None,
    kd: Sequence[KD],
    shard: VocabShard,
) -> SweepRows:
    """Make the sweep's rows from the arguments of a loss, all ``[T]``.

    Raises UsageError for targets that do not fit their term or the shard, and, on CPU, for a label that is used and is
    no vocabulary id.
    """
    labels_R, lm_weight_R = select(labels_T).long(), select(lm_weight_T)
    _check_labels(labels_R, lm_weight_R, kd, select, shard.vocab_size)
    return SweepRows(
        labels_R,
        lm_weight_R,
        None if z_weight_T is None else select(z_weight_T),
        [SweptTerm(entry.term, select(entry.weight_T), _teacher(entry, select, labels_R, shard)) for entry in kd],
    )


def _teacher(kd: KD, select: Select, labels_R: Tensor, shard: VocabShard) -> Logits | Buckets:
    targets = kd.targets
    kd.term.check(targets.kind if isinstance(targets, SparseTargets) else "dense")
    if isinstance(targets, DenseTargets):
        check_shapes(
            ("targets.hidden_TH", targets.hidden_TH, (select.num_tokens, targets.weight_vH.shape[-1])),
            ("targets.weight_vH", targets.weight_vH, (shard.num_rows, targets.weight_vH.shape[-1])),
        )
        return ProductLogits(select(targets.hidden_TH), targets.weight_vH.detach())
    if isinstance(targets, LogitTargets):
        check_shapes(("targets.logits_Tv", targets.logits_Tv, (select.num_tokens, shard.num_rows)))
        return GivenLogits(targets.logits_Tv.detach(), None if select.everything else select.rows_R)
    size = (select.num_tokens, targets.ids_TK.shape[-1])
    if size[1] == 0:
        raise UsageError("sparse targets list no ids: ids_TK has shape [T, 0], expected at least one slot")
    check_shapes(("targets.ids_TK", targets.ids_TK, size), ("targets.log_probs_TK", targets.log_probs_TK, size))
    chosen = replace(targets, ids_TK=select(targets.ids_TK), log_probs_TK=select(targets.log_probs_TK))
    _check_ids(chosen, shard.vocab_size)
    return Buckets.of(chosen, labels_R, kd.term, shard.vocab_size)


def head_output(swept: Swept, rows: SweepRows, kd: Sequence[KD], select: Select, vocab_size: int) -> HeadOutput:
    """The loss and the values of all tokens, from the results of the sweep."""
    lm = swept.lm
    is_id_R = (rows.labels_R >= 0) & (rows.labels_R < vocab_size)
    # (max - label) first: both are large where logits are, and their difference is exact.
    lm_R = (lm["lm_max"] - lm["label"]) + lm["lm_sum"].log()
    log_z_R = lm["lm_max"] + lm["lm_sum"].log()
    loss = _weighted_sum(rows.lm_weight_R, torch.where(is_id_R, lm_R, torch.nan))
    if rows.z_weight_R is not None:
        loss = loss + _weighted_sum(rows.z_weight_R, log_z_R.square())
    outputs = []
    for entry, term, result in zip(kd, rows.terms, swept.terms):
        value_R = torch.where(is_id_R, result.value_R, torch.nan) if entry.term.needs_label else result.value_R
        loss = loss + _weighted_sum(term.weight_R, value_R)
        entropy_T = entry.targets.entropy_T if isinstance(entry.targets, SparseTargets) else None
        if result.entropy_R is not None:
            entropy_T = select.put(result.entropy_R)
        outputs.append(KDOutput(select.put(value_R), select.put(result.agree_R), entropy_T))
    return HeadOutput(loss, select.put(torch.where(is_id_R, lm_R, 0.0)), select.put(log_z_R), tuple(outputs))


def _weighted_sum(weight_R: Tensor, value_R: Tensor) -> Tensor:
    """sum of weight · value, where a value of weight 0 adds nothing, not even NaN."""
    return torch.where(weight_R == 0, 0.0, weight_R.to(value_R.dtype) * value_R).sum()


def check_shapes(*expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    """Raise UsageError for the first tensor that does not have its shape."""
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _check_labels(labels_R: Tensor, lm_weight_R: Tensor, kd: Sequence[KD], select: Select, vocab_size: int) -> None:
    """Raise UsageError, on CPU, for a label that is used and is no vocabulary id."""
    if labels_R.device.type != "cpu":
        return  # head_output makes the loss NaN
    used_R = lm_weight_R != 0
    for entry in kd:
        if entry.term.needs_label:
            used_R = used_R | (select(entry.weight_T) != 0)
    wrong_R = ((labels_R < 0) | (labels_R >= vocab_size)) & used_R
    if wrong_R.any():
        label = int(labels_R[wrong_R][0])
        raise UsageError(
            f"label {label} carries a weight but is no id of the vocabulary of {vocab_size}: "
            "was the data preprocessed with another tokenizer?"
        )


def _check_ids(targets: SparseTargets, vocab_size: int) -> None:
    """Raise UsageError, on CPU, for listed ids outside the vocabulary or listed twice in a row.

    On other devices an id outside the vocabulary makes the loss NaN.
    """
    if targets.ids_TK.device.type != "cpu" or targets.ids_TK.numel() == 0:
        return
    ids_RK = torch.where(targets.log_probs_TK == -torch.inf, -1, targets.ids_TK.long())
    wrong_RK = (targets.log_probs_TK != -torch.inf) & ((ids_RK < 0) | (ids_RK >= vocab_size))
    if wrong_RK.any():
        raise UsageError(
            f"sparse targets list id {int(ids_RK[wrong_RK][0])}, which is none of the vocabulary of {vocab_size}"
        )
    sorted_RK = ids_RK.sort(1).values
    twice_RK = (sorted_RK[:, 1:] == sorted_RK[:, :-1]) & (sorted_RK[:, 1:] >= 0)
    if twice_RK.any():
        row = int(twice_RK.any(1).nonzero()[0])
        raise UsageError(f"sparse targets list id {int(sorted_RK[row, 1:][twice_RK[row]][0])} twice for one token")
