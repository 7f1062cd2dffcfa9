"""Figures of a report: two passes over scores that stay on disk, in memory that does not grow with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megakd.errors import UsageError
from megakd.pipeline.report.scoring import OTHER, REFERENCE, SCORE, TEACHER, Block, Scoring
from megakd.splitmix64 import GOLDEN, mix64

SAMPLE_TOKENS, DOCUMENT_TOKENS = "scored tokens of the sample", "tokens of the document it starts in"
_IMAGE_BITS = 20
_TAIL = 0.001  # the share of samples at either end that shares one bin


@dataclass
class Amounts:
    """Samples and tokens of some groups, all and kept; each ``[num_groups]`` int64."""

    samples: NDArray[np.int64]
    tokens: NDArray[np.int64]
    kept: NDArray[np.int64]
    kept_tokens: NDArray[np.int64]

    @staticmethod
    def zeros(num_groups: int) -> Amounts:
        """Amounts to add to."""
        return Amounts(*(np.zeros(num_groups, np.int64) for _ in range(4)))

    def add(self, group: NDArray[np.int64], tokens: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Count samples. group, tokens, kept ``[n]``: the group of each, its scored tokens, whether it is kept."""
        size = len(self.samples)
        for ours, members, weights in (
            (self.samples, group, None),
            (self.tokens, group, tokens),
            (self.kept, group[kept], None),
            (self.kept_tokens, group[kept], tokens[kept]),
        ):
            ours += np.bincount(members, weights, size).astype(np.int64)  # exact: a block's sum is far below 2^53


@dataclass
class Column:
    """Sums of one column (fp64), its range, and counts of the first 20 bits of its floats, from the first pass."""

    total: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << _IMAGE_BITS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of a block."""
        if len(values):
            self.total += float(values.sum(dtype=np.float64))
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.counts += np.bincount(images(values), minlength=1 << _IMAGE_BITS)

    def edges(self, bins: int) -> NDArray[np.float64]:
        """``bins`` + 1 ascending edges: even ones between the tails, a bin for each tail; fewer if all is one value."""
        before = np.cumsum(self.counts)
        first, last = (int(np.searchsorted(before, share * before[-1])) for share in (_TAIL, 1 - _TAIL))
        low, high = np.fmin(np.fmax(float_of(np.array([first, last + 1])), self.low), self.high).tolist()
        edges = np.unique(np.array([self.low, *np.linspace(low, high, bins - 1).tolist(), self.high]))
        return edges if len(edges) > 1 else np.array([self.low - 0.5, self.low + 0.5])

    def ranks(self) -> NDArray[np.float64]:
        """``[2^20]``: for each first 20 bits, the mean rank of the samples with them, less the mean rank of all."""
        ranks: NDArray[np.float64] = np.cumsum(self.counts) - (self.counts + 1) / 2 - (self.counts.sum() - 1) / 2
        return ranks


@dataclass
class Least:
    """The rows with the least keys of all that were offered; ties go to the lower id."""

    room: int
    keys: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def offer(self, keys: NDArray[np.float64], ids: NDArray[np.int64]) -> None:
        """Take up the rows of a block that are among the least. ids: ascending, above those of earlier blocks."""
        if not self.room:
            return
        if len(self.keys) == self.room:
            better = keys < self.keys[-1]  # ids ascend: an equal key comes too late
            keys, ids = keys[better], ids[better]
        keys, ids = np.concatenate((self.keys, keys)), np.concatenate((self.ids, ids))
        order = np.lexsort((ids, keys))[: self.room]
        self.keys, self.ids = keys[order], ids[order]


@dataclass(frozen=True)
class Figures:
    """All numbers of a report."""

    num_candidates: int
    num_tokens: int
    num_kept: int
    score_edges: NDArray[np.float64]
    scores: Amounts
    nll_edges: NDArray[np.float64]
    """Edges of the bins of both axes."""
    nll: NDArray[np.int64]
    """``[bins, bins]``: counts by the NLL of the teacher and of the reference."""
    nll_kept: NDArray[np.int64]
    domains: dict[str, int]
    """Name -> place in ``by_domain``."""
    by_domain: Amounts
    domain_score_sums: NDArray[np.float64]
    by_length: dict[str, Amounts]
    """Kind of length -> amounts; group g holds lengths from 2^g to below 2^(g + 1)."""
    correlations: list[tuple[str, str, float, float]]
    """Names of two columns, with Pearson's and Spearman's correlation of them."""
    decisions: NDArray[np.int64] | None
    """``[2, 2]``: counts by the first scoring (drops, keeps) and the second; None without a second one."""
    extremes: dict[str, NDArray[np.int64]]
    """Ids of the samples with the largest and with the smallest scores, the outermost first."""
    drawn: dict[str, NDArray[np.int64]]
    """Ids drawn at random from all candidates and from the kept ones."""


def count(scoring: Scoring, *, bins: int, num_extremes: int, num_drawn: int) -> Figures:
    """Read all scores twice. Raises CorruptError for scores that are not finite, UsageError if no sample has one."""
    columns, candidates, num_tokens = _survey(scoring)
    if not candidates:
        raise UsageError(f"{scoring.source.any_scores.folder}: no sample with anything scored is left to report on")
    names = list(columns)
    score_edges = columns[SCORE].edges(bins)
    both = Column(
        low=min(columns[TEACHER].low, columns[REFERENCE].low),
        high=max(columns[TEACHER].high, columns[REFERENCE].high),
        counts=columns[TEACHER].counts + columns[REFERENCE].counts,
    )
    nll_edges = both.edges(bins)
    size = len(nll_edges) - 1
    nll, nll_kept = np.zeros(size * size, np.int64), np.zeros(size * size, np.int64)
    means = {name: column.total / candidates for name, column in columns.items()}
    ranks = {name: column.ranks() for name, column in columns.items()}
    products, rank_products = (np.zeros((len(names), len(names))) for _ in range(2))
    domains = {name: index for index, name in enumerate(dict.fromkeys(within.domain for within in scoring.ranges))}
    range_ends = np.array([within.end for within in scoring.ranges])
    range_domains = np.array([domains[within.domain] for within in scoring.ranges])
    by_domain, domain_score_sums = Amounts.zeros(len(domains)), np.zeros(len(domains))
    by_score = Amounts.zeros(len(score_edges) - 1)
    by_length = {SAMPLE_TOKENS: Amounts.zeros(64)}
    if scoring.source.samples is not None:
        by_length[DOCUMENT_TOKENS] = Amounts.zeros(64)
    largest, smallest = Least(num_extremes), Least(num_extremes)
    drawn = {"all": Least(num_drawn), "kept": Least(num_drawn)}
    drawing_key = np.uint64((scoring.seed * 2 + 1) * GOLDEN & (1 << 64) - 1)
    decisions = np.zeros((2, 2), np.int64)
    by_ratio = scoring.threshold(candidates) if scoring.selection is None or OTHER in columns else None
    by_other = scoring.threshold(candidates, OTHER) if OTHER in columns else None

    for block in scoring.blocks():
        scores = block.columns[SCORE]
        kept = scoring.kept(block, by_ratio if scoring.selection is None else None)
        by_score.add(_bins(score_edges, scores), block.tokens, kept)
        cell = _bins(nll_edges, block.columns[TEACHER]) * size + _bins(nll_edges, block.columns[REFERENCE])
        nll += np.bincount(cell, minlength=size * size)
        nll_kept += np.bincount(cell[kept], minlength=size * size)
        domain = range_domains[np.searchsorted(range_ends, block.ids, side="right")]
        by_domain.add(domain, block.tokens, kept)
        domain_score_sums += np.bincount(domain, scores, len(domains))
        by_length[SAMPLE_TOKENS].add(_log2(block.tokens), block.tokens, kept)
        if DOCUMENT_TOKENS in by_length:
            by_length[DOCUMENT_TOKENS].add(_log2(_document_tokens(scoring, block)), block.tokens, kept)
        _add_products(products, [block.columns[name].astype(np.float64) - means[name] for name in names])
        _add_products(rank_products, [ranks[name][images(block.columns[name])] for name in names])
        if by_other is not None:
            mine, others = scoring.kept(block, by_ratio), scoring.kept(block, by_other, OTHER)
            decisions += np.bincount(mine * 2 + others, minlength=4).reshape(2, 2)
        largest.offer(-scores.astype(np.float64), block.ids)
        smallest.offer(scores.astype(np.float64), block.ids)
        if num_drawn:
            lots = mix64(block.ids.astype(np.uint64) + drawing_key).astype(np.float64)
            drawn["all"].offer(lots, block.ids)
            drawn["kept"].offer(lots[kept], block.ids[kept])

    return Figures(
        num_candidates=candidates,
        num_tokens=num_tokens,
        num_kept=int(by_score.kept.sum()),
        score_edges=score_edges,
        scores=by_score,
        nll_edges=nll_edges,
        nll=nll.reshape(size, size),
        nll_kept=nll_kept.reshape(size, size),
        domains=domains,
        by_domain=by_domain,
        domain_score_sums=domain_score_sums,
        by_length=by_length,
        correlations=[
            (names[i], names[j], _correlation(products, i, j), _correlation(rank_products, i, j))
            for i, j in itertools.combinations(range(len(names)), 2)
        ],
        decisions=decisions if by_other is not None else None,
        extremes={"largest": largest.ids, "smallest": smallest.ids},
        drawn={name: least.ids for name, least in drawn.items()},
    )


def images(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The first 20 bits of the order-preserving image of fp32 values; -0 is 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(32 - _IMAGE_BITS)


def float_of(image: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least float of an image; NaN or infinite beyond the finite ones."""
    bits = (np.asarray(image, np.int64) << (32 - _IMAGE_BITS)).astype(np.uint32)
    return np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits).view(np.float32).astype(np.float64)


def _survey(scoring: Scoring) -> tuple[dict[str, Column], int, int]:
    columns: dict[str, Column] = {TEACHER: Column(), REFERENCE: Column()}
    columns |= {name: Column() for name in scoring.keys}
    candidates = tokens = 0
    for block in scoring.blocks():
        candidates, tokens = candidates + len(block.ids), tokens + int(block.tokens.sum())
        for name, values in block.columns.items():
            columns[name].add(values)
    return columns, candidates, tokens


def _bins(edges: NDArray[np.float64], values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each value: from its edge to below the next, the last edge in the last bin."""
    found = np.searchsorted(edges, values.astype(np.float64), side="right") - 1
    return np.minimum(found, len(edges) - 2)


def _log2(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """floor(log2) of lengths of at least 1."""
    return np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - 1


def _document_tokens(scoring: Scoring, block: Block) -> NDArray[np.int64]:
    """Tokens of the document that each sample's first token is in."""
    samples = scoring.source.samples
    assert samples is not None
    dataset, size = samples.dataset, samples.dataset.dtype.itemsize
    sequence = np.searchsorted(dataset.pointers, samples.starts(block.ids) * size, side="right") - 1
    document = np.searchsorted(dataset.document_indices, sequence, side="right") - 1
    first, stop = dataset.document_indices[document], dataset.document_indices[document + 1]
    inside = np.minimum(stop, len(dataset) - 1)
    ends = np.where(stop < len(dataset), dataset.pointers[inside] // size, dataset.num_tokens)
    return np.asarray(ends - dataset.pointers[first] // size, np.int64)


def _add_products(sums: NDArray[np.float64], rows: Sequence[NDArray[np.float64]]) -> None:
    for i, j in itertools.combinations_with_replacement(range(len(rows)), 2):
        sums[i, j] += np.sum(rows[i] * rows[j])  # not a dot product, whose bits depend on the number of threads


def _correlation(sums: NDArray[np.float64], i: int, j: int) -> float:
    spread = np.sqrt(sums[i, i]) * np.sqrt(sums[j, j])
    return float(sums[i, j] / spread) if spread > 0 else float("nan")
