"""Logits store from a journal, one shard after the other: each sample's rows are those of the last step that met it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter
from megakd.data.agreement import Side, one_tokenizer, tokenizer_of_flags
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.tokenizers.recorded import open_tokenizer, recorded_tokenizer
from megakd.errors import MismatchError, UsageError
from megakd.logits.journal import STEPS, Journal, manifest_paths, run_folder
from megakd.logits.spec import StoreSpec, bits_of
from megakd.model.checkpoint.record import checkpoint_path, latest_iteration, read_record
from megakd.pipeline.capture.preflight import default_shard_samples, token_ranks
from megakd.pipeline.capture.store_parts import Captured, StoreWork
from megakd.work.console import tell
from megakd.work.progress import RangeProgress

_SAMPLES_AT_ONCE = 256  # read from the dataset together


class OnlineStoreWork(StoreWork):
    """Store with the training step of each sample. steps: ``[num_samples]`` int32, -1 for a sample without targets."""

    def __init__(
        self, folder: Path, spec: StoreSpec, frequency_ranks: NDArray[np.int32], steps: NDArray[np.int32]
    ) -> None:
        super().__init__(folder, spec, frequency_ranks, ids=np.flatnonzero(steps >= 0))
        self._steps = steps

    def _more_files(self) -> Sequence[FileRecord]:
        with HashingWriter(self.folder / STEPS) as writer:
            writer.write(self._steps.astype("<i4").data)
            return [writer.commit()]


class Collection:
    """A journal and the store that is made of it.

    places: ``[num_samples]`` int64, where the rows of each sample are in the journal.
    """

    def __init__(self, journal: Journal, samples: Samples, places: NDArray[np.int64], work: OnlineStoreWork) -> None:
        self._journal, self._samples, self._places, self.work = journal, samples, places, work

    def make(self, index: int, progress: RangeProgress | None = None) -> Captured:
        """Write the shard of range ``index``, not yet committed.

        Raises MismatchError if the model saw other input ids than the dataset has, CorruptError for a damaged journal.
        """
        ids, shard = self.work.ids_of(index), self.work.new_shard(index)
        for first in range(0, len(ids), _SAMPLES_AT_ONCE):
            chunk = ids[first : first + _SAMPLES_AT_ONCE]
            for sample, tokens in zip(chunk.tolist(), self._samples.read(chunk)):
                try:
                    rows = self._journal.read(int(self._places[sample]), tokens[:-1])
                except MismatchError as error:
                    raise MismatchError(f"sample {sample} of {self._samples.dataset.prefix}: {error}") from error
                shard.add(sample, tokens[: rows.num_rows], rows)
            if progress is not None:
                progress.tick(first + len(chunk))
        return Captured(shard, {})


def open_collection(
    journal: Path,
    data_path: str,
    output: Path,
    *,
    from_step: int = 0,
    value_bits: str = "8",
    shard_samples: int = 0,
    skip_damaged: bool = False,
    tokenizer_model: str | None = None,
) -> Collection:
    """Open the journal of a dataset, and the unfinished store in ``output``.

    Says on stderr which parts of the journal are left out. shard_samples: 0 chooses a size.

    Raises UsageError without a journal, or with an empty one, MismatchError if it is of other data or ``output`` holds
    another store, CorruptError for damaged files.
    """
    dataset = IndexedDataset(data_path)
    folder = journal / dataset.fingerprint
    if not folder.is_dir():
        datasets = sorted(path.name for path in journal.glob("*/") if manifest_paths(path))
        if not datasets:
            hint = f": give {journal.parent}" if manifest_paths(journal) else ""
            raise UsageError(f"{journal}: not a folder that 'megakd train --logits-save-dir' kept rows in{hint}")
        raise MismatchError(
            f"{journal}: a journal of dataset {', '.join(datasets)}; {data_path} is {dataset.fingerprint}: "
            "give what was trained on"
        )
    source = Journal(folder, from_step=from_step, counted=_counted(folder), skip_damaged=skip_damaged)
    for steps_left in source.not_counted:
        tell(f"{folder}: steps {steps_left} are left out: no checkpoint of the run has them")
    for name in source.damaged:
        tell(f"{folder}: segment {name} is left out: it is not what was written")
    if source.left_out:
        tell(f"{folder}: samples were met {source.left_out} times with logits that are not finite: no rows of that")
    spec = source.spec
    sides = [
        Side(f"dataset {data_path}", recorded_tokenizer(dataset)),
        Side(f"the journal {folder}", spec.tokenizer),
    ]
    given = tokenizer_of_flags(None, tokenizer_model, sides)
    one_tokenizer(sides if given is None else [*sides, given])
    find_tokenizer = partial(open_tokenizer, dataset, tokenizer_model=tokenizer_model)
    samples = open_samples(spec.packing, dataset, spec.seq_length, find_tokenizer)  # type: ignore[arg-type]
    if samples.num_samples != spec.num_samples:
        raise MismatchError(
            f"{folder}: of {spec.num_samples} samples under packing {spec.packing}, {data_path} has "
            f"{samples.num_samples}: give what was trained on"
        )
    steps, places = source.latest()
    collected_steps = steps[steps >= 0]
    if not len(collected_steps):
        raise UsageError(f"{folder}: no rows from step {from_step} on (--from-step)")
    store = replace(
        spec,
        value_bits=bits_of(spec.kind, value_bits),
        shard_samples=shard_samples or default_shard_samples(spec.num_samples, spec.seq_length),
        parents={"dataset": dataset.fingerprint, "model": source.fingerprint},
        details={"online": True, "first_step": int(collected_steps.min()), "last_step": int(collected_steps.max())},
    )
    work = OnlineStoreWork(output, store, token_ranks(dataset, spec.vocab_size), steps)
    work.check_all()
    return Collection(source, samples, places, work)


def _counted(folder: Path) -> tuple[str, ...] | None:
    """Segments of a journal that the newest checkpoint of its run names; None if the run's folder has no checkpoint."""
    save = folder / run_folder(folder)
    iteration = latest_iteration(save)
    if iteration is None or not checkpoint_path(save, iteration).exists():
        return None
    return read_record(save, iteration, role="the run's checkpoint").journal
