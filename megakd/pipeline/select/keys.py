"""Keys of samples, made block by block from scores that stay on disk.

A key has 96 bits: the order-preserving image of the sample's float32 score, above a keyed hash of its id. No two
samples of a dataset share a key, so a threshold cuts exactly anywhere, ties included, whatever the order of datasets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
