"""The columns of one range of samples, gathered from what is said about stretches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.scores.artefact import COUNTS, DTYPES, LOG_PROBS, PER_TOKEN, UNSCORED
from megakd.pipeline.frozen.batches import Stretches


class RangeColumns:
    """The columns ``names`` over the samples ``[start, stop)``, of which ``ids`` are scored."""

    def __init__(self, names: Sequence[str], start: int, stop: int, ids: NDArray[np.int64], seq_length: int) -> None:
        shapes = {name: (stop - start, seq_length)[: 1 + (name in PER_TOKEN)] for name in names}
        self._columns = {name: np.full(shapes[name], UNSCORED[name], DTYPES[name]) for name in names}
        self._places = ids - start
        self._sums, self._counts = np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64)

    def add(self, stretches: Stretches, values: Mapping[str, NDArray[Any]]) -> None:
        """Take what a microbatch says of its stretches ``B`` of the scored samples.

        values: by column; ``LOG_PROBS`` (float64) and ``COUNTS`` ``[B]``, which are added up over the stretches of a
        sample, and ``[B, S]`` for those with a value a position, of which the first as many as a stretch has labels
        count.
        """
        np.add.at(self._sums, stretches.places, values[LOG_PROBS])
        np.add.at(self._counts, stretches.places, values[COUNTS])
        for name in PER_TOKEN:
            if name in self._columns:
                within_BS = np.arange(values[name].shape[1]) < stretches.lengths[:, None] - 1
                row, position = np.nonzero(within_BS)
                rows, columns = self._places[stretches.places[row]], stretches.starts[row] + position
                self._columns[name][rows, columns] = values[name][within_BS]

    def finish(self) -> dict[str, NDArray[Any]]:
        """The columns by file name."""
        self._columns[LOG_PROBS][self._places] = self._sums
        self._columns[COUNTS][self._places] = self._counts
        return self._columns
