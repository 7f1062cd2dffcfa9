"""Verb ``megakd collect``: a logits store from the journal that a training run kept of its own model's logits."""

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
    """Flags of ``megakd collect``."""

    journal: str = option(..., "folder of the journal: that of 'megakd train --logits-save-dir'", common=True)
    data_path: str = option(..., "the dataset that the store is for: PREFIX, without .bin or .idx", common=True)
    output: str = option(
        ...,
        "folder for the store. Jobs on several machines need a file system on which flock works across machines",
        common=True,
    )
    from_step: int = option(0, "first step whose rows are kept", common=True)
    value_bits: Literal["8", "16", "32"] = option(
        "8",
        "bits per stored log-probability, as for 'megakd capture'; more than the journal has add no precision",
        common=True,
    )
    shard_samples: int = option(
        0, "samples of a shard, the most that a killed process repeats; 0: 4M tokens, or a 64th of a small dataset"
    )
    skip_damaged: bool = option(
        False,
        "leave out damaged segments of the journal (all are hashed first): their samples get the rows of an earlier "
        "step, or none",
        common=True,
    )
    tokenizer_model: str | None = option(
        None,
        "file or folder of the dataset's tokenizer, if it has moved; needed for a sentence packing that is not "
        "written yet",
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
        description="Make a logits store, for 'megakd train --logits-load-dir', from the journal of a training run "
        "('megakd train --logits-save-dir'): the logits of the model for its own batches while it was trained. For a "
        "sample that came more than once the last step counts; steps.i32 has the step of each. Samples that never "
        "came have no targets. Work is saved in shards: processes with the same flags share it and may be started or "
        "killed at any time; the same command continues, and the result does not depend on how many there were.",
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
    """Make the shards that are missing, together with all other processes that do, and join them.

    log_interval: seconds between progress lines. Returns COMPLETE, or STOPPED if a signal came first.
    """
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
                time.sleep(_POLL_SECONDS)  # other processes work on the rest; ranges of one that dies become free
    if work.has_leftovers and (lock := work.claim_finish()) is not None:
        work.finish(lock)
    return ExitStatus.COMPLETE
