"""The work on one chunk of logits, as every implementation must offer it.

Axes: ``R`` rows (tokens of the chunk), ``v`` this rank's slice of the vocabulary, ``k`` statistics of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.vocab_parallel import KD_COLUMNS, LM_COLUMNS, RowStatistics


@dataclass(frozen=True)
class KDTerm:
    """How student and teacher are compared.

    divergence: a key of ``divergences.DIVERGENCES``.
    temperature: divides the teacher's logits, and the student's too when ``temperature_on`` is ``"both"``.
    scale_by_temperature_squared: multiply the divergence by temperature², so that its gradient keeps its size (Hinton
        et al., arXiv 1503.02531); only when the temperature is on both.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_on: Literal["teacher", "both"] = "both"
    scale_by_temperature_squared: bool = True

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise UsageError(f"divergence {self.divergence!r} is not one of {', '.join(DIVERGENCES)}")
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}, expected a number greater than 0")

    @property
    def student_temperature(self) -> float:
        return self.temperature if self.temperature_on == "both" else 1.0

    @property
    def scale(self) -> float:
        """Factor on the divergence."""
        both = self.temperature_on == "both"
        return self.temperature**2 if both and self.scale_by_temperature_squared else 1.0


@dataclass(frozen=True)
class Teacher:
    """The teacher's side of a chunk: logits ``[R, v]``, the weight ``[R]`` of each row's divergence, fp32, and the
    term."""

    logits_Rv: Tensor
    weight_R: Tensor
    term: KDTerm


@dataclass(frozen=True)
class Chunk:
    """What a kernel is given.

    student_Rv: the student's logits. A kernel may overwrite them with the gradient.
    num_valid: leading columns that are not padding.
    label_R: int64, the label's column in this slice; negative or >= num_valid where another rank holds it.
    lm_weight_R: fp32. A weight of 0 takes its term out of the gradient before any arithmetic.
    """

    student_Rv: Tensor
    num_valid: int
    label_R: Tensor
    lm_weight_R: Tensor
    teacher: Teacher | None

    @property
    def columns(self) -> tuple[str, ...]:
        return statistics_columns(None if self.teacher is None else self.teacher.term)


def statistics_columns(term: KDTerm | None) -> tuple[str, ...]:
    """The statistics of a row that the LM loss and ``term`` need, in order."""
    if term is None:
        return LM_COLUMNS
    return LM_COLUMNS + KD_COLUMNS + DIVERGENCES[term.divergence].columns


class Kernels(Protocol):
    """One implementation."""

    def statistics(self, chunk: Chunk) -> RowStatistics:
        """The statistics of this slice of every row."""

    def gradient(self, chunk: Chunk, rows: RowStatistics) -> Tensor:
        """``[R, v]``, the student's dtype: derivative of the chunk's weighted loss by its logits, from merged
        statistics."""

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        """Both at once where the slice is the whole vocabulary."""
