"""``megakd collect``: the logits store that a run's journal holds, of what its model said while it was trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.config.tree import option, parse
from megakd.errors import ExitStatus, UsageError
from megakd.pipeline.capture.collect import Collection, open_collection
from megakd.work.console import tell
from megakd.work.progress import RangeProgress
from megakd.work.stop import StopFlag

HELP = "a logits store out of what 'train --logits-save-dir' kept"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class CollectConfig:
    """What ``megakd collect`` is asked to do."""

    journal: str = option(..., "the folder of 'megakd train --logits-save-dir'", common=True)
    data_path: str = option(..., "the dataset of which a store is wanted: PREFIX, without .bin or .idx", common=True)
    output: str = option(
        ...,
        "folder for the store. Jobs on several machines need a file system on which flock works across them",
        common=True,
    )
    from_step: int = option(0, "leave out what was said before this step", common=True)
    value_bits: Literal["8", "16", "32"] = option(
        "8",
        "of a log-probability, as of 'megakd capture'; the journal's are rounded already, where it has fewer",
        common=True,
    )
    shard_samples: int = option(
        0, "samples of a shard; 0: 4M tokens, or a 64th of a small dataset: what a killed process repeats"
    )
    skip_damaged: bool = option(
        False,
        "leave out what of the journal is not what was written (all of it is hashed first): those samples get rows of "
        "an earlier step, or none",
        common=True,
    )
    tokenizer_model: str | None = option(
        None, "where the dataset's tokenizer lies now, for sentence packing that is not written yet"
    )
    log_interval: float = option(10.0, "seconds between progress lines", common=True)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("from_step", "shard_samples", "log_interval"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        CollectConfig,
        argv,
        prog="megakd collect",
        description="Make a logits store of what a model said about its own batches while it was trained "
        "('megakd train --logits-save-dir'), for 'megakd train --logits-load-dir'. Of a sample that was met more than "
        "once the last step counts; steps.i32 tells which. Samples that were not met have no targets. Work is "
        "committed in shards: any number of processes with the same flags, started or killed at any time, continue "
        "it, and the result does not depend on how many there were.",
    )
    collection = open_collection(
        Path(config.journal),
        config.data_path,
        Path(config.output),
        from_step=config.from_step,
        value_bits=config.value_bits,
        shard_samples=config.shard_samples,
        skip_damaged=config.skip_damaged,
        tokenizer_model=config.tokenizer_model,
    )
    return collect(collection, log_interval=config.log_interval)


def collect(collection: Collection, *, log_interval: float) -> ExitStatus:
    """Make what is missing, with all other processes that do: COMPLETE, or STOPPED if a signal came first."""
    work = collection.work
    if work.finished() and not work.has_leftovers:
        tell(f"{work.folder}: finished already")
        return ExitStatus.COMPLETE
    progress = RangeProgress(
        work.num_wanted,
        seq_length=work.spec.seq_length,
        samples_done=work.samples_done,
        interval=log_interval,
        done="collected",
    )
    with StopFlag() as stop:
        while not work.finished():
            if stop.is_set():
                tell("stopped by a signal; finished shards are kept: the same command continues")
                return ExitStatus.STOPPED
            claim = work.claim()
            if claim is not None:
                work.commit(claim, collection.make(claim.index, progress), provenance={})
            elif work.complete and (lock := work.claim_finish()) is not None:
                manifest = work.finish(lock)
                tell(
                    f"{work.folder}: {work.num_wanted} of {work.num_samples} samples have targets, steps "
                    f"{work.spec.details['first_step']} to {work.spec.details['last_step']}, "
                    f"fingerprint {manifest.fingerprint}",
                    on="stdout",
                )
            else:
                time.sleep(_POLL_SECONDS)  # others have what is left; they may die of it
    if work.has_leftovers and (lock := work.claim_finish()) is not None:
        work.finish(lock)
    return ExitStatus.COMPLETE
