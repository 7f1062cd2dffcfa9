"""Rows of a logits store to bytes and back: ids in the order of their frequency ranks, their values in few bits.

Axes: ``T`` token positions of a sample, ``K`` slots for ids, ``V`` the vocabulary. The bytes: ``docs/formats.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megakd import _csrc
from megakd.errors import CorruptError, UsageError
from megakd.targets import SparseKind

ValueBits = Literal[8, 16, 32]
Rounding = Literal["nearest", "random"]

TOP_LEVEL = 128
ENTROPY_STEP = 1 / 2048
"""Step of stored entropies in nats; a stored entropy is off by at most half of it."""
TAIL_STEP = 22 / 32767
"""Step, in nats, of the stored logarithm of the smaller of the listed and the unlisted mass; it is off by at most half
of it where that mass is above 1.4e-10."""
ROWS_FOR_CODES = 65536
"""Number of a shard's first rows that its codes are made for; they are held in memory until then."""
MAX_ENTROPY = 65535 * ENTROPY_STEP
WEIGHT_UNIT = 64.0
"""Unit of the stored mass of weighted draws, and the largest mass of an id, which by chance may be more than 1."""

READ_AHEAD = _csrc.ROW_READ_AHEAD
CODE_LENGTHS = _csrc.ROW_CODE_LENGTHS
_HEAD = np.dtype([("rows", "<u4"), ("most_ids", "<u4"), ("first_bytes", "<u4")])


@dataclass(frozen=True)
class RowFormat:
    """Format of the rows of a store.

    kind: as in ``targets.SparseTargets``.
    value_bits: bits of a stored log-probability. 8: the nearest of 129 levels, which are equal steps of p^(1/8),
        entropy-coded to about 5 bits. 16: the level, and one of 256 places inside it. 32: the float itself. Unused for
        counts.
    draws: number of draws for a row, for the kind ``samples``, whose counts are exact.
    weighted: True for ``samples`` drawn from another distribution than the teacher's: each id carries its share of the
        draws times a weight, as a log-probability of ``value_bits``, instead of a count.
    rounding: rounding of values to those that can be stored. nearest: done by the encoder, which keeps the mass of a
        row. random: done by the maker of the rows (``rounding.py``), up or down so that each value is right on average;
        for weighted draws alone.
    """

    kind: SparseKind
    value_bits: ValueBits = 8
    draws: int = 0
    weighted: bool = False
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.kind not in ("top_p_k", "samples", "renormalised_samples"):
            raise UsageError(f"kind {self.kind!r}: expected top_p_k, samples or renormalised_samples")
        if self.value_bits not in (8, 16, 32):
            raise UsageError(f"value_bits {self.value_bits}: expected 8, 16 or 32")
        if self.kind == "samples" and not 1 <= self.draws < 2**20:
            raise UsageError(f"draws {self.draws}: expected 1 to {2**20 - 1} for samples")
        if self.rounding not in ("nearest", "random") or (self.rounding == "random" and not self.weighted):
            raise UsageError(f"rounding {self.rounding!r}: expected nearest, or random for weighted draws")

    @property
    def value(self) -> Literal["8", "16", "32", "count"]:
        """Name of the value that an id carries, for the native codec."""
        if self.kind == "samples" and not self.weighted:
            return "count"
        return "8" if self.value_bits == 8 else "16" if self.value_bits == 16 else "32"

    @property
    def mass(self) -> Literal["one", "stored", "free"]:
        """Total mass of a row's ids: one; stored with the row; or free, the sum of their values.

        Values are scaled to a mass of one or a stored mass, which would undo random rounding: there the mass is free.
        """
        if self.weighted and self.rounding == "random":
            return "free"
        return "stored" if self.kind == "top_p_k" or self.weighted else "one"

    @property
    def log_unit(self) -> float:
        """Logarithm of the unit of stored masses, in nats."""
        return math.log(WEIGHT_UNIT) if self.weighted else 0.0


@dataclass(frozen=True)
class Rows:
    """Sparse targets for the token positions of a sample, one row each.

    ids_TK: int64, no id twice in a row, in any order; decoded rows are in rising frequency rank.
    log_probs_TK: fp32, nats, the log of the mass that each id carries (``targets.SparseTargets`` defines it for every
        kind); -inf in an empty slot, whose id may be any number and is 0 in decoded rows.
    entropy_T: fp32, nats, the entropy of the whole distribution.
    """

    ids_TK: NDArray[np.int64]
    log_probs_TK: NDArray[np.float32]
    entropy_T: NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        return len(self.entropy_T)

    @staticmethod
    def from_counts(
        ids_TK: NDArray[np.int64], counts_TK: NDArray[np.int32], entropy_T: NDArray[np.float32], *, draws: int
    ) -> Rows:
        """Make rows of the kind ``samples`` from the number of times that each id was drawn; 0 is an empty slot."""
        with np.errstate(divide="ignore"):
            shares = np.log(np.asarray(counts_TK, np.float64) / draws).astype(np.float32)
        return Rows(ids_TK, shares, entropy_T)

    def counts(self, draws: int) -> NDArray[np.int32]:
        """Return ``[T, K]``, the number of times that each id was drawn, for the kind ``samples``; 0 in an empty slot.

        Raises UsageError if a mass is not that of a whole number of draws.
        """
        times: NDArray[np.float64] = np.exp(self.log_probs_TK.astype(np.float64)) * draws
        counts: NDArray[np.int32] = np.rint(times).astype(np.int32)
        if not np.allclose(times, counts, rtol=0, atol=0.01):
            raise UsageError(f"samples: the mass of an id is no multiple of 1/{draws}")
        return counts


def identity_ranks(vocab_size: int) -> NDArray[np.int32]:
    """Frequency ranks ``[V]`` of ids that are in the order of their frequency, or whose frequency is unknown."""
    return np.arange(vocab_size, dtype=np.int32)


def rank_by_frequency(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Frequency rank, int32 ``[V]``, of each id: the most frequent first, ties by id."""
    order: NDArray[np.int32] = np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable").astype(np.int32)
    return invert(order)


def invert(permutation: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the id of each rank from the rank of each id, or the reverse. Raises UsageError if not a permutation."""
    size = len(permutation)
    inverse: NDArray[np.int32] = np.full(size, -1, dtype=np.int32)
    if permutation.ndim == 1 and (size == 0 or (permutation.min() >= 0 and permutation.max() < size)):
        inverse[permutation] = np.arange(size, dtype=np.int32)
    if size == 0 or (inverse < 0).any():
        raise UsageError(f"ranks: expected each of 0 to {size - 1} once")
    return inverse


@dataclass(frozen=True)
class EncodedRows:
    """Records of some samples, and their codes.

    payload: ``[bytes + READ_AHEAD]`` uint8, one record after the other; a sample without targets has none.
    offsets: ``[samples + 1]`` uint64, the start of each record.
    code_lengths: ``[CODE_LENGTHS]`` uint8, the lengths of the codes.
    """

    payload: NDArray[np.uint8]
    offsets: NDArray[np.uint64]
    code_lengths: NDArray[np.uint8]


class RowEncoder:
    """Encoder of samples, one after the other; equal rows give equal bytes.

    frequency_ranks: ``[V]`` int32, the rank of each id; rows whose ids have low ranks take fewer bytes.
    """

    def __init__(
        self, row_format: RowFormat, frequency_ranks: NDArray[np.int32], *, rows_for_codes: int = ROWS_FOR_CODES
    ) -> None:
        self.row_format = row_format
        invert(frequency_ranks)  # raises UsageError unless they are a permutation
        self._native = _csrc.RowEncoder(
            np.ascontiguousarray(frequency_ranks, np.int32),
            value=row_format.value,
            mass=row_format.mass,
            draws=row_format.draws,
            rows_for_codes=rows_for_codes,
        )

    def add(self, rows: Rows | None) -> None:
        """Encode the next sample; None for one without targets.

        Raises UsageError for an id twice in a row or beyond the vocabulary, a log-probability that is NaN or above 0,
        an entropy outside ``[0, MAX_ENTROPY]``, counts that do not make the draws, a mass above 1 (or, of
        ``renormalised_samples``, other than 1; of weighted draws an id's above ``WEIGHT_UNIT``); then nothing was
        taken.
        """
        if rows is None:
            self._native.add(None, None, None)
            return
        values: NDArray[Any]
        if self.row_format.value == "count":
            values = rows.counts(self.row_format.draws)
        else:
            values = np.ascontiguousarray(rows.log_probs_TK, np.float32)
            if self.row_format.weighted:
                values = values - np.float32(self.row_format.log_unit)
        ids, entropies = np.ascontiguousarray(rows.ids_TK, np.int64), np.ascontiguousarray(rows.entropy_T, np.float32)
        try:
            self._native.add(ids, values, entropies)
        except ValueError as error:
            raise UsageError(f"rows that cannot be stored: {error}") from error

    def finish(self) -> EncodedRows:
        """Return everything that was added; nothing can be added afterwards."""
        return EncodedRows(*self._native.finish())


class RowDecoder:
    """Decoder of records that were written with one table of codes; usable from any number of threads.

    ids_of_ranks: ``[V]`` int32, the inverse of the encoder's frequency ranks.

    Raises CorruptError for code lengths that make no code.
    """

    def __init__(self, row_format: RowFormat, ids_of_ranks: NDArray[np.int32], code_lengths: NDArray[np.uint8]) -> None:
        self._vocab_size, self._log_unit = len(ids_of_ranks), np.float32(row_format.log_unit)
        try:
            self._native = _csrc.RowDecoder(
                ids_of_ranks,
                value=row_format.value,
                mass=row_format.mass,
                draws=row_format.draws,
                lengths=np.ascontiguousarray(code_lengths, np.uint8),
            )
        except ValueError as error:
            raise CorruptError(str(error)) from error

    def size(self, record: NDArray[np.uint8]) -> tuple[int, int]:
        """Read the number of rows and the largest number of ids in a row from the head of a record.

        Whether they are true `decode` finds out. Raises CorruptError for numbers that are impossible.
        """
        if len(record) < _HEAD.itemsize + READ_AHEAD:
            raise CorruptError(f"a record of {len(record) - READ_AHEAD} bytes")
        head = np.frombuffer(record[: _HEAD.itemsize], _HEAD)[0]
        num_rows, most_ids = int(head["rows"]), int(head["most_ids"])
        # each row takes two bytes for its entropy
        if num_rows * 2 > len(record) or most_ids > self._vocab_size:
            raise CorruptError(f"a record of {len(record) - READ_AHEAD} bytes claims {num_rows} rows of {most_ids} ids")
        return num_rows, most_ids

    def decode(self, record: NDArray[np.uint8]) -> Rows:
        """Decode one record, which ``READ_AHEAD`` more bytes of any content follow.

        Raises CorruptError for bytes that the encoder cannot have written, as far as that can be seen.
        """
        num_rows, most_ids = self.size(record)
        rows = empty_rows((num_rows,), most_ids)
        self.decode_into(record, rows)
        return rows

    def decode_into(self, record: NDArray[np.uint8], out: Rows) -> None:
        """Decode one record into arrays with room for more rows and ids.

        Empty slots get id 0 and -inf; rows after the last are left as they were. Raises as `decode` does.
        """
        wrong = self._native.decode(record, out.ids_TK, out.log_probs_TK, out.entropy_T)
        if wrong >= 0:
            raise CorruptError(f"row {wrong} is not what was written")
        if self._log_unit:
            out.log_probs_TK[...] += self._log_unit


def empty_rows(shape: tuple[int, ...], width: int) -> Rows:
    """Allocate arrays for rows, with undefined content."""
    return Rows(np.empty((*shape, width), np.int64), np.empty((*shape, width), np.float32), np.empty(shape, np.float32))
