"""Types of the native kernels (csrc/module.cpp).

All sweep over a chunk of logits ``[rows, columns]``, float32 or bf16 as uint16, whose columns from ``num_valid`` on are
padding. ``"statistics"`` fills ``statistics`` ``[k, rows]``; ``"gradient"`` reads it and overwrites ``student``;
``"both"`` does one after the other, row by row. Columns: losses/vocab_parallel.py. Raises ValueError for arrays that do
not fit.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def sweep_lm(
    sweep: Literal["statistics", "gradient", "both"],
    student: NDArray[Any],
    num_valid: int,
    labels: NDArray[np.int64],
    lm_weight: NDArray[np.float32],
    z_weight: NDArray[np.float32] | None,
    statistics: NDArray[np.float32],
    threads: int,
) -> None:
    """The LM loss alone."""

def sweep_dense(
    sweep: Literal["statistics", "second_pass", "gradient", "both"],
    student: NDArray[Any],
    num_valid: int,
    labels: NDArray[np.int64],
    lm_weight: NDArray[np.float32],
    z_weight: NDArray[np.float32] | None,
    statistics: NDArray[np.float32],
    threads: int,
    *,
    teacher: NDArray[Any],
    kd_weight: NDArray[np.float32],
    divergence: str,
    parameters: tuple[float, float],
    student_temperature: float,
    teacher_temperature: float,
    kd_scale: float,
) -> None:
    """Sweep with the logits of a dense teacher, which are only read.

    Behind the columns of the first pass ``statistics`` has those of the second, except for ``"statistics"``, which
    makes the first alone. ``"second_pass"`` reads the former and fills the latter."""

def sweep_sparse(
    sweep: Literal["statistics", "gradient"],
    student: NDArray[Any],
    num_valid: int,
    labels: NDArray[np.int64],
    lm_weight: NDArray[np.float32],
    z_weight: NDArray[np.float32] | None,
    statistics: NDArray[np.float32],
    threads: int,
    *,
    columns: NDArray[np.int64],
    student_temperature: float,
    spread: bool,
    factor: NDArray[np.float32] | None = None,
    shift: NDArray[np.float32] | None = None,
    listed: NDArray[np.float32] | None = None,
) -> None:
    """With a teacher that lists ids, ``columns`` ``[rows, K]``, whose logits stand behind the named columns. The
    gradient needs ``kernels.SparseSlope``."""

def sentence_cuts(tokens: NDArray[Any], classes: NDArray[np.uint8], window: int, starts: NDArray[np.int64]) -> int:
    """Not a sweep: csrc/data/sentence_cuts.h. Fills ``starts`` behind its first entry; returns how many entries are
    filled, that one counted. Raises IndexError for an id that ``classes`` has no entry for."""

ROW_CODE_LENGTHS: int
"""Bytes of a shard's table of code lengths."""
ROW_READ_AHEAD: int
"""Bytes behind a record that its decoder may look at."""

class RowEncoder:
    """Not a sweep: rows of a logits store to bytes (csrc/rows/row_encoder.h). frequency_ranks: the rank of each id."""

    def __init__(
        self,
        frequency_ranks: NDArray[np.int32],
        *,
        value: Literal["8", "16", "32", "count"],
        mass: Literal["one", "stored", "free"],
        draws: int,
        rows_for_codes: int,
    ) -> None: ...
    def add(
        self,
        ids: NDArray[np.int64] | None,
        values: NDArray[np.float32] | NDArray[np.int32] | None,
        entropies: NDArray[np.float32] | None,
    ) -> None:
        """One sample: ids and what they carry ``[rows, width]``; all None for one without targets. Raises ValueError
        for rows that cannot be stored; then nothing was taken."""

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint8]]:
        """Payload, with the bytes to read ahead; ``[samples + 1]`` offsets in it; code lengths."""

class RowDecoder:
    """Not a sweep: bytes of a logits store to rows (csrc/rows/row_decoder.h).

    Raises ValueError for lengths of no code."""

    def __init__(
        self,
        ids_of_ranks: NDArray[np.int32],
        *,
        value: Literal["8", "16", "32", "count"],
        mass: Literal["one", "stored", "free"],
        draws: int,
        lengths: NDArray[np.uint8],
    ) -> None: ...
    def decode(
        self,
        record: NDArray[np.uint8],
        ids: NDArray[np.int64],
        log_probs: NDArray[np.float32],
        entropies: NDArray[np.float32],
    ) -> int:
        """Fills the rows of a record, which has the bytes to read ahead behind it; rows behind the last are left as
        they are. Returns -1, or the row that is not what the encoder writes."""

class BytePairs:
    """Not a sweep: pairs of adjacent bytes to look for in texts (csrc/data/byte_pairs.cpp)."""

    def __init__(self, pairs: NDArray[np.uint8]) -> None:
        """pairs: ``[65536]``, not 0 at ``256 * first + second`` of each. Raises ValueError for another shape."""

    def found_in(self, text: bytes) -> bool:
        """Whether one of them is there."""
