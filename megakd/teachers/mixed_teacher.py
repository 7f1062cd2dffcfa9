"""A teacher that mixes a store and a model: stored targets where there are any, the model's for other tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megakd.data.loader import StepBatch
from megakd.parallel import Groups
from megakd.targets import DenseTargets, Given, MixedTargets, SparseTargets, Unreadable
from megakd.teachers.model_teacher import ModelTeacher
from megakd.teachers.store_teacher import StoreTeacher


class MixedTeacher:
    """A store for some of the data and a model for the rest.

    The model runs for microbatches with a sample of a dataset whose store is not complete.

    groups: the student's groups. always: True to run the model for every microbatch, whatever is stored.
    """

    def __init__(self, stored: StoreTeacher, model: ModelTeacher, groups: Groups, *, always: bool = False) -> None:
        self._stored, self.model, self._groups = stored, model, groups
        self._incomplete = stored.incomplete | always

    def targets(self, batch: StepBatch) -> Iterator[Given | Unreadable]:
        """Yield the targets of this rank's microbatches in order. Every rank calls it."""
        stored = self._stored.targets(batch)  # first: its threads read while the model runs
        modelled = self.model.targets(batch, self._needed(batch))
        return (_join(from_store, from_model) for from_model, from_store in zip(modelled, stored))

    def _needed(self, batch: StepBatch) -> NDArray[np.bool_]:
        """Return bool ``[microbatches of the step, of all ranks]``, True for those that the model must run for.

        A function of the order of the data alone, so the same on every rank.
        """
        total = batch.num_microbatches * self._groups.data_size
        of_samples = self._incomplete[batch.draws.dataset_index].reshape(total, -1)
        return np.asarray(of_samples.any(1))


def _join(stored: Given | Unreadable, model: Given) -> Given | Unreadable:
    if stored is None:
        return model
    if model is None or isinstance(stored, Unreadable):
        return stored
    assert isinstance(stored, SparseTargets) and isinstance(model, DenseTargets)
    return MixedTargets(stored, model)
