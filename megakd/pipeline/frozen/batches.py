"""What of a range the model sees by itself, and how that is put into microbatches: like lengths together, so that
little is computed for nothing.

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
class Stretches:
    """What the model sees by itself: of the sample at ``places`` in the range, ``lengths`` tokens from ``starts``."""

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @staticmethod
    def of_samples(lengths: NDArray[np.int64]) -> Stretches:
        """Every sample as a whole."""
        return Stretches(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), lengths)

    @staticmethod
    def of_documents(first: NDArray[np.bool_], lengths: NDArray[np.int64]) -> Stretches:
        """Every document, and part of one, of samples: each ends where the next one starts, or with its sample. One of
        a single token is left out: nothing in it could be predicted.

        first: ``[n, S + 1]``, whether a document starts with a token (``data.boundaries.begins_document``).

        To a causal model with rotary positions, which sees differences of positions alone, a document by itself is
        the same as a whole sample with a mask between documents and positions that begin anew in each.
        """
        within = np.arange(first.shape[1]) < lengths[:, None]
        begins = first | (np.arange(first.shape[1]) == 0)
        places, starts = np.nonzero(begins & within)
        stops = np.where(np.append(places[1:], -1) == places, np.append(starts[1:], 0), lengths[places])
        long = stops - starts > 1
        return Stretches(places[long], starts[long], (stops - starts)[long])

    @staticmethod
    def join(parts: Sequence[Stretches]) -> Stretches:
        """All of them, in order."""
        nothing = np.empty(0, dtype=np.int64)
        fields = ("places", "starts", "lengths")
        return Stretches(*(np.concatenate([nothing, *(getattr(part, name) for part in parts)]) for name in fields))

    def __getitem__(self, chosen: NDArray[np.int64]) -> Stretches:
        return Stretches(self.places[chosen], self.starts[chosen], self.lengths[chosen])


@dataclass(frozen=True)
class MicrobatchPlan:
    """One microbatch: the numbers of its stretches, and how many positions the model sees of each."""

    places: NDArray[np.int64]
    width: int


def plan_microbatches(
    lengths: NDArray[np.int64], *, micro_batch_size: int, seq_length: int, tensor_size: int = 1
) -> list[MicrobatchPlan]:
    """The microbatches of stretches of ``lengths`` tokens: each once, the last microbatch smaller where their number
    does not divide.

    They are taken by length, and of equal ones in their order. A width holds all labels of its stretches; it is a
    multiple of 64 and of ``tensor_size``, or ``seq_length``.
    """
    order = np.argsort(lengths, kind="stable")
    multiple = math.lcm(_WIDTH_MULTIPLE, tensor_size)
    plans = []
    for start in range(0, len(order), micro_batch_size):
        places = order[start : start + micro_batch_size]
        longest = max(1, int(lengths[places[-1]]) - 1)
        plans.append(MicrobatchPlan(places, min(-(-longest // multiple) * multiple, seq_length)))
    return plans


def read_microbatch(
    loader: Loader, ids_B: NDArray[np.int64], width: int, stretches: Stretches | None = None
) -> Microbatch:
    """``width`` positions of the samples ``ids_B`` of the loader's dataset, or of a stretch of each.

    Behind the end of a stretch stands what follows it in the sample, of which no label counts: attention is causal.
    """
    whole = loader.read(np.zeros(len(ids_B), dtype=np.int64), ids_B)
    if stretches is None:
        stretches = Stretches.of_samples(np.full(len(ids_B), loader.seq_length + 1))
    columns_BS = np.minimum(stretches.starts[:, None] + np.arange(width), loader.seq_length - 1)
    return Microbatch(
        np.take_along_axis(whole.tokens_BS, columns_BS, axis=1),
        np.take_along_axis(whole.labels_BS, columns_BS, axis=1),
        np.take_along_axis(whole.loss_mask_BS, columns_BS, axis=1)
        & (np.arange(1, width + 1) < stretches.lengths[:, None]),
        ids_B,
        whole.dataset_ids_B,
    )


def alike_plans(plans: Sequence[MicrobatchPlan], *, limit: int) -> Iterator[list[MicrobatchPlan]]:
    """Runs of at most ``limit`` plans of one shape, which a pipeline can take together."""
    for _, alike in itertools.groupby(plans, key=lambda plan: (len(plan.places), plan.width)):
        run = list(alike)
        yield from (run[start : start + limit] for start in range(0, len(run), limit))
