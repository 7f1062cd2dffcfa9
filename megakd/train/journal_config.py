"""Options for keeping the output distribution of the model in training, and their refusals. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megakd.config.tree import option
from megakd.data.blend import Blend
from megakd.data.samples.selected import unselected
from megakd.errors import UsageError
from megakd.logits.journal import check_journal, segment_samples, training_spec
from megakd.logits.spec import StoreSpec


@dataclass
class LogitsSaveConfig:
    """Options for keeping the outputs of the model in training."""

    dir: str | None = option(
        None,
        "folder for a journal of the model's own outputs on its batches, for later students; 'megakd collect' makes a "
        "logits store of it",
        common=True,
    )
    from_step: int = option(
        1, "first step whose outputs are kept: late steps teach better (arXiv 2410.16215)", common=True
    )
    kind: Literal["top_p_k", "samples", "renormalised_samples"] = option(
        "top_p_k", "kind of rows, as --kind of 'megakd capture'"
    )
    top_k: int = option(100, "top_p_k: most ids of a row")
    top_p: float = option(
        0.95, "top_p_k: mass under the whole softmax at which a row ends; 1: every row has --logits-save-top-k ids"
    )
    draws: int | None = option(None, "samples and renormalised_samples: draws a row (default: 50 and, as Gemma 3, 256)")
    value_bits: Literal["8", "16", "32"] = option(
        "16", "bits per log-probability in the journal; 'megakd collect' rounds once more, to its own --value-bits"
    )
    seed: int = option(1234, "seed of the draws; a draw depends only on seed, dataset and token position")

    def validate(self) -> None:
        flag = "--logits-save"
        if self.top_k < 1 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"{flag}-top-k {self.top_k}, {flag}-top-p {self.top_p}: expected at least 1, and a share up to 1"
            )
        if self.draws is not None and (self.draws < 1 or self.kind == "top_p_k"):
            raise UsageError(
                f"{flag}-draws {self.draws}: expected at least 1, with {flag}-kind samples or renormalised_samples"
            )
        if self.from_step < 1:
            raise UsageError(f"{flag}-from-step is {self.from_step}; expected at least 1")


def journal_specs(
    config: LogitsSaveConfig, blend: Blend, *, save: str | None, vocab_size: int, tokenizer: dict[str, Any] | None
) -> tuple[StoreSpec, ...]:
    """Return the form of the rows of each dataset; an empty tuple if none are kept.

    Raises UsageError, and MismatchError for a journal of other rows or of another run.
    """
    if config.dir is None:
        return ()
    if save is None:
        raise UsageError(f"--logits-save-dir {config.dir}: rows count once a checkpoint is saved: add --save DIR")
    if config.kind == "top_p_k" and config.top_k > vocab_size:
        raise UsageError(f"--logits-save-top-k {config.top_k}: the vocabulary has {vocab_size} ids")
    for path in (Path(config.dir), *Path(config.dir).parents):
        if path.exists() and not path.is_dir():
            raise UsageError(
                f"--logits-save-dir {config.dir}: a file is there ({path}); expected a folder, new or there"
            )
    rows = StoreSpec.rows(
        config.kind,
        value_bits=config.value_bits,
        draws=config.draws,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    specs = []
    for samples in map(unselected, blend.datasets):
        spec = StoreSpec(
            vocab_size=vocab_size,
            packing=samples.packing,
            seq_length=samples.seq_length,
            num_samples=samples.num_samples,
            shard_samples=segment_samples(samples.seq_length),
            parents={"dataset": samples.dataset.fingerprint, "model": ""},
            tokenizer=tokenizer,
            **rows,
        )
        folder = journal_folder(config.dir, spec)
        specs.append(training_spec(spec, folder, save))
        check_journal(folder, specs[-1])
    return tuple(specs)


def journal_folder(folder: str, spec: StoreSpec) -> Path:
    """Return the folder of one dataset's journal, which is named by the dataset's fingerprint."""
    return Path(folder) / spec.parents["dataset"]
