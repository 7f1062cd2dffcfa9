"""Types of the native kernels (csrc/bindings.cpp)."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def head_sweep(
    sweep: Literal["statistics", "gradient", "both"],
    student: NDArray[Any],
    teacher: NDArray[Any] | None,
    num_valid: int,
    labels: NDArray[np.int64],
    lm_weight: NDArray[np.float32],
    kd_weight: NDArray[np.float32] | None,
    divergence: str,
    student_temperature: float,
    teacher_temperature: float,
    kd_scale: float,
    statistics: NDArray[np.float32],
    threads: int,
) -> None:
    """One sweep over a chunk of logits ``[rows, columns]``, float32 or bf16 as uint16.

    ``"statistics"`` fills ``statistics`` ``[k, rows]``; ``"gradient"`` reads it and overwrites ``student``; ``"both"``
    does one after the other, row by row. Raises ValueError for arrays that do not fit.
    """
