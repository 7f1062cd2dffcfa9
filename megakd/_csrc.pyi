"""Types of the native kernels (csrc/bindings.cpp).

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

def sweep_pair(
    sweep: Literal["statistics", "second", "gradient", "both"],
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
    """With the logits of a teacher, which are only read. All but ``"statistics"`` have the second columns behind the
    first; ``"second"`` reads those and fills these."""

def sweep_listed(
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
    gradient needs ``kernels.ListedSlope``."""

def sentence_cuts(tokens: NDArray[Any], classes: NDArray[np.uint8], window: int, starts: NDArray[np.int64]) -> int:
    """Not a sweep: csrc/sentence_cuts.h. Fills ``starts`` behind its first entry; returns how many entries are filled,
    that one counted. Raises IndexError for an id that ``classes`` has no entry for."""
