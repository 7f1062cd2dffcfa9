"""Random rounding of masses, up or down to one that a store can hold, so that each is right on average.

Axes: ``T`` token positions, ``K`` slots for ids.

The weight of an id that is drawn from another distribution than the teacher's is nearly the same number at all similar
positions. Rounded to the nearest level it would be off by the same few per cent every time, and no number of draws
would average that out. Rounded up with probability (mass - lower level) / (upper - lower level), it is right on
average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megakd.logits.codec import TOP_LEVEL, WEIGHT_UNIT, ValueBits
from megakd.splitmix64 import GOLDEN, mix64, states_at

_POWER = 8  # levels are equal steps of the 8th root of a mass


@dataclass(frozen=True)
class RandomRounding:
    """Rounding of weights at some token positions.

    A function of seed, dataset, token position and id alone, so the same in every layout and batch.

    token_positions_T: positions of the rows in the dataset. dataset: the dataset's fingerprint.
    """

    token_positions_T: NDArray[np.int64]
    value_bits: ValueBits
    seed: int
    dataset: str

    def round(self, log_masses_TK: NDArray[np.float64], ids_TK: NDArray[np.int64]) -> NDArray[np.float64]:
        """Round natural logarithms of masses up to ``WEIGHT_UNIT``; -inf is an empty slot.

        A mass below the smallest level may be rounded to 0, which is -inf. With 32 bits nothing is rounded.
        """
        if self.value_bits == 32:
            return log_masses_TK
        masses_TK = np.exp(log_masses_TK) / WEIGHT_UNIT
        steps = TOP_LEVEL if self.value_bits == 8 else TOP_LEVEL << 8
        place_TK = _place(masses_TK ** (1 / _POWER) * steps, self.value_bits)
        below_TK, above_TK = _mass(place_TK, self.value_bits), _mass(place_TK + 1, self.value_bits)
        share_TK = np.clip((masses_TK - below_TK) / (above_TK - below_TK), 0, 1)
        rounded_TK = np.where(self._uniforms(ids_TK) < share_TK, above_TK, below_TK)
        with np.errstate(divide="ignore"):
            logs_TK = np.log(rounded_TK) + np.log(WEIGHT_UNIT)
        return np.where(masses_TK > 0, logs_TK, -np.inf)

    def _uniforms(self, ids_TK: NDArray[np.int64]) -> NDArray[np.float64]:
        states_T = states_at(self.token_positions_T, f"rounding {self.seed} {self.dataset}")
        steps_TK = (ids_TK.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        uniforms: NDArray[np.float64] = (mix64(states_T[:, None] + steps_TK) >> np.uint64(11)).astype(np.float64)
        return uniforms * 2.0**-53


def _place(steps_TK: NDArray[np.float64], value_bits: ValueBits) -> NDArray[np.int64]:
    """Largest place whose mass is at most that of ``steps_TK`` steps; -1 if all are larger."""
    if value_bits == 8:  # level 0 stands for a quarter of a step
        return np.where(steps_TK < 0.25, -1, np.minimum(steps_TK.astype(np.int64), TOP_LEVEL - 1))
    return np.floor(np.minimum(steps_TK - 0.5, (TOP_LEVEL << 8) - 1)).astype(np.int64)


def _mass(place_TK: NDArray[np.int64], value_bits: ValueBits) -> NDArray[np.float64]:
    """Mass of a place, in units of ``WEIGHT_UNIT``; 0 for place -1."""
    steps_TK = np.maximum(place_TK, 0.25) / TOP_LEVEL if value_bits == 8 else (place_TK + 0.5) / (TOP_LEVEL << 8)
    return np.where(place_TK < 0, 0.0, steps_TK**_POWER)
