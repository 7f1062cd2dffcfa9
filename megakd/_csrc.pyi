"""Types of the native kernels (csrc/module.cpp).

The functions ``sweep_...`` go over a chunk of logits ``[rows, columns]``, float32 or bf16 as uint16, whose columns from
``num_valid`` on are padding. ``"statistics"`` fills ``statistics`` ``[k, rows]``; ``"gradient"`` reads it and
overwrites ``student``; ``"both"`` does one after the other, row by row. losses/vocab_parallel.py names the columns.
They raise ValueError for arrays that do not fit.
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
    """Sweep for the LM loss alone."""

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
    """Sweep with a sparse teacher. columns: ``[rows, K]``, the listed ids as columns of the slice.

    The logits of the listed ids follow the named columns of ``statistics``. factor, shift, listed: the fields of
    ``protocol.SparseSlope``, for ``"gradient"``.
    """

def sentence_cuts(tokens: NDArray[Any], classes: NDArray[np.uint8], window: int, starts: NDArray[np.int64]) -> int:
    """Cut tokens into windows that end with a sentence (csrc/data/sentence_cuts.h).

    Fills ``starts`` after its first entry; returns the number of filled entries, the first included. Raises IndexError
    for an id without an entry in ``classes``.
    """

ROW_CODE_LENGTHS: int
"""Size in bytes of a shard's table of code lengths."""
ROW_READ_AHEAD: int
"""Number of bytes after a record that its decoder may read."""

class RowEncoder:
    """Encoder of rows of a logits store (csrc/rows/row_encoder.h). frequency_ranks: the rank of each id."""

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
        """Encode one sample: ids and their values ``[rows, width]``, entropies ``[rows]``; all None without targets.

        Raises ValueError for rows that cannot be stored; then nothing was taken.
        """

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint8]]:
        """Return the payload, followed by ``ROW_READ_AHEAD`` bytes; its offsets ``[samples + 1]``; the code lengths."""

class RowDecoder:
    """Decoder of rows of a logits store (csrc/rows/row_decoder.h).

    Raises ValueError for lengths that make no code.
    """

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
        """Decode a record, which ``ROW_READ_AHEAD`` more bytes follow; array rows after its last are not touched.

        Returns -1, or the number of the first row that the encoder cannot have written.
        """

class BytePairs:
    """A set of pairs of adjacent bytes to look for in texts (csrc/data/byte_pairs.cpp)."""

    def __init__(self, pairs: NDArray[np.uint8]) -> None:
        """Make the set. pairs: ``[65536]``, not 0 at ``256 * first + second`` of each.

        Raises ValueError for another shape.
        """

    def found_in(self, text: bytes) -> bool:
        """Return whether the text contains one of the pairs."""
