"""Loader: the batches of every step, for any rank, and a state from which it continues.

Axes: ``B`` microbatch, ``S`` sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from megakd.data.batch_sizes import BatchSizes, Ramp
from megakd.data.blend import Blend, Draws
from megakd.data.samples.boundaries import begins_document
from megakd.data.samples.protocol import Samples
from megakd.errors import MismatchError, UsageError


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward-backward."""

    tokens_BS: NDArray[np.int64]
    labels_BS: NDArray[np.int64]
    """The next token of each token."""
    loss_mask_BS: NDArray[np.bool_]
    """True where the label counts."""
    sample_ids_B: NDArray[np.int64]
    dataset_ids_B: NDArray[np.int64]


class StepBatch:
    """The samples of one step. Any rank can read any rank's microbatches: a teacher may be laid out otherwise.

    Sample *j* of the step is row ``b`` of microbatch ``m`` of rank ``r`` with ``j = (m * dp + r) * mbs + b``: which
    samples a step trains on does not depend on the number of ranks.
    """

    def __init__(self, loader: Loader, sample_positions: NDArray[np.int64]) -> None:
        self._loader = loader
        self.sample_positions = sample_positions
        """``[global batch size of this step]`` int64: places in the endless order of the blend."""
        self.draws: Draws = loader.blend.draw(sample_positions)
        """Dataset and sample id at each place."""

    @property
    def num_microbatches(self) -> int:
        """Microbatches per rank."""
        return len(self.sample_positions) // (self._loader.micro_batch_size * self._loader.data_parallel_size)

    def __len__(self) -> int:
        return self.num_microbatches

    def __iter__(self) -> Iterator[Microbatch]:
        return (self.microbatch(index) for index in range(self.num_microbatches))

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        """Read microbatch ``index`` of a rank, by default of this rank. Every call reads from disk."""
        loader = self._loader
        rank = loader.data_parallel_rank if data_parallel_rank is None else data_parallel_rank
        if not (0 <= index < self.num_microbatches and 0 <= rank < loader.data_parallel_size):
            raise IndexError(
                f"microbatch {index} of {self.num_microbatches}, rank {rank} of {loader.data_parallel_size}"
            )
        start = (index * loader.data_parallel_size + rank) * loader.micro_batch_size
        rows = slice(start, start + loader.micro_batch_size)
        return loader.read(self.draws.dataset_index[rows], self.draws.sample_id[rows])

    def parts(self, num_microbatches: int) -> Iterator[StepBatch]:
        """Cut the step into batches of ``num_microbatches`` microbatches for each rank, which must divide its own."""
        size = num_microbatches * self._loader.data_parallel_size * self._loader.micro_batch_size
        firsts = range(0, len(self.sample_positions), size)
        return (StepBatch(self._loader, self.sample_positions[first : first + size]) for first in firsts)


class Loader:
    """Endless iterator of `StepBatch`; `state` describes its place in plain data.

    global_batch_size: samples per step over all ranks; a multiple of micro_batch_size * data_parallel_size.
    rampup: smaller batches at first, see `BatchSizes`; the order of the samples does not depend on it.
    eod_token, eod_mask_loss: leave out of the loss the labels behind an end-of-document id, as Megatron's flag does,
        and those with which a document starts by the index, for documents that end with no id (``data.boundaries``).
    vocab_size: refuse larger token ids: at once if the manifest has the largest id, else when they are read.
    state: from `state`, to continue there. Only the global batch size may differ.

    Raises UsageError for sizes that do not divide and ids beyond the vocabulary, MismatchError for a state of other
    data or of another order.
    """

    def __init__(
        self,
        blend: Blend,
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        eod_token: int | None = None,
        eod_mask_loss: bool = False,
        vocab_size: int | None = None,
        rampup: Ramp | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("global_batch_size", global_batch_size),
            ("data_parallel_size", data_parallel_size),
        ):
            if value < 1:
                raise UsageError(f"{name} {value}: expected at least 1")
        self._sizes = BatchSizes(global_batch_size, rampup)
        for size in self._sizes.levels:
            if size % (micro_batch_size * data_parallel_size):
                raise UsageError(
                    f"global_batch_size {size} is not a multiple of micro_batch_size {micro_batch_size} x "
                    f"data-parallel size {data_parallel_size} = {micro_batch_size * data_parallel_size}"
                )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise UsageError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        for samples in blend.datasets:
            if samples.seq_length != seq_length:
                raise UsageError(f"{samples.dataset.prefix}: samples of {samples.seq_length}, seq_length {seq_length}")
        if eod_mask_loss:
            for samples in blend.datasets:
                samples.dataset.check()  # now, because its index is not read before the first step
        if vocab_size is not None:
            check_vocabulary(blend.datasets, vocab_size)
        self.blend = blend
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.consumed_samples = 0
        self._eod_token, self._eod_mask_loss = eod_token, eod_mask_loss
        self._vocab_size = vocab_size
        self._upcoming: StepBatch | None = None
        if state is not None:
            self._restore(state)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        batch = self._step(self.consumed_samples) if self._upcoming is None else self._upcoming
        self.consumed_samples += len(batch.sample_positions)
        self._upcoming = self._step(self.consumed_samples)
        self._prefetch(self._upcoming)
        return batch

    def state(self) -> dict[str, Any]:
        """Place of the next step, and everything that decides the order. Plain data, equal on every rank."""
        names = [Path(samples.dataset.prefix).name for samples in self.blend.datasets]  # for people
        place = {"consumed_samples": self.consumed_samples, "global_batch_size": self.global_batch_size}
        return {**place, **self._order(), "names": names}

    def order_fingerprint(self) -> str:
        """XXH3-128, in hexadecimal, of the datasets, their weights, packing, sequence length, names and order."""
        state = self.state()
        del state["consumed_samples"], state["global_batch_size"]  # they cut the order into steps and do not change it
        return xxhash.xxh3_128_hexdigest(orjson.dumps(state, option=orjson.OPT_SORT_KEYS))

    def rewind(self, consumed_samples: int) -> None:
        """Go back to the step that starts after ``consumed_samples`` samples; the steps from there on come again."""
        self.consumed_samples, self._upcoming = consumed_samples, None

    def read(self, dataset_index_B: NDArray[np.int64], sample_id_B: NDArray[np.int64]) -> Microbatch:
        """Read samples by dataset and id as one microbatch."""
        rows = np.empty((len(sample_id_B), self.seq_length + 1), dtype=np.int64)
        lengths = np.empty(len(sample_id_B), dtype=np.int64)
        mask = np.ones((len(sample_id_B), self.seq_length), dtype=np.bool_)
        for dataset in np.unique(dataset_index_B).tolist():
            of_dataset_B = dataset_index_B == dataset
            samples = self.blend.datasets[dataset]
            rows[of_dataset_B] = samples.read(sample_id_B[of_dataset_B])
            lengths[of_dataset_B] = samples.lengths(sample_id_B[of_dataset_B])
            if self._vocab_size is not None and samples.dataset.max_token_id is None:
                _check_ids(samples, sample_id_B[of_dataset_B], rows[of_dataset_B], self._vocab_size)
            if self._eod_mask_loss:
                first = begins_document(
                    samples, sample_id_B[of_dataset_B], rows[of_dataset_B], eod_token=self._eod_token
                )
                mask[of_dataset_B] = ~first[:, 1:]
        mask &= np.arange(1, self.seq_length + 1) < lengths[:, None]  # false for padding
        tokens, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return Microbatch(tokens, labels, mask, sample_id_B, dataset_index_B)

    def _step(self, first: int) -> StepBatch:
        return StepBatch(self, np.arange(first, first + self._sizes.at(first), dtype=np.int64))

    def _prefetch(self, batch: StepBatch) -> None:
        """Tell the kernel what this rank reads next, so that a cold disk is read during the step."""
        per_microbatch = (batch.num_microbatches, self.data_parallel_size, self.micro_batch_size)
        datasets, ids = (
            array.reshape(per_microbatch)[:, self.data_parallel_rank].reshape(-1)
            for array in (batch.draws.dataset_index, batch.draws.sample_id)
        )
        for dataset in np.unique(datasets).tolist():
            self.blend.datasets[dataset].prefetch(ids[datasets == dataset])

    def _order(self) -> dict[str, Any]:
        return {
            "seed": self.blend.seed,
            "seq_length": self.seq_length,
            "packing": [samples.packing for samples in self.blend.datasets],
            "datasets": [samples.dataset.fingerprint for samples in self.blend.datasets],
            "weights": self.blend.weights,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        order = self._order()
        if any(state.get(key) != value for key, value in order.items()):
            raise MismatchError(
                f"cannot continue the data order: {_changes(state, self.state())}; use "
                "the old setting, or start from the weights alone"
            )
        self.consumed_samples = int(state["consumed_samples"])


def check_vocabulary(datasets: Sequence[Samples], vocab_size: int) -> None:
    """Raise UsageError for a dataset whose manifest records an id beyond a vocabulary of ``vocab_size``."""
    for samples in datasets:
        largest = samples.dataset.max_token_id
        if largest is not None and largest >= vocab_size:
            raise UsageError(
                f"{samples.dataset.prefix}: token id {largest}, the vocabulary has {vocab_size} entries; "
                "the dataset was made with another tokenizer"
            )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Differences between two states of `Loader.state` that change the order, in words."""
    datasets = [_name_datasets(then), _name_datasets(now)]
    if then.get("datasets") != now["datasets"]:
        return "--data-path was {}, is now {}".format(*datasets)
    flags = {"seed": "--seed", "seq_length": "--seq-length", "packing": "--packing or --selection"}
    changes = [
        f"{flag} was {then.get(key)}, is now {now[key]}" for key, flag in flags.items() if then.get(key) != now[key]
    ]
    if then.get("weights") != now["weights"]:
        changes.append("the weights of --data-path were {}, are now {}".format(*datasets))
    return ", ".join(changes)


def _name_datasets(state: Mapping[str, Any]) -> str:
    """Datasets in words: ``0.7 books (3f0c1d2e) + 0.3 code (9a8b7c6d)``, with the fingerprints' first eight digits."""
    fingerprints, weights = state.get("datasets", []), state.get("weights", [])
    names = state.get("names", [""] * len(fingerprints))  # older states have none
    parts = [f"{name} ({fingerprint[:8]})".lstrip() for name, fingerprint in zip(names, fingerprints)]
    if len(parts) > 1:
        parts = [f"{weight:.4g} {part}" for weight, part in zip(weights, parts)]
    return " + ".join(parts) or "unknown"


def _check_ids(samples: Samples, sample_ids: NDArray[np.int64], rows: NDArray[np.int64], vocab_size: int) -> None:
    if rows.max() >= vocab_size or rows.min() < 0:
        row, column = np.argwhere((rows >= vocab_size) | (rows < 0))[0].tolist()
        raise UsageError(
            f"{samples.dataset.prefix}: token id {rows[row, column]} in sample {sample_ids[row]} at token position "
            f"{int(samples.starts(sample_ids[row : row + 1])[0]) + column}, the vocabulary has {vocab_size} entries"
        )
