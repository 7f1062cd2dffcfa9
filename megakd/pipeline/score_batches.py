"""How the samples of a range are put into microbatches: like lengths together, so that little is computed for nothing.

A pure function of the range: who scores it, with whom, and after what, changes no shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megakd.data.loader import Loader, Microbatch

_WIDTH_MULTIPLE = 64  # widths that differ less cost more in separate batches than they save


@dataclass(frozen=True)
class Piece:
    """One microbatch: the places of its samples in the range, and how many positions the model sees of each."""

    places: NDArray[np.int64]
    width: int


def cut_range(
    lengths: NDArray[np.int64], *, micro_batch_size: int, seq_length: int, tensor_size: int = 1
) -> list[Piece]:
    """The microbatches of a range whose samples have ``lengths`` tokens: each sample once, the last microbatch smaller
    where the range does not divide.

    Samples are taken by length, and of equal ones in their order. A width holds all labels of its samples; it is a
    multiple of 64 and of ``tensor_size``, or ``seq_length``.
    """
    order = np.argsort(lengths, kind="stable")
    multiple = math.lcm(_WIDTH_MULTIPLE, tensor_size)
    pieces = []
    for start in range(0, len(order), micro_batch_size):
        places = order[start : start + micro_batch_size]
        longest = max(1, int(lengths[places[-1]]) - 1)
        pieces.append(Piece(places, min(-(-longest // multiple) * multiple, seq_length)))
    return pieces


def read_piece(loader: Loader, ids_B: NDArray[np.int64], width: int) -> Microbatch:
    """The samples ``ids_B`` of the loader's dataset, ``width`` positions of each."""
    whole = loader.read(np.zeros(len(ids_B), dtype=np.int64), ids_B)
    return Microbatch(
        np.ascontiguousarray(whole.tokens_BS[:, :width]),
        np.ascontiguousarray(whole.labels_BS[:, :width]),
        np.ascontiguousarray(whole.loss_mask_BS[:, :width]),
        ids_B,
        whole.dataset_ids_B,
    )


def batch_pieces(pieces: Sequence[Piece], *, limit: int) -> Iterator[list[Piece]]:
    """Runs of at most ``limit`` pieces of one shape, which a pipeline can take together."""
    for _, alike in itertools.groupby(pieces, key=lambda piece: (len(piece.places), piece.width)):
        run = list(alike)
        yield from (run[start : start + limit] for start in range(0, len(run), limit))
