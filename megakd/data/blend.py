"""Blend of datasets: the dataset, and its sample, at each position of the training order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megakd.data.order import permute
from megakd.data.samples.protocol import Samples
from megakd.data.samples.split import PartSamples, Split
from megakd.errors import UsageError

_QUANTA = 1 << 32


@dataclass(frozen=True)
class Draws:
    """Index of the dataset, and sample id in it, for each of *n* positions. Both ``[n]`` int64."""

    dataset_index: NDArray[np.int64]
    sample_id: NDArray[np.int64]


class Blend:
    """Endless order over the samples of several datasets.

    Which sample stands at a position depends on the numbers of samples, the weights, the seed and the position, and on
    nothing else: not on how many steps are asked for, nor on the number of ranks. After *n* positions each dataset has
    been drawn from within one draw per level of its share (levels: datasets in the order given). The *k*-th draw from
    a dataset of *m* samples is place ``k % m`` of its epoch ``k // m``.

    weights: relative, positive; None draws in proportion to the number of samples, so that all end their epochs
    together.
    """

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float] | None, seed: int) -> None:
        if not datasets:
            raise UsageError("data_path is empty: expected at least one dataset")
        if not 0 <= seed < 2**62:
            raise UsageError(f"seed {seed}: expected a number from 0 to 2^62")
        self.datasets = list(datasets)
        self.given_weights = weights
        self.seed = seed
        self._quanta = _quantise([float(d.num_samples) for d in datasets] if weights is None else weights)
        if len(self._quanta) != len(self.datasets):
            raise UsageError(f"{len(self._quanta)} weights for {len(self.datasets)} datasets")

    @property
    def weights(self) -> list[float]:
        """The share of each dataset, in the exact multiples of 2^-32 that are used; they sum to 1."""
        return [quanta / _QUANTA for quanta in self._quanta]

    def draw(self, positions: NDArray[np.int64]) -> Draws:
        """Return the draws at ``positions``: ``[n]`` int64, in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        dataset_index = np.zeros(len(positions), dtype=np.int64)
        sample_id = np.empty(len(positions), dtype=np.int64)
        where, rest, total = np.arange(len(positions)), positions, _QUANTA
        for dataset, quanta in enumerate(self._quanta):
            before = _share(rest, quanta, total)
            taken = _share(rest + 1, quanta, total) > before
            dataset_index[where[taken]] = dataset
            sample_id[where[taken]] = self._order(dataset, before[taken])
            where, rest, total = where[~taken], (rest - before)[~taken], total - quanta
        return Draws(dataset_index, sample_id)

    def _order(self, dataset: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids of the ``draws``-th draws from one dataset."""
        num_samples = self.datasets[dataset].num_samples
        epochs, places = np.divmod(draws, num_samples)
        result = np.empty(len(draws), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            # Datasets of equal size must not run in step, so each has a seed of its own.
            result[in_epoch] = permute(places[in_epoch], num_samples=num_samples, seed=self.seed + dataset, epoch=epoch)
        return result


def part_of(blend: Blend, split: Split, part: int) -> Blend | None:
    """Return one part of every dataset of a blend, with the same weights; without datasets that have no sample in it.

    Raises UsageError if a dataset's training part has no sample.
    """
    datasets, weights = [], []
    for samples, weight in zip(blend.datasets, blend.given_weights or [1.0] * len(blend.datasets)):
        first, end = split.documents(samples.dataset.num_documents, part)
        cut = PartSamples(samples, first, end)
        if cut.num_samples:
            datasets.append(cut)
            weights.append(weight)
        elif part == 0:
            raise UsageError(
                f"--split {split.text}: the training part of {samples.dataset.prefix}, documents {first} to {end} of "
                f"{samples.dataset.num_documents}, has no sample; change --split, or drop the dataset"
            )
    return Blend(datasets, blend.given_weights and weights, blend.seed) if datasets else None


def parse_data_path(data_path: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """Read ``[p]``, ``[p1, p2, ...]`` or ``[w1, p1, w2, p2, ...]``; return weights, or None without any, and prefixes.

    Without weights, datasets are drawn from in proportion to their numbers of samples. Raises UsageError for any other
    form.
    """
    numbers = [_number(entry) for entry in data_path]
    if not data_path:
        raise UsageError("--data-path is empty: expected PREFIX..., or WEIGHT PREFIX WEIGHT PREFIX...")
    if numbers[0] is None:
        if strays := [entry for entry, number in zip(data_path, numbers) if number is not None]:
            raise UsageError(
                f"--data-path: weight {strays[0]!r} among prefixes without one: give every prefix a weight"
            )
        return None, list(data_path)
    if len(data_path) % 2 or None in numbers[::2] or any(number is not None for number in numbers[1::2]):
        raise UsageError(f"--data-path {' '.join(data_path)}: expected WEIGHT PREFIX WEIGHT PREFIX...")
    weights = [number for number in numbers[::2] if number is not None]
    _quantise(weights)
    return weights, list(data_path[1::2])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _quantise(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of the weights that sum to 2^32, by largest remainder, in exact arithmetic."""
    for weight in weights:
        if not math.isfinite(weight) or weight <= 0:
            raise UsageError(f"data weight {weight}: expected a finite number above 0")
    total = sum((Fraction(weight) for weight in weights), Fraction(0))
    exact = [Fraction(weight) * _QUANTA / total for weight in weights]
    quanta = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quanta[i] - exact[i], i))
    for i in by_remainder[: _QUANTA - sum(quanta)]:
        quanta[i] += 1
    if 0 in quanta:
        raise UsageError(f"data weight {weights[quanta.index(0)]}: less than 2^-32 of the sum {float(total)}")
    return quanta


def _share(count: NDArray[np.int64], quanta: int, total: int) -> NDArray[np.int64]:
    """``floor(count * quanta / total)`` without the product, which would leave 64 bits."""
    whole, rest = np.divmod(count, total)
    return whole * quanta + ((rest.astype(np.uint64) * np.uint64(quanta)) // np.uint64(total)).astype(np.int64)
