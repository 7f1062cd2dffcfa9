"""The implementations of the chunk kernels by name, and which one does a chunk."""

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
"""In order of preference: native on CPUs, triton on GPUs where it is installed, plain torch for the rest."""


@cache
def made(name: str) -> Kernels:
    """The kernels of one name; there is one object of each."""
    return IMPLEMENTATIONS[name]()


def kernels_for(chunk: Chunk, implementation: Implementation) -> Kernels:
    """The named implementation; ``auto`` takes the first that can do the chunk.

    Raises UsageError where the named one cannot, or does not exist.
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
