"""The exact threshold of "the k samples with the largest scores", by histograms of 16 bits over scores on disk.

Memory does not grow with the number of samples. Each pass makes the keys anew, a block of samples at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megakd.data.scores.sources import Source
from megakd.pipeline.select.keys import NOTHING, RANK_BINS, NllRanks, Rule, SampleKeys, images_of, rank_bins

_DIGITS = 1 << 16
_AT_ONCE = 1 << 15  # temporaries of a block stay in the second cache
_COLLECTED = 1 << 19
"""So few keys are sorted in memory rather than counted by further passes."""
_SHOWN = 5
Result = TypeVar("Result")


@dataclass(frozen=True)
class DomainRange:
    """A range of the samples of one source, all of one domain."""

    source: int
    begin: int
    end: int
    domain: str


@dataclass(frozen=True)
class Survey:
    """Figures of one pass over scores. The sums are over candidates: not excluded, with tokens and a divisor."""

    candidates: int
    tokens: int
    excluded: int
    empty: int
    negative: int
    num_bad: int
    """Candidates whose score is not finite."""
    bad: tuple[int, ...]
    """Ids of the first few of them."""
    moments: NDArray[np.float64]
    """``[2 + 3 * models]``: sums of s and s^2 over scores s, then for each model of x, x^2 and s x over terms x."""

    def correlation(self, model: int) -> float:
        """Pearson's correlation of the score with one model's term; NaN where either is the same for all."""
        n, (s, ss), (x, xx, sx) = self.candidates, self.moments[:2], self.moments[2 + 3 * model : 5 + 3 * model]
        if not n:
            return math.nan
        spread = max(ss / n - (s / n) ** 2, 0.0) * max(xx / n - (x / n) ** 2, 0.0)
        return float((sx / n - s / n * (x / n)) / math.sqrt(spread)) if spread > 0 else math.nan

    @staticmethod
    def sum(parts: Iterable[Survey]) -> Survey:
        """The survey of several parts together."""
        surveys = list(parts)
        return Survey(
            candidates=sum(survey.candidates for survey in surveys),
            tokens=sum(survey.tokens for survey in surveys),
            excluded=sum(survey.excluded for survey in surveys),
            empty=sum(survey.empty for survey in surveys),
            negative=sum(survey.negative for survey in surveys),
            num_bad=sum(survey.num_bad for survey in surveys),
            bad=tuple(itertools.islice((sample for survey in surveys for sample in survey.bad), _SHOWN)),
            moments=np.sum([survey.moments for survey in surveys], axis=0),
        )


class Keys:
    """The keys of the samples of all sources under one rule. threads: they read blocks; no result depends on them."""

    def __init__(self, sources: Sequence[Source], rule: Rule, *, threads: int) -> None:
        self.sources, self.rule, self.threads = sources, rule, threads
        self._samples = [SampleKeys(source, rule) for source in sources]

    def survey(self, within: DomainRange, *, by_tokens: bool, counts: NDArray[np.int64]) -> Survey:
        """Read a range once. ``counts`` ``[65536]`` gains its candidates, or their tokens, by a key's first 16 bits."""

        def read(samples: SampleKeys, begin: int, end: int) -> tuple[Survey, NDArray[np.int64]]:
            terms = samples.terms(begin, end)
            scores = samples.scores(terms)
            allowed, scored = samples.not_excluded(begin, end), samples.not_empty(begin, end)
            places = np.flatnonzero(allowed & scored)
            tokens = samples.counts[begin:end][places]
            scores = scores[places]
            bad = begin + places[~np.isfinite(scores)]
            survey = Survey(
                candidates=len(places),
                tokens=int(tokens.sum(dtype=np.int64)),
                excluded=int(np.count_nonzero(~allowed)),
                empty=int(np.count_nonzero(allowed & ~scored)),
                negative=int(np.count_nonzero(scores < 0)),
                num_bad=len(bad),
                bad=tuple(bad[:_SHOWN].tolist()),
                moments=_moments(scores, [term[places] for term in terms.values()]),
            )
            return survey, _count(images_of(scores) >> np.uint32(16), tokens if by_tokens else None)

        surveys = []
        for survey, found in self._read([within], read):
            surveys.append(survey)
            counts += found
        return Survey.sum(surveys)

    def threshold(
        self, ranges: Sequence[DomainRange], budget: int, *, by_tokens: bool, counts: NDArray[np.int64] | None = None
    ) -> int:
        """The least key at which the samples of ``ranges`` with that key or a larger one do not exceed ``budget``.

        budget: samples, or scored tokens. counts: those of the key's first 16 bits, where a survey has made them.
        """
        low, left = 0, budget
        for shift in range(80, -16, -16):
            if counts is None:
                counts = self._count_digits(ranges, low, shift, by_tokens)
            from_top = np.cumsum(counts[::-1])
            over = int(np.searchsorted(from_top, left, side="right"))  # the first bucket that does not fit whole
            if over == len(from_top):
                return low
            left -= int(from_top[over - 1]) if over else 0
            low += (_DIGITS - 1 - over) << shift
            if left == 0:
                return low + (1 << shift)
            if counts[_DIGITS - 1 - over] <= _COLLECTED:
                break
            counts = None
        return self._cut(ranges, low, low + (1 << shift), left, by_tokens)

    def _count_digits(self, ranges: Sequence[DomainRange], low: int, shift: int, by_tokens: bool) -> NDArray[np.int64]:
        """Count 16 bits of the keys, those from bit ``shift`` on, where the bits above are those of ``low``."""

        def read(samples: SampleKeys, begin: int, end: int) -> NDArray[np.int64]:
            ids, images = samples.between(begin, end, low, low + (_DIGITS << shift))
            digits = images >> np.uint32(shift - 64) if shift >= 64 else samples.hashes(ids) >> np.uint64(shift)
            return _count(digits & digits.dtype.type(_DIGITS - 1), samples.counts[ids] if by_tokens else None)

        return sum(self._read(ranges, read), np.zeros(_DIGITS, np.int64))

    def _cut(self, ranges: Sequence[DomainRange], low: int, high: int, budget: int, by_tokens: bool) -> int:
        """The threshold among the keys in ``[low, high)``, of which there are few enough to sort."""

        def read(samples: SampleKeys, begin: int, end: int) -> tuple[NDArray[Any], ...]:
            """Images, hashes, and what each sample takes of the budget."""
            ids, images = samples.between(begin, end, low, high)
            return images, samples.hashes(ids), samples.counts[ids] if by_tokens else np.ones(len(ids), np.int32)

        images, hashes, amounts = (np.concatenate(parts) for parts in zip(*self._read(ranges, read)))
        order = np.lexsort((hashes, images))[::-1]
        fitting = int(np.searchsorted(np.cumsum(amounts[order], dtype=np.int64), budget, side="right"))
        last = order[max(0, fitting - 1)]
        return (int(images[last]) << 64 | int(hashes[last])) + (fitting == 0)

    def keep(
        self, within: DomainRange, threshold: int, take: Callable[[NDArray[np.int64]], object] | None = None
    ) -> tuple[int, int]:
        """Samples and scored tokens of a range at or above a threshold; their ids go, ascending, to ``take``."""
        num_samples = num_tokens = 0
        if threshold >= NOTHING:
            return 0, 0

        def read(samples: SampleKeys, begin: int, end: int) -> tuple[NDArray[np.int64], int]:
            ids, _ = samples.between(begin, end, threshold, NOTHING)
            return ids, int(samples.counts[ids].sum(dtype=np.int64))

        for ids, tokens in self._read([within], read):
            num_samples, num_tokens = num_samples + len(ids), num_tokens + tokens
            if take is not None:
                take(ids)
        return num_samples, num_tokens

    def scores(self, source: int, begin: int, end: int) -> NDArray[np.float32]:
        """``[end - begin]``: the scores of samples, before noise."""
        samples = self._samples[source]
        return samples.scores(samples.terms(begin, end))

    def nll_ranks(self, ranges: Sequence[DomainRange]) -> NllRanks:
        """Tables that turn NLLs into ranks, counted over the candidates of ``ranges``.

        2^20 bins of the float's first 20 bits, linear inside a bin: memory that does not grow, and for an NLL of about
        2 bins of a thousandth.
        """

        def read(samples: SampleKeys, begin: int, end: int) -> dict[str, NDArray[np.uint32]]:
            candidate = samples.not_excluded(begin, end) & samples.not_empty(begin, end)
            return {name: rank_bins(term[candidate]) for name, term in samples.terms(begin, end).items()}

        counts = {name: np.zeros(RANK_BINS, np.int64) for name in self.rule.weights}
        for bins in self._read(ranges, read):
            for name, of_model in bins.items():
                np.add.at(counts[name], of_model, 1)
        return {name: np.concatenate(([0.0], np.cumsum(bins).astype(np.float64))) for name, bins in counts.items()}

    def _read(self, ranges: Iterable[DomainRange], read: Callable[[SampleKeys, int, int], Result]) -> Iterator[Result]:
        """``read(samples, begin, end)`` for each block of the ranges, in order; a few blocks at a time, on threads."""
        blocks = (
            (self._samples[within.source], begin, min(begin + _AT_ONCE, within.end))
            for within in ranges
            for begin in range(within.begin, max(within.end, within.begin + 1), _AT_ONCE)
        )
        if self.threads == 1:
            yield from itertools.starmap(read, blocks)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            while some := list(itertools.islice(blocks, 2 * self.threads)):
                yield from pool.map(lambda block: read(*block), some)


def share_of(share: float, amount: int) -> int:
    """``floor(share * amount)`` for the decimal number that was written: 0.29 of 100 is 29."""
    return math.floor(Fraction(repr(share)) * amount)


def _count(digits: NDArray[np.uint32] | NDArray[np.uint64], tokens: NDArray[np.int32] | None) -> NDArray[np.int64]:
    """``[65536]``: how many samples, or how many tokens of samples, have each digit; exact below 2^53 tokens."""
    return np.bincount(digits.astype(np.int64), tokens, _DIGITS).astype(np.int64)


def _moments(scores: NDArray[np.float32], terms: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    s = scores.astype(np.float64)
    with np.errstate(all="ignore"):  # callers refuse what is not finite
        sums = [s.sum(), (s * s).sum()]
        for term in terms:
            x = term.astype(np.float64)
            sums += [x.sum(), (x * x).sum(), (s * x).sum()]
    return np.array(sums)
