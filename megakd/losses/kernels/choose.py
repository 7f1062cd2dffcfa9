"""The implementations of the kernels by name, and the choice of one for a chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

from megakd.errors import UsageError
from megakd.losses.kernels.gpu.launch import TritonKernels
from megakd.losses.kernels.native import NativeKernels
from megakd.losses.kernels.protocol import Chunk, Kernels
from megakd.losses.kernels.reference import ReferenceKernels

Implementation = Literal["auto", "native", "triton", "reference"]

IMPLEMENTATIONS: dict[str, Callable[[], Kernels]] = {
    "native": NativeKernels,
    "triton": TritonKernels,
    "reference": ReferenceKernels,
}
"""Implementations in order of preference: native on CPUs, triton on GPUs if it is installed, else plain torch."""


@cache
def made(name: str) -> Kernels:
    """Return the kernels of one name, always the same object."""
    return IMPLEMENTATIONS[name]()


def kernels_for(chunk: Chunk, implementation: Implementation) -> Kernels:
    """Return the named implementation; for ``auto`` the first that can do the chunk.

    Raises UsageError if the named one cannot do it, or does not exist.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise UsageError(f"implementation {implementation!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    names = list(IMPLEMENTATIONS) if implementation == "auto" else [implementation]
    for name in names:
        if made(name).supports(chunk):
            return made(name)
    term = None if chunk.teacher is None else chunk.teacher.term
    raise UsageError(
        f"implementation {implementation} cannot do {chunk.student_Rv.dtype} on {chunk.student_Rv.device}, "
        f"{'contiguous' if chunk.student_Rv.is_contiguous() else 'not contiguous'}"
        + (f" with divergence {term.divergence}" if term else "")
        + ": use auto or reference"
    )
