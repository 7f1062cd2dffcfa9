"""Keys of samples and exact thresholds over them, block by block from scores that stay on disk.

A key has 96 bits: the order-preserving image of the sample's float32 score, above a keyed hash of its id. No two
samples of a dataset share a key, so a threshold cuts exactly anywhere, ties included, whatever the order of datasets.
It is found by histograms of 16 bits; each pass makes the keys anew, so memory does not grow with the samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.data.scores.sources import Source
from megakd.splitmix64 import mix64

NOTHING = 1 << 96
"""The threshold above every key."""
NllRanks = dict[str, NDArray[np.float64]]
"""Model -> ``[2^20 + 1]``: samples below each bin of the first 20 bits of its NLL's image; at the end all samples."""
RANK_BINS = 1 << 20
_HASH_BITS = (1 << 64) - 1
_IN_BIN = 12  # bits of an image that a bin of ranks does not tell apart
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Rule:
    """The making of keys from scores, and the samples that have none.

    weights: model -> weight of its NLL. nll_ranks: tables that replace NLLs by their ranks, or None.
    """

    weights: dict[str, float]
    seed: int
    drop_negative: bool = False
    gumbel_temperature: float = 0.0
    below: int = NOTHING
    """Only samples whose key, before Gumbel noise, is smaller."""
    nll_ranks: NllRanks | None = field(default=None, compare=False)


class SampleKeys:
    """The keys of one dataset's samples under one rule. Methods take a range of samples, small enough for memory."""

    def __init__(self, source: Source, rule: Rule) -> None:
        self.rule = rule
        self.counts: NDArray[np.int32] = np.asarray(source.counts)
        self._divisor = self.counts if source.divisor is source.counts else source.divisor
        self._log_probs = {name: np.asarray(source.scores[name].log_probs) for name in rule.weights}
        self._excluded = source.excluded
        self._tie_key, self._gumbel_key = (
            np.uint64(xxhash.xxh3_64_intdigest(f"{purpose} {rule.seed} {source.dataset}".encode()))
            for purpose in ("tie", "gumbel")
        )

    def terms(self, begin: int, end: int) -> dict[str, NDArray[np.float32]]:
        """Model -> ``[end - begin]``: its NLL over the divisor, or the rank of that among all samples, 0 to 1."""
        divisor = self._divisor if isinstance(self._divisor, int) else self._divisor[begin:end]
        by = np.asarray(divisor, np.float32)
        with np.errstate(all="ignore"):  # callers refuse what is not finite
            terms = {name: -log_probs[begin:end] / by for name, log_probs in self._log_probs.items()}
            ranks = self.rule.nll_ranks
            return terms if ranks is None else {name: _rank(ranks[name], term) for name, term in terms.items()}

    def scores(self, terms: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """The weighted sum of terms. Products of two float32 values are exact in float64; the sum is in its order."""
        with np.errstate(all="ignore"):
            products = [
                np.multiply(term, np.float64(np.float32(self.rule.weights[name])), dtype=np.float64)
                for name, term in terms.items()
            ]
            total = products[0]
            for product in products[1:]:
                total += product
            return total.astype(np.float32)

    def not_excluded(self, begin: int, end: int) -> NDArray[np.bool_]:
        """``[end - begin]``: False for samples that ``--exclude-ids`` names."""
        mask = np.ones(end - begin, np.bool_)
        first, last = np.searchsorted(self._excluded, (begin, end))
        mask[np.asarray(self._excluded[first:last]) - begin] = False
        return mask

    def not_empty(self, begin: int, end: int) -> NDArray[np.bool_]:
        """``[end - begin]``: False for samples without scored tokens, or without anything to divide by."""
        mask = self.counts[begin:end] > 0
        if not isinstance(self._divisor, int) and self._divisor is not self.counts:
            mask &= self._divisor[begin:end] > 0
        return mask

    def between(self, begin: int, end: int, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Ids, ascending, and images of the samples that may be kept and whose key is in ``[low, high)``."""
        scores = self.scores(self.terms(begin, end))
        candidate = self.not_excluded(begin, end) & self.not_empty(begin, end)
        if self.rule.drop_negative:
            candidate &= ~(scores < 0)
        if self.rule.below < NOTHING:
            candidate &= self._is_below(np.arange(begin, end), images_of(scores), self.rule.below)
        if self.rule.gumbel_temperature:
            scores = self._with_noise(scores, np.arange(begin, end))
        images = images_of(scores)
        first, last = low >> 64, (high - 1) >> 64
        if first > 0:
            candidate &= images >= np.uint32(first)
        if last < (1 << 32) - 1:
            candidate &= images <= np.uint32(last)
        places = np.flatnonzero(candidate)
        ids, images = begin + places, images[places]
        if low & _HASH_BITS or high & _HASH_BITS:  # the range begins or ends among samples of one score
            inside = self._is_below(ids, images, high) & ~self._is_below(ids, images, low)
            ids, images = ids[inside], images[inside]
        return ids, images

    def hashes(self, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        """``[n]``: the lower 64 bits of the samples' keys."""
        return mix64(ids.astype(np.uint64) ^ self._tie_key)

    def _is_below(self, ids: NDArray[np.int64], images: NDArray[np.uint32], key: int) -> NDArray[np.bool_]:
        if key >= NOTHING:
            return np.ones(len(ids), np.bool_)
        mask = images < np.uint32(key >> 64)
        ties = np.flatnonzero(images == np.uint32(key >> 64))
        mask[ties] = self.hashes(ids[ties]) < np.uint64(key & _HASH_BITS)
        return mask

    def _with_noise(self, scores: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score / temperature + Gumbel noise -log(-log u), u by a keyed hash of the id.

        The last bits of numpy's logarithm depend on the processor. Where they could decide the float32, the C library's
        logarithm is taken, so that the ids do not depend on the machine.
        """
        temperature = self.rule.gumbel_temperature
        u = ((mix64(ids.astype(np.uint64) ^ self._gumbel_key) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        noise = -np.log(-np.log(u))
        with np.errstate(all="ignore"):
            scaled = scores.astype(np.float64) / temperature
            noisy = scaled + noise
            margin = 1e-14 * (1 + np.abs(noise) + np.minimum(np.abs(noisy), _FLOAT32_MAX))
            result: NDArray[np.float32] = noisy.astype(np.float32)
            for place in np.flatnonzero((noisy - margin).astype(np.float32) != (noisy + margin).astype(np.float32)):
                result[place] = scaled[place] - math.log(-math.log(u[place]))
        return result


def images_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Order-preserving images of float32 values: -0 lies right below 0, and a NaN beyond the infinity of its sign."""
    bits = values.view(np.uint32)
    return bits ^ ((bits.view(np.int32) >> np.int32(31)).view(np.uint32) | np.uint32(1 << 31))


def score_at(threshold: int) -> float | None:
    """The score of a threshold; None where it keeps everything or nothing."""
    image = threshold >> 64
    if not 0 < image < 1 << 32:
        return None
    bits = image ^ 0x80000000 if image >> 31 else image ^ 0xFFFFFFFF
    score = float(np.array(bits, np.uint32).view(np.float32))
    return score if math.isfinite(score) else None


def rank_bins(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bin of each value: the first 20 bits of its image."""
    return images_of(values) >> np.uint32(_IN_BIN)


def _rank(below: NDArray[np.float64], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[n]``, 0 to 1: the share of samples below each value, linear inside a bin."""
    bins = rank_bins(values)
    inside = ((images_of(values) & np.uint32((1 << _IN_BIN) - 1)).astype(np.float64) + 0.5) / (1 << _IN_BIN)
    ranks: NDArray[np.float64] = (below[bins] + (below[bins + np.uint32(1)] - below[bins]) * inside) / below[-1]
    return ranks.astype(np.float32)


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
