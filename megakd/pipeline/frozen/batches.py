"""Microbatches of a range: samples, or single documents of them, of similar lengths together to save padding.

The microbatches are a pure function of the range: they do not depend on the process that works on it, on how many
others there are, or on what was done before.
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
    """Parts of samples, each seen by the model alone: ``lengths`` tokens from ``starts`` on. Fields: ``[n]`` int64.

    places: positions of the samples in the range's array of ids. starts: first token of each part within its sample.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @staticmethod
    def of_samples(lengths: NDArray[np.int64]) -> Stretches:
        """One stretch for each sample, whole. lengths: ``[N]``, tokens of each sample."""
        return Stretches(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), lengths)

    @staticmethod
    def of_documents(first: NDArray[np.bool_], lengths: NDArray[np.int64]) -> Stretches:
        """One stretch for each document, or part of a document, in the samples.

        A stretch ends where the next one starts, or with its sample. One of a single token is left out, because
        nothing in it can be predicted.

        first: ``[N, S + 1]``, true where a document starts (`begins_document`). lengths: ``[N]``, tokens of a sample.

        A causal model with rotary positions sees only differences of positions. To it a document alone is equal to a
        whole sample with an attention mask between documents and positions that begin anew in each.
        """
        within = np.arange(first.shape[1]) < lengths[:, None]
        begins = first | (np.arange(first.shape[1]) == 0)
        places, starts = np.nonzero(begins & within)
        stops = np.where(np.append(places[1:], -1) == places, np.append(starts[1:], 0), lengths[places])
        long = stops - starts > 1
        return Stretches(places[long], starts[long], (stops - starts)[long])

    @staticmethod
    def join(parts: Sequence[Stretches]) -> Stretches:
        """Concatenate, in order."""
        nothing = np.empty(0, dtype=np.int64)
        fields = ("places", "starts", "lengths")
        return Stretches(*(np.concatenate([nothing, *(getattr(part, name) for part in parts)]) for name in fields))

    def __getitem__(self, chosen: NDArray[np.int64]) -> Stretches:
        return Stretches(self.places[chosen], self.starts[chosen], self.lengths[chosen])


@dataclass(frozen=True)
class MicrobatchPlan:
    """One microbatch to be read: ``places``, ``[B]`` indices of its stretches, and ``width``, positions of each row."""

    places: NDArray[np.int64]
    width: int


def plan_microbatches(
    lengths: NDArray[np.int64], *, micro_batch_size: int, seq_length: int, tensor_size: int = 1
) -> list[MicrobatchPlan]:
    """Divide stretches of ``lengths`` tokens into microbatches, each stretch once, sorted by length (stably).

    The last microbatch is smaller if their number does not divide. A width is large enough for all labels of its
    stretches; it is a multiple of 64 and of ``tensor_size`` (ranks that split a sequence), or ``seq_length``.
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
    """Read the first ``width`` positions of the samples ``ids_B``, or those of one stretch of each.

    loader: over one dataset. Behind the end of a stretch stands what follows in its sample, masked in the loss: a
    causal model does not see it.
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


@dataclass(frozen=True)
class AlikeMicrobatches:
    """Microbatches of one shape in the form in which a teacher takes those of a training step.

    stretches: parts of samples that each microbatch holds; empty where microbatches are made of something else.
    """

    microbatches: Sequence[Microbatch]
    stretches: Sequence[Stretches] = ()

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        """Microbatch ``index``. The rank does not matter: each copy of the model has microbatches of its own."""
        return self.microbatches[index]

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)


def alike_plans(plans: Sequence[MicrobatchPlan], *, limit: int) -> Iterator[list[MicrobatchPlan]]:
    """Group neighbouring plans of one shape, at most ``limit`` together: what a pipeline can take in one pass."""
    for _, alike in itertools.groupby(plans, key=lambda plan: (len(plan.places), plan.width)):
        run = list(alike)
        yield from (run[start : start + limit] for start in range(0, len(run), limit))
