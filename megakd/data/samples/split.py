"""Parts of a dataset by contiguous ranges of its documents, as Megatron's ``--split`` cuts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megakd.data.samples.protocol import Samples
from megakd.data.samples.subset import SubsetSamples
from megakd.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Shares of training, validation and test. text: three numbers in any unit, such as ``949,50,1``."""

    text: str

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares that sum to 1. Raises UsageError if the text is no list of shares."""
        numbers = [float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", self.text)]
        numbers += [0.0] * (3 - len(numbers))
        plain = re.fullmatch(r"[\s'\"]*[0-9.]+(\s*[,/]\s*[0-9.]+){0,2}[\s'\"]*", self.text)
        if not plain or len(numbers) != 3 or not 0 < sum(numbers) < 1e18:
            raise UsageError(f"--split is '{self.text}'; expected shares of training, validation and test, as 969,30,1")
        if numbers[0] == 0:
            raise UsageError(f"--split {self.text}: no share for training")
        total = sum(numbers)
        return numbers[0] / total, numbers[1] / total, numbers[2] / total

    def documents(self, num_documents: int, part: int) -> tuple[int, int]:
        """First document of a part, and the document after its last. part: 0 training, 1 validation, 2 test."""
        ends = np.cumsum([0.0, *self.shares])
        first, end = (min(round(float(share) * num_documents), num_documents) for share in ends[part : part + 2])
        return first, end


class PartSamples(SubsetSamples):
    """Samples that lie wholly in documents ``[first, end)``: *i* is sample *i* + ``offset`` of the source.

    No token of another part is ever read; a sample across the border of two parts belongs to neither. Scores,
    selections and stores are addressed by the ids in the whole dataset. ``packing`` names the documents, so that a data
    order cannot be continued with another split. A part may be empty.
    """

    def __init__(self, samples: Samples, first: int, end: int) -> None:
        super().__init__(samples)
        self.packing = f"{samples.packing}, documents {first} to {end}"
        start_token, end_token = self.dataset.document_start(first), self.dataset.document_start(end)
        self.offset = _first(samples.num_samples, lambda sample: _start(samples, sample) >= start_token)
        last = _first(samples.num_samples, lambda sample: _end(samples, sample) > end_token)
        self.num_samples = max(0, last - self.offset)

    def source_ids(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the ids of the samples in the source. Raises IndexError for an id out of range."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.num_samples)]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {self.num_samples}")
        return ids + self.offset


def _start(samples: Samples, sample: int) -> int:
    return int(samples.starts(np.array([sample]))[0])


def _end(samples: Samples, sample: int) -> int:
    return _start(samples, sample) + int(samples.lengths(np.array([sample]))[0])


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """First number below ``count`` for which ``holds``, which then stays true; ``count`` without one."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
