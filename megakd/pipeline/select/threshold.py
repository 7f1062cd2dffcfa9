"""The exact threshold of "the k with the largest scores", by radix histograms over scores that stay on disk.

A sample's key is a number of 96 bits: the order-preserving image of its float32 score, above a keyed hash of its id.
No two samples of a dataset share one, so a threshold cuts exactly anywhere, ties included, whatever the order of the
datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd._csrc import ScoreSweep
from megakd.data.scores.sources import Source

NOTHING = 1 << 96
"""The threshold above every key."""
EVERYTHING = 0
_DIGITS = 6
_RANK_BINS = 1 << 20
_AT_ONCE = 1 << 19
_COLLECTED = 1 << 19
"""So few keys are sorted in memory rather than counted by further sweeps."""


@dataclass(frozen=True)
class Rule:
    """How keys are made of scores, and what is out of question."""

    weights: dict[str, float]
    seed: int
    drop_negative: bool = False
    gumbel_temperature: float = 0.0
    below: int = NOTHING
    """Only samples whose key, before Gumbel noise, is smaller."""


@dataclass(frozen=True)
class Piece:
    """A range of the samples of one source, all of one domain."""

    source: int
    begin: int
    end: int
    domain: str


@dataclass(frozen=True)
class Survey:
    """What one pass over all scores tells. The sums are over candidates: not excluded, with tokens to divide by."""

    candidates: int
    tokens: int
    excluded: int
    empty: int
    negative: int
    num_bad: int
    first_bad: int
    divisors: tuple[int, int]
    token_counts: tuple[int, int]
    moments: NDArray[np.float64]

    def correlation(self, model: int) -> float:
        """Pearson's, of the score with one model's term; NaN where either is the same for all."""
        n, (s, ss), (x, xx, sx) = self.candidates, self.moments[:2], self.moments[2 + 3 * model : 5 + 3 * model]
        if not n:
            return math.nan
        spread = max(ss / n - (s / n) ** 2, 0.0) * max(xx / n - (x / n) ** 2, 0.0)
        return float((sx / n - s / n * (x / n)) / math.sqrt(spread)) if spread > 0 else math.nan

    @staticmethod
    def sum(parts: Iterable[Survey]) -> Survey:
        """Of pieces together."""
        several = list(parts)
        return Survey(
            candidates=sum(p.candidates for p in several),
            tokens=sum(p.tokens for p in several),
            excluded=sum(p.excluded for p in several),
            empty=sum(p.empty for p in several),
            negative=sum(p.negative for p in several),
            num_bad=sum(p.num_bad for p in several),
            first_bad=-1,
            divisors=_range([p.divisors for p in several]),
            token_counts=_range([p.token_counts for p in several]),
            moments=np.sum([p.moments for p in several], axis=0),
        )


Ranks = dict[str, NDArray[np.float64]]
"""Per model, samples below each bin of its NLL's image, and all of them at the end."""


class Keys:
    """The keys of all sources under one rule.

    uniform: the survey of each source, where there is one: what is the same for all its samples is not read again.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rule: Rule,
        *,
        threads: int,
        ranks: Ranks | None = None,
        uniform: Sequence[Survey] | None = None,
    ) -> None:
        self.sources, self.rule, self.threads = sources, rule, threads
        self._sweeps = [
            _sweep(source, rule, ranks, None if uniform is None else uniform[index])
            for index, source in enumerate(sources)
        ]

    def survey(self, piece: Piece, *, by_tokens: bool, counts: NDArray[np.uint64]) -> Survey:
        """One pass over a piece; ``counts`` gains those of its first digit."""
        found = self._sweeps[piece.source].survey(piece.begin, piece.end, by_tokens, counts, self.threads)
        return Survey(**{**found, "moments": np.array(found["moments"])})

    def threshold(
        self, pieces: Sequence[Piece], budget: int, *, by_tokens: bool, counts: NDArray[np.uint64] | None = None
    ) -> int:
        """The least key at which the samples of ``pieces`` with that key or a larger one do not exceed ``budget``.

        budget: samples, or scored tokens. counts: of the first digit, where they are known.
        """
        prefix, left = 0, budget
        for digit in range(_DIGITS):
            if counts is None:
                counts = np.zeros(1 << 16, np.uint64)
                for piece in pieces:
                    sweep = self._sweeps[piece.source]
                    sweep.count(piece.begin, piece.end, digit, _pair(prefix), by_tokens, counts, self.threads)
            from_top = np.cumsum(counts[::-1])
            over = int(np.searchsorted(from_top, left, side="right"))  # the first bucket that does not fit whole
            shift = 16 * (_DIGITS - 1 - digit)
            if over == len(from_top):
                return prefix
            left -= int(from_top[over - 1]) if over else 0
            bucket = len(from_top) - 1 - over
            if left == 0 or digit == _DIGITS - 1:
                return prefix + ((bucket + 1) << shift)
            if digit < 2 and counts[bucket] <= _COLLECTED:
                return self._cut(pieces, prefix + (bucket << shift), 1 << shift, int(counts[bucket]), left, by_tokens)
            prefix += bucket << shift
            counts = None
        raise AssertionError("the last digit returns")

    def _cut(self, pieces: Sequence[Piece], first: int, span: int, room: int, budget: int, by_tokens: bool) -> int:
        """The threshold among ``span`` keys from ``first`` on, which at most ``room`` samples have."""
        images, hashes, tokens = np.empty(room, np.uint32), np.empty(room, np.uint64), np.empty(room, np.int32)
        found = 0
        between = first >> 64, (first + span - 1) >> 64
        for piece in pieces:
            sweep = self._sweeps[piece.source]
            found += sweep.collect(piece.begin, piece.end, between, images[found:], hashes[found:], tokens[found:])
        order = np.lexsort((hashes[:found], images[:found]))[::-1]
        amounts = tokens[order] if by_tokens else np.ones(found, np.int64)
        fitting = int(np.searchsorted(np.cumsum(amounts, dtype=np.int64), budget, side="right"))
        last = order[max(0, fitting - 1)]
        return (int(images[last]) << 64 | int(hashes[last])) + (fitting == 0)

    def keep(
        self, piece: Piece, threshold: int, take: Callable[[NDArray[np.int64]], object] | None = None
    ) -> tuple[int, int]:
        """Samples and scored tokens at or above a threshold; their ids go, ascending, to ``take``."""
        samples = tokens = 0
        if threshold >= NOTHING:
            return 0, 0
        ids = np.empty(min(_AT_ONCE, piece.end - piece.begin), np.int64)
        for begin in range(piece.begin, piece.end, _AT_ONCE):
            end = min(begin + _AT_ONCE, piece.end)
            found, their_tokens = self._sweeps[piece.source].keep(begin, end, _pair(threshold), ids)
            samples, tokens = samples + found, tokens + their_tokens
            if take is not None:
                take(ids[:found])
        return samples, tokens

    def scores(self, source: int, begin: int, end: int) -> NDArray[np.float32]:
        """``[end - begin]``: the scores themselves."""
        scores = np.empty(end - begin, np.float32)
        self._sweeps[source].scores(begin, end, scores)
        return scores

    def rank_tables(self, pieces: Sequence[Piece]) -> Ranks:
        """What turns NLLs into ranks, from the candidates of ``pieces``.

        2^20 bins of the float's first 20 bits, linear inside a bin: memory that does not grow, and for an NLL about 2
        bins of a thousandth.
        """
        tables = {}
        for model, name in enumerate(self.rule.weights):
            counts = np.zeros(_RANK_BINS, np.uint64)
            for piece in pieces:
                self._sweeps[piece.source].count_ranks(piece.begin, piece.end, model, counts)
            tables[name] = np.concatenate(([0.0], np.cumsum(counts).astype(np.float64)))
        return tables


def share_of(share: float, amount: int) -> int:
    """``floor(share * amount)`` for the decimal number that was written: 0.29 of 100 is 29."""
    return math.floor(Fraction(repr(share)) * amount)


def score_at(threshold: int) -> float | None:
    """The score of a threshold; None where it keeps everything or nothing."""
    image = threshold >> 64
    if not 0 < image < 1 << 32:
        return None
    bits = image ^ 0x80000000 if image >> 31 else image ^ 0xFFFFFFFF
    score = float(np.array(bits, np.uint32).view(np.float32))
    return score if math.isfinite(score) else None


def _sweep(source: Source, rule: Rule, ranks: Ranks | None, uniform: Survey | None) -> ScoreSweep:
    divisor: NDArray[np.int32] | int = source.divisor
    tokens: NDArray[np.int32] | int = source.counts
    if uniform is not None and uniform.empty == 0:
        divisor = uniform.divisors[0] if uniform.divisors[0] == uniform.divisors[1] else divisor
        tokens = uniform.token_counts[0] if uniform.token_counts[0] == uniform.token_counts[1] else tokens
    return ScoreSweep(
        [scores.log_probs for scores in (source.scores[name] for name in rule.weights)],
        list(rule.weights.values()),
        divisor=divisor,
        tokens=tokens,
        excluded=source.excluded,
        tie_key=_hash_key("tie", rule.seed, source.dataset),
        gumbel=(_hash_key("gumbel", rule.seed, source.dataset), rule.gumbel_temperature),
        drop_negative=rule.drop_negative,
        below=None if rule.below >= NOTHING else _pair(rule.below),
        ranks=[] if ranks is None else [ranks[name] for name in rule.weights],
    )


def _hash_key(purpose: str, seed: int, dataset: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{purpose} {seed} {dataset}".encode())


def _pair(key: int) -> tuple[int, int]:
    return key >> 64, key & ((1 << 64) - 1)


def _range(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in pairs), max(high for _, high in pairs)
