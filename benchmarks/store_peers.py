"""The layouts that bench_store.py holds a logits store against. Each has ``bytes_a_row`` and decodes in ``read``.

Written from what is known of the peers' formats, with numpy: sizes are exact, rates are those of these lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from megakd.logits.codec import Rows

ROWS_A_FILE = 1024


class Naive:
    """fp16 log-probabilities and int32 ids."""

    def __init__(self, rows: Rows) -> None:
        self._shape = rows.ids_TK.shape
        self._values, self._ids = rows.log_probs_TK.astype(np.float16).tobytes(), rows.ids_TK.astype("<i4").tobytes()
        self.bytes_a_row = (len(self._values) + len(self._ids)) / rows.num_rows

    def read(self) -> object:
        values = np.frombuffer(self._values, np.float16).reshape(self._shape).astype(np.float32)
        return values, np.frombuffer(self._ids, "<i4").reshape(self._shape).astype(np.int64)


class Megatron:
    """fp16, the low 16 bits of the ids, one bool for bit 17, 1,024 rows a file, zstd level 3 over all of it."""

    def __init__(self, rows: Rows) -> None:
        self._files, raw = [], 0
        for at in range(0, rows.num_rows, ROWS_A_FILE):
            part = rows_at(rows, slice(at, at + ROWS_A_FILE))
            columns = (part.log_probs_TK.astype(np.float16), part.ids_TK.astype(np.uint16), part.ids_TK > 0xFFFF)
            file = b"".join(column.tobytes() for column in columns)
            raw += len(file)
            self._files.append(zstandard.compress(file, 3))
        self.bytes_a_row = sum(map(len, self._files)) / rows.num_rows
        self.raw_bytes_a_row = raw / rows.num_rows

    def read(self) -> object:
        for file in self._files:
            raw = zstandard.decompress(file)
            size = len(raw) // 5
            values = np.frombuffer(raw, np.float16, size).astype(np.float32)
            ids = np.frombuffer(raw, np.uint16, size, 2 * size).astype(np.int64)
            ids |= np.frombuffer(raw, np.bool_, size, 4 * size).astype(np.int64) << 16
        return values, ids


class DistillKit:
    """The likeliest ``exact`` values in bf16, a polynomial in the place for the others, ids of 17 bits, best first.

    degrees: of the polynomial's terms, whose coefficients are fp32, fitted by least squares over places from 0 to 1.
    residual_bits: what is left of each value, quantised against the largest of its row, which is bf16; then without a
        polynomial. Its README's two settings are 128 ids, 16 exact, degrees 0, 1, 2, 3, 4 and 1/2; and 50 ids, 1 exact,
        degrees 0, 1 and 1/2.
    """

    ID_BITS = 17

    def __init__(self, rows: Rows, *, exact: int, degrees: Sequence[float] = (), residual_bits: int = 0) -> None:
        ids, values = rows.ids_TK, rows.log_probs_TK.astype(np.float64)
        self._exact = bf16(values[:, :exact])
        self._width = ids.shape[1]
        bits = (ids[:, :, None] >> np.arange(self.ID_BITS)) & 1
        self._ids = np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1, bitorder="little")
        rest = values[:, exact:]
        size = 2 * exact + self._ids.shape[1]
        if residual_bits:
            self._scale = bf16(np.abs(rest).max(1, keepdims=True)) / (2**residual_bits - 1)
            self._steps = np.rint(-rest / self._scale).clip(0, 2**residual_bits - 1).astype(np.uint8)
            size += 2 + rest.shape[1] * residual_bits // 8
        else:
            places = np.linspace(0, 1, rest.shape[1])
            self._powers = np.stack([places**degree for degree in degrees])
            self._coefficients = np.linalg.lstsq(self._powers.T, rest.T, rcond=None)[0].T.astype(np.float32)
            size += 4 * len(degrees)
        self._residual_bits = residual_bits
        self.bytes_a_row = float(size)

    def read(self) -> Rows:
        """The ids, best first, and their decoded values."""
        bits = np.unpackbits(self._ids, axis=1, count=self._width * self.ID_BITS, bitorder="little")
        powers = 1 << np.arange(self.ID_BITS, dtype=np.int64)
        ids = bits.reshape(len(bits), self._width, self.ID_BITS) @ powers
        rest = self._steps * -self._scale if self._residual_bits else self._coefficients @ self._powers
        values = np.concatenate([self._exact, rest], 1).astype(np.float32)
        return Rows(ids, values, np.zeros(len(ids), np.float32))


class Copy:
    """Lower bound without a layout: the decoded arrays, copied."""

    def __init__(self, rows: Rows) -> None:
        self._from = rows.ids_TK, rows.log_probs_TK
        self._to = np.empty_like(rows.ids_TK), np.empty_like(rows.log_probs_TK)

    def read(self) -> object:
        for source, target in zip(self._from, self._to):
            np.copyto(target, source)
        return self._to


def rows_at(rows: Rows, at: Any) -> Rows:
    return Rows(rows.ids_TK[at], rows.log_probs_TK[at], rows.entropy_T[at])


def bf16(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest numbers of 8 significant bits."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    rounded: NDArray[np.float32] = nearest.astype(np.uint32).view(np.float32)
    return rounded
