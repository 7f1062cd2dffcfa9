"""The slow obvious twin of the row codec's decoder: docs/formats.md word for word, one bit after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# family: (contexts, symbols, numbers that are a symbol each as a power of two), in the order of the table
FAMILIES = {
    "sizes": (1, 302, 8),
    "gaps": (12, 64, 3),
    "least": (1, 129, 8),
    "levels": (18, 129, 8),
    "counts": (9, 64, 3),
}
FIRST = {
    name: sum(contexts * symbols for contexts, symbols, _ in list(FAMILIES.values())[:at])
    for at, name in enumerate(FAMILIES)
}


class Bits:
    def __init__(self, data: bytes) -> None:
        self._bits: Iterator[int] = (byte >> bit & 1 for byte in data for bit in range(8))

    def take(self, count: int) -> int:
        """The first bit is the lowest."""
        return sum(next(self._bits) << place for place in range(count))


class Codes:
    def __init__(self, lengths: NDArray[np.uint8]) -> None:
        self._lengths = lengths.tolist()

    def next(self, family: str, context: int, bits: Bits) -> int:
        _, symbols, direct = FAMILIES[family]
        first = FIRST[family] + context * symbols
        symbol = self._symbol(self._lengths[first : first + symbols], bits)
        if symbol < 2**direct:
            return symbol
        exponent = direct + (symbol - 2**direct) // 2
        return ((2 + symbol % 2) << (exponent - 1)) + bits.take(exponent - 1)

    @staticmethod
    def _symbol(lengths: list[int], bits: Bits) -> int:
        """Codes are given out in the order of length, then of symbol; their first bit is the highest."""
        if 255 in lengths:
            return lengths.index(255)
        code = read = first = 0
        while True:
            read, code, first = read + 1, code * 2 + bits.take(1), first * 2
            of_length = [symbol for symbol, length in enumerate(lengths) if length == read]
            if code - first < len(of_length):
                return of_length[code - first]
            first += len(of_length)


def decode(
    record: bytes,
    code_lengths: NDArray[np.uint8],
    ids_of_ranks: NDArray[np.int32],
    *,
    value: str,
    mass: str,
    draws: int,
) -> list[tuple[dict[int, float], float]]:
    """For each row what each id carries, as a log-probability, and the entropy."""
    num_rows, _, first_bytes = np.frombuffer(record[:12], "<u4").tolist()
    first, second = Bits(record[12 : 12 + first_bytes]), Bits(record[12 + first_bytes :])
    codes = Codes(code_lengths)
    rows = []
    for _ in range(num_rows):
        size = codes.next("sizes", 0, first)
        entropy = second.take(16) / 2048
        tail = second.take(16) if mass == "stored" else 0
        ids: list[int] = []
        next_ranks = [0, 0]
        for _ in range(size):
            context = min(max(int(math.log2(next_ranks[-2] + 1)) - 3, 0), 11)
            rank = next_ranks[-1] + codes.next("gaps", context, first)
            ids.append(int(ids_of_ranks[rank]))
            next_ranks.append(rank + 1)
        values = list(_values(size, codes, second, value, draws))
        if value in ("8", "16") and size and mass != "free":
            shift = math.log(_mass(tail) / sum(math.exp(x) for x in values))
            values = [x + shift for x in values]
        rows.append((dict(zip(ids, values)), entropy))
    return rows


def _values(size: int, codes: Codes, bits: Bits, value: str, draws: int) -> Iterator[float]:
    if value == "32":
        for _ in range(size):
            yield float(np.uint32(bits.take(32)).view(np.float32))
    elif value == "count":
        for _ in range(size):
            yield math.log((codes.next("counts", min(int(math.log2(size)), 8), bits) + 1) / draws)
    elif size:
        least = codes.next("least", 0, bits)
        for _ in range(size):
            level = least + codes.next("levels", 0 if size == 1 else 1 + least // 8, bits)
            if value == "8":
                yield 8 * math.log(max(level, 0.25) / 128)
            else:
                place = max(256 * level + bits.take(8), 128)
                yield 8 * math.log((place - 127.5) / 256 / 128)


def _mass(tail: int) -> float:
    step = 22 / 32767
    if tail == 0:
        return 1.0
    return 1 - math.exp(-step * (32767 - tail)) / 2 if tail < 32768 else math.exp(-step * (tail - 32768)) / 2
