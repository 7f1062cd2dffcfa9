"""Reading of an output head without a loss: log-probabilities, entropies, the best ids, draws.

Axes: ``T`` tokens, ``R`` rows (tokens of one chunk), ``H`` hidden, ``v`` this rank's slice of the vocabulary ``V``,
``K`` best ids, ``N`` draws, ``n`` ranks.

Shares chunks, statistics and merge with the losses. Makes no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.divergences import column, teacher_entropy
from megakd.losses.kernels.choose import Implementation, kernels_for
from megakd.losses.kernels.protocol import Chunk, DenseTeacher
from megakd.losses.logit_sources import ProductLogits
from megakd.losses.rows import check_shapes
from megakd.losses.sweep import DEFAULT_CHUNK_BYTES
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import Gather, RowStatistics, VocabShard, merge_statistics, pivot
from megakd.splitmix64 import GOLDEN, MULTIPLIERS

_TIES_LOOKED_AT = 32


@dataclass(frozen=True)
class HeadReading:
    """Results of `read_head`: None for those that were not asked for. The same on every rank.

    Values are fp32 (fp64 for fp64 inputs), in nats.

    log_z_T: log-sum-exp of the logits, always there.
    log_prob_T: log-probability of ``ids_T``; 0 where the id is not in the vocabulary.
    entropy_T: entropy of the softmax.
    top_ids_TK, top_log_probs_TK: the K best ids, best first, and their log-probabilities; where logits tie, the smaller
        id comes first.
    drawn_ids_TN, drawn_log_probs_TN: one drawn id for each uniform number, and its log-probability under the softmax.
    drawn_log_proposal_TN: its log-probability under the distribution that it was drawn from.
    """

    log_z_T: Tensor
    log_prob_T: Tensor | None = None
    entropy_T: Tensor | None = None
    top_ids_TK: Tensor | None = None
    top_log_probs_TK: Tensor | None = None
    drawn_ids_TN: Tensor | None = None
    drawn_log_probs_TN: Tensor | None = None
    drawn_log_proposal_TN: Tensor | None = None


@torch.no_grad()
def read_head(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    *,
    shard: VocabShard,
    ids_T: Tensor | None = None,
    entropy: bool = False,
    top_k: int = 0,
    uniforms_TN: Tensor | None = None,
    proposal_exponent: float = 1.0,
    implementation: Implementation = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadReading:
    """Read a head whose vocabulary is split over a group; all its ranks call this with the same tokens.

    hidden_TH, weight_vH: as for ``head.head_loss``.
    ids_T: int64 ids whose log-probabilities are wanted.
    entropy: True to compute the entropies.
    top_k: number of best ids that are wanted, at most the vocabulary's size.
    uniforms_TN: float64 in [0, 1), multiples of 2^-53, the same on every rank. Draws are a function of these numbers
        and the distribution alone.
    proposal_exponent: exponent e of the distribution softmax(e · z) that ids are drawn from, in proportion to this
        power of their probabilities.
    implementation, chunk_bytes: as for ``head.head_loss``.

    Takes one all-gather a chunk for log-probabilities and entropies, one more for best ids, and for draws two
    all-reduces and one of ``[R, N]`` for each bit of an id.
    Raises UsageError for shapes that do not fit.
    """
    num_tokens = hidden_TH.shape[0]
    check_shapes(
        ("hidden_TH", hidden_TH, (num_tokens, weight_vH.shape[-1])),
        ("weight_vH", weight_vH, (shard.num_rows, weight_vH.shape[-1])),
    )
    if ids_T is not None:
        check_shapes(("ids_T", ids_T, (num_tokens,)))
    if uniforms_TN is not None:
        check_shapes(("uniforms_TN", uniforms_TN, (num_tokens, uniforms_TN.shape[-1])))
    if not 0 <= top_k <= shard.vocab_size:
        raise UsageError(f"top_k is {top_k}, expected 0 to the vocabulary's {shard.vocab_size}")
    logits = ProductLogits(hidden_TH.detach(), weight_vH.detach())
    # Sorting holds masks and places beside each logit; drawing holds its mass and a running sum.
    entry_bytes = logits.dtype.itemsize + (16 if top_k else 0) + (26 if uniforms_TN is not None else 0)
    chunk_rows = max(1, chunk_bytes // (logits.width * entry_bytes))
    buffer = logits.buffer(min(chunk_rows, num_tokens))
    chunks = []
    for start in range(0, max(num_tokens, 1), chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_tokens))
        labels_R = torch.full_like(hidden_TH[rows, 0], -1, dtype=torch.int64) if ids_T is None else ids_T[rows].long()
        uniforms_RN = None if uniforms_TN is None else uniforms_TN[rows]
        logits_Rv = logits.logits(rows, buffer)
        chunks.append(
            _read_chunk(logits_Rv, labels_R, entropy, top_k, uniforms_RN, proposal_exponent, shard, implementation)
        )
    parts = {field.name: [getattr(chunk, field.name) for chunk in chunks] for field in fields(HeadReading)}
    joined: dict[str, Any] = {name: None if found[0] is None else torch.cat(found) for name, found in parts.items()}
    whole = HeadReading(**joined)
    return whole if ids_T is not None else replace(whole, log_prob_T=None)


def _read_chunk(
    logits_Rv: Tensor,
    ids_R: Tensor,
    entropy: bool,
    top_k: int,
    uniforms_RN: Tensor | None,
    proposal_exponent: float,
    shard: VocabShard,
    implementation: Implementation,
) -> HeadReading:
    rows = _statistics(logits_Rv, ids_R - shard.start, shard, implementation, entropy=entropy)
    valid_Rv = logits_Rv[:, : shard.num_valid]
    log_sum_R = rows["lm_sum"].log()
    log_z_R = rows["lm_max"] + log_sum_R
    is_id_R = (ids_R >= 0) & (ids_R < shard.vocab_size)
    # (label - max) first: both are large where logits are, and their difference is exact.
    log_prob_R = torch.where(is_id_R, (rows["label"] - rows["lm_max"]) - log_sum_R, 0.0)
    top_ids_RK = top_RK = None
    if top_k:
        top_ids_RK, top_logits_RK = _best(valid_Rv, top_k, shard)
        top_RK = (top_logits_RK.to(log_z_R.dtype) - column(rows["lm_max"])) - column(log_sum_R)
    drawn_ids_RN = drawn_log_probs_RN = drawn_log_proposal_RN = None
    if uniforms_RN is not None:
        drawn_ids_RN, proposal_sum_R = _draw(valid_Rv, rows, uniforms_RN, proposal_exponent, shard)
        below_best_RN = _logits_of(drawn_ids_RN, valid_Rv, shard).to(log_z_R.dtype) - column(rows["lm_max"])
        drawn_log_probs_RN = below_best_RN - column(log_sum_R)
        drawn_log_proposal_RN = drawn_log_probs_RN
        if proposal_exponent != 1:
            drawn_log_proposal_RN = proposal_exponent * below_best_RN - column(proposal_sum_R.log().to(log_z_R.dtype))
    return HeadReading(
        log_z_R,
        log_prob_R,
        teacher_entropy(rows, KDTerm()) if entropy else None,
        top_ids_RK,
        top_RK,
        drawn_ids_RN,
        drawn_log_probs_RN,
        drawn_log_proposal_RN,
    )


def _statistics(
    logits_Rv: Tensor, ids_R: Tensor, shard: VocabShard, implementation: Implementation, *, entropy: bool
) -> RowStatistics:
    """Statistics of whole rows. For entropies, which are a teacher's, the logits are compared with themselves."""
    none_R = logits_Rv.new_zeros(logits_Rv.shape[0], dtype=torch.float32)
    teacher = DenseTeacher(logits_Rv, none_R, KDTerm()) if entropy else None
    chunk = Chunk(logits_Rv, shard.num_valid, ids_R, none_R, teacher=teacher)
    rows = kernels_for(chunk, implementation).statistics(chunk)
    if shard.world_size == 1:
        return rows
    (parts_nkR,) = Gather([rows.values_kR], shard).wait()
    return merge_statistics(rows.columns, parts_nkR, student_temperature=1.0, teacher_temperature=1.0)


def _best(valid_Rv: Tensor, top_k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Ids and logits ``[R, K]`` of the best over all slices, best first; they are among the best of each slice."""
    own_k = min(top_k, shard.num_valid)
    logits_RK, columns_RK = _stable_top(valid_Rv, own_k)
    ids_RK = columns_RK + shard.start
    if shard.world_size == 1:
        return ids_RK, logits_RK
    num_rows = valid_Rv.shape[0]
    missing = top_k - own_k  # a slice may hold fewer than top_k ids
    logits_RK = torch.cat([logits_RK, logits_RK.new_full((num_rows, missing), -torch.inf)], 1)
    ids_RK = torch.cat([ids_RK, ids_RK.new_full((num_rows, missing), shard.vocab_size)], 1)
    wide_RK = logits_RK.to(torch.promote_types(logits_RK.dtype, torch.float32))
    all_logits, all_ids = _gather_columns(wide_RK, shard), _gather_columns(ids_RK, shard)
    # Slices come in the order of their ids, and each is sorted stably; with the fillers last, so is the whole.
    order_RK = (all_ids >= shard.vocab_size).sort(dim=1, stable=True).indices
    all_ids, all_logits = all_ids.gather(1, order_RK), all_logits.gather(1, order_RK)
    chosen_RK = all_logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return all_ids.gather(1, chosen_RK), all_logits.gather(1, chosen_RK)


def _stable_top(values_Rv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns ``[R, k]`` of the k largest, falling, ties by column; of a row with NaN, the first k."""
    values_Rv = torch.where(values_Rv.isnan().any(1, keepdim=True), 0.0, values_Rv)
    # topk may take any of the columns that tie at its edge: fetch more of them, to keep the first
    width = min(k + _TIES_LOOKED_AT, values_Rv.shape[1]) if k else 0
    found = values_Rv.topk(width, 1)
    columns_RK, order_RK = found.indices.sort(1)
    values_RK, order_RK = found.values.gather(1, order_RK).sort(dim=1, descending=True, stable=True)
    columns_RK = columns_RK.gather(1, order_RK)
    chosen_RK, best_RK = columns_RK[:, :k].contiguous(), values_RK[:, :k].contiguous()
    if 0 < width < values_Rv.shape[1]:
        unsure_R = (values_RK[:, -1] == values_RK[:, k - 1]).nonzero().squeeze(1)  # more may tie than were fetched
        if len(unsure_R):
            best_RK[unsure_R], chosen_RK[unsure_R] = _top_among_many_ties(
                values_Rv[unsure_R], best_RK[unsure_R, -1:], k
            )
    return best_RK, chosen_RK


def _top_among_many_ties(values_Rv: Tensor, edge_R1: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest where any number of columns tie with the k-th largest value, ``edge_R1``."""
    above_Rv, at_edge_Rv = values_Rv > edge_R1, values_Rv == edge_R1
    room_R1 = k - above_Rv.sum(1, keepdim=True)
    chosen_Rv = above_Rv | (at_edge_Rv & (at_edge_Rv.cumsum(1) <= room_R1))
    columns_RK = chosen_Rv.nonzero()[:, 1].view(-1, k)
    values_RK, order_RK = values_Rv.gather(1, columns_RK).sort(dim=1, descending=True, stable=True)
    return values_RK, columns_RK.gather(1, order_RK)


def _draw(
    valid_Rv: Tensor, rows: RowStatistics, uniforms_RN: Tensor, exponent: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Draw one id for each uniform number.

    Returns the ids, int64 ``[R, N]``, and the sum of exp(exponent · (logit - largest logit)), float64 ``[R]``.

    The vocabulary is halved again and again until one id is left; each half is taken in proportion to its mass, by a
    number derived from the uniform number and the level. A relative error e in the masses thus changes a draw with a
    chance of about e · log2(V). With the inverse of the cumulative distribution it would be e · V, for every step of
    that function moves.
    """
    lm_max_R = pivot(rows["lm_max"]).to(torch.promote_types(valid_Rv.dtype, torch.float32))
    mass_Rv = valid_Rv - column(lm_max_R)
    mass_Rv = (mass_Rv if exponent == 1 else mass_Rv.mul_(exponent)).exp_()
    below_Rv = mass_Rv.new_zeros((len(mass_Rv), shard.num_valid + 1), dtype=torch.float64)  # each id: the mass before
    torch.cumsum(mass_Rv, 1, dtype=torch.float64, out=below_Rv[:, 1:])
    total_R = below_Rv[:, -1].clone()
    first_RN = torch.zeros(uniforms_RN.shape, dtype=torch.int64, device=uniforms_RN.device)
    from_RN, to_RN = torch.zeros_like(first_RN, dtype=torch.float64), below_Rv[:, -1:].expand(first_RN.shape)
    if shard.world_size > 1:
        dist.all_reduce(total_R, group=shard.group)
    seeds_RN = (uniforms_RN.double() * 2.0**53).long()
    for level in reversed(range((shard.vocab_size - 1).bit_length())):
        middle_RN = first_RN + (1 << level)
        at_RN = below_Rv.gather(1, (middle_RN - shard.start).clamp(0, shard.num_valid))
        halves_2RN = torch.stack([at_RN - from_RN, to_RN - at_RN])
        if shard.world_size > 1:
            dist.all_reduce(halves_2RN, group=shard.group)
        upper_RN = _uniform(seeds_RN, level) * halves_2RN.sum(0) >= halves_2RN[0]
        first_RN = torch.where(upper_RN, middle_RN, first_RN)
        from_RN, to_RN = torch.where(upper_RN, at_RN, from_RN), torch.where(upper_RN, to_RN, at_RN)
    return first_RN.clamp_(max=shard.vocab_size - 1), total_R


def _uniform(seeds_RN: Tensor, stream: int) -> Tensor:
    """float64 in [0, 1), a number for each seed and stream: ``splitmix64.mix64`` in int64, which wraps alike."""
    value = seeds_RN + _signed((stream + 1) * GOLDEN)
    value = (value ^ _shifted(value, 30)) * _signed(MULTIPLIERS[0])
    value = (value ^ _shifted(value, 27)) * _signed(MULTIPLIERS[1])
    return _shifted(value ^ _shifted(value, 31), 11).double() * 2.0**-53


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right by some bits, with zeros from the left."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return (bits + (1 << 63)) % (1 << 64) - (1 << 63)


def _logits_of(ids_RN: Tensor, valid_Rv: Tensor, shard: VocabShard) -> Tensor:
    """Logits ``[R, N]`` of ids, each from the rank that holds it."""
    if shard.world_size == 1:
        return valid_Rv.gather(1, ids_RN)
    columns_RN = ids_RN - shard.start
    mine_RN = (columns_RN >= 0) & (columns_RN < shard.num_valid)
    wide = torch.promote_types(valid_Rv.dtype, torch.float32)
    logits_RN = torch.full(ids_RN.shape, -torch.inf, dtype=wide, device=valid_Rv.device)
    if shard.num_valid:
        own_RN = valid_Rv.gather(1, columns_RN.clamp(0, shard.num_valid - 1)).to(logits_RN.dtype)
        logits_RN = torch.where(mine_RN, own_RN, logits_RN)
    dist.all_reduce(logits_RN, op=dist.ReduceOp.MAX, group=shard.group)
    return logits_RN


def _gather_columns(own_RK: Tensor, shard: VocabShard) -> Tensor:
    """Gather the columns of every rank in rank order: ``[R, n · K]``."""
    if shard.world_size == 1:
        return own_RK
    gathered = own_RK.new_empty(shard.world_size * own_RK.shape[1], own_RK.shape[0])
    dist.all_gather_into_tensor(gathered, own_RK.t().contiguous(), group=shard.group)
    return gathered.t()
