"""Tokens in a report: decoded samples, and counts of distinct n-grams."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megakd.data.samples.protocol import Samples
from megakd.data.tokenizer import Tokenizer

NGRAMS = (1, 2, 3, 4)
_FACTOR = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Diversity:
    """Counts of the n-grams inside samples drawn from ``of``: all candidates, or the kept ones."""

    of: str
    n: int
    num_samples: int
    num_ngrams: int
    num_distinct: int


def diversity(samples: Samples, drawn: dict[str, NDArray[np.int64]]) -> list[Diversity]:
    """Count n-grams in each set of drawn samples, in equally many of each: the distinct share falls with the number."""
    num_samples = min(len(ids) for ids in drawn.values())
    found = []
    for name, ids in drawn.items():
        rows = [_tokens(samples, sample) for sample in sorted(ids[:num_samples].tolist())]
        for n in NGRAMS:
            hashes = np.concatenate([np.zeros(0, np.uint64), *(_hash_ngrams(row, n) for row in rows)])
            found.append(Diversity(name, n, num_samples, len(hashes), len(np.unique(hashes))))
    return found


def decode(samples: Samples, sample: int, tokenizer: Tokenizer, *, chars: int) -> str:
    """Decode the first ``chars`` characters of a sample; a character that is not printable is written as its code."""
    tokens = _tokens(samples, sample)[: 4 * chars]  # no use to decode what is cut off
    text = tokenizer.decode(tokens.tolist())
    return visible(text[:chars] + (" …" if len(text) > chars else ""))


def visible(text: str) -> str:
    """Escape text: control, direction, surrogate and unassigned characters are written as their codes."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text)


def _tokens(samples: Samples, sample: int) -> NDArray[np.int64]:
    ids = np.array([sample])
    start, length = int(samples.starts(ids)[0]), int(samples.lengths(ids)[0])
    return samples.dataset.tokens[start : start + length].astype(np.int64)


def _hash_ngrams(tokens: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
    """``[len(tokens) - n + 1]``: a hash of each n-gram; two that differ collide once in 2^64."""
    count = max(0, len(tokens) - n + 1)
    value = np.zeros(count, np.uint64)
    for offset in range(n):
        value = (value + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)) * _FACTOR
        value ^= value >> np.uint64(29)
    return value
