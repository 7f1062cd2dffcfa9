"""What ``megakd capture`` is asked to do, checked against what is on disk; every refusal, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megakd.config.tree import option
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import check_vocabulary
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.scores.artefact import COUNTS, LOG_PROBS
from megakd.data.selection import Selection
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import UsageError
from megakd.logits.codec import rank_by_frequency
from megakd.logits.spec import StoreSpec
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.model.config import ModelShape
from megakd.pipeline.capture.store_parts import StoreWork
from megakd.pipeline.frozen.checks import common_tokenizer, skipped_token
from megakd.pipeline.frozen.config import FrozenConfig, precision
from megakd.pipeline.score.parts import Parts
from megakd.pipeline.score.preflight import masked_labels, unrecorded_vocabulary

_SHARD_TOKENS = 1 << 22  # a shard at most: hundreds of megabytes, and what a killed rank repeats
_LEAST_SHARDS = 64  # of a dataset, so that many ranks find work
_RANKED_TOKENS = 1 << 26  # tokens that are counted for the ranks of ids, at most


@dataclass(frozen=True)
class CaptureConfig(FrozenConfig):
    """What ``megakd capture`` is asked to do."""

    load: str = option(..., "the teacher: a checkpoint folder of 'megakd train'", common=True)
    iteration: int | None = option(None, "which checkpoint of --load (default: the latest)")
    output: str = option(
        ...,
        "folder for the store. Jobs on several machines need a file system on which flock works across them",
        common=True,
    )
    selection: str | None = option(
        None, "capture these samples alone: a folder of 'megakd select'; the others have no targets", common=True
    )
    kind: Literal["top_p_k", "samples", "renormalised_samples"] = option(
        "top_p_k",
        "top_p_k: the --top-k best ids, cut to the shortest prefix with mass --top-p (arXiv 2410.16215); samples: how "
        "often each id came in --draws draws, unbiased (arXiv 2503.16870); renormalised_samples: the ids of --draws "
        "draws with their probabilities, renormalised (Gemma 3)",
        common=True,
    )
    top_k: int | None = option(None, "of top_p_k: ids of a row, at most (default: 100)", common=True)
    top_p: float | None = option(
        None,
        "of top_p_k: mass under the whole softmax at which a row ends; 1: at --top-k (default: 0.95)",
        common=True,
    )
    draws: int | None = option(
        None, "of samples and renormalised_samples: draws of a row (default: 50, and 256 as Gemma 3)", common=True
    )
    proposal_exponent: float = option(
        1.0,
        "of samples: draw from the teacher's probabilities to this power, renormalised: at temperature 1/power. Each "
        "id then carries its share times p/q, which is unbiased too (arXiv 2503.16870: as good from 0.8 to 1.2)",
    )
    seed: int = option(1234, "of the draws, which depend on it, the dataset and the token position alone", common=True)
    value_bits: Literal["8", "16", "32"] | None = option(
        None,
        "of a log-probability: 8 (the default; about 5 in the end: levels of the eighth root), 16 (256 places in each "
        "level), 32 (exact); counts are exact",
        common=True,
    )
    scores_output: str | None = option(
        None, "score the samples in the same pass, as 'megakd score' does, to this folder", common=True
    )
    mask_policy: Literal["all", "skip_after_eod"] = option(
        "all", "of those scores, as of 'megakd score'; rows are of whole samples always", common=True
    )
    shard_samples: int = option(
        0, "samples of a shard; 0: 4M tokens, or a 64th of a small dataset: what a killed rank repeats", common=True
    )

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        super().validate()
        if self.cut[0] < 1 or not 0 < self.cut[1] <= 1:
            raise UsageError(f"--top-k {self.cut[0]}, --top-p {self.cut[1]}: expected at least 1, and a share up to 1")
        if self.draws is not None and self.draws < 1:
            raise UsageError(f"--draws {self.draws}: expected at least 1")
        if self.draws is not None and self.kind == "top_p_k":
            raise UsageError(
                f"--draws {self.draws} is for --kind samples or renormalised_samples; top_p_k draws nothing"
            )
        for name, kinds in (
            ("top_k", ["top_p_k"]),
            ("top_p", ["top_p_k"]),
            ("value_bits", ["top_p_k", "renormalised_samples", *(["samples"] if self.proposal_exponent != 1 else [])]),
        ):
            if getattr(self, name) is not None and self.kind not in kinds:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UsageError(f"{flag} is for --kind {' or '.join(kinds)}; {self.kind} has no use for it")
        if self.proposal_exponent != 1 and self.kind != "samples":
            raise UsageError(f"--proposal-exponent {self.proposal_exponent} is for --kind samples; here: {self.kind}")
        if not 0.5 <= self.proposal_exponent <= 1.5:
            raise UsageError(
                f"--proposal-exponent is {self.proposal_exponent}; expected 0.5 to 1.5: beyond, few draws carry most "
                "of the weight"
            )
        if self.shard_samples < 0:
            raise UsageError(f"--shard-samples is {self.shard_samples}; expected 0 or more")

    @property
    def cut(self) -> tuple[int, float]:
        """Ids of a row of top_p_k at most, and the mass at which it ends."""
        return 100 if self.top_k is None else self.top_k, 0.95 if self.top_p is None else self.top_p

    def rows(self) -> dict[str, Any]:
        """The fields of a StoreSpec that say what a row is."""
        top_k, top_p = self.cut
        return StoreSpec.rows(
            self.kind,
            value_bits=self.value_bits or "8",
            draws=self.draws,
            top_k=top_k,
            top_p=top_p,
            seed=self.seed,
            proposal_exponent=self.proposal_exponent,
        )


@dataclass(frozen=True)
class CapturePlan:
    """The configuration checked against what is on disk."""

    record: CheckpointRecord
    shape: ModelShape
    samples: Samples
    spec: StoreSpec
    work: StoreWork
    eod_token: int | None
    """What ends a document beside the index, if scores are made and their mask policy asks."""


def check_capture(config: CaptureConfig, world_size: int) -> CapturePlan:
    """Refuse what cannot work, and return what the rest of the run needs to know.

    Raises UsageError, MismatchError (also for a store in ``--output`` that is another than this one), CorruptError.
    """
    config.parallel().data_parallel_size(world_size)
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    return check_capture_of(record, config)


def check_capture_of(record: CheckpointRecord, config: CaptureConfig) -> CapturePlan:
    """The same for a teacher that is known, wherever it lies."""
    dataset = IndexedDataset(config.data_path)
    record, tokenizer = common_tokenizer(
        dataset, record, tokenizer_model=config.tokenizer_model, vocab_size=config.vocab_size
    )
    shape = config.frozen_shape(record)
    shape.check_layout(config.parallel(), "--load")
    selection = None if config.selection is None else Selection(config.selection)
    if selection is not None:
        selection.check(dataset, packing=config.packing, seq_length=config.seq_length)
    find_tokenizer = partial(open_tokenizer, dataset, tokenizer_model=config.tokenizer_model)
    samples = open_samples(config.packing, dataset, config.seq_length, find_tokenizer)
    check_vocabulary([samples], record.vocab_size)
    if config.kind == "top_p_k" and config.cut[0] > record.vocab_size:
        raise UsageError(f"--top-k {config.cut[0]}: the teacher's vocabulary has {record.vocab_size} ids")
    parents = {"dataset": dataset.fingerprint, "model": record.fingerprint}
    if selection is not None:
        parents["selection"] = selection.fingerprint
    spec = StoreSpec(
        vocab_size=record.vocab_size,
        packing=samples.packing,
        seq_length=config.seq_length,
        num_samples=samples.num_samples,
        shard_samples=config.shard_samples or default_shard_samples(samples.num_samples, config.seq_length),
        parents=parents,
        tokenizer=tokenizer,
        **config.rows(),
        details={"precision": precision(shape), "teacher_iteration": record.iteration},
    )
    ids = None if selection is None else np.asarray(selection.ids)
    eod_token = skipped_token(config.mask_policy, dataset, tokenizer)
    scores = None
    if config.scores_output is not None:
        if Path(config.scores_output).resolve() == Path(config.output).resolve():
            raise UsageError(f"--scores-output {config.scores_output} is --output too: give it a folder of its own")
        scores = _scores(
            Path(config.scores_output), spec, shape, ids, tokenizer, masked_labels(config.mask_policy, dataset)
        )
    frequency_ranks = token_ranks(dataset, record.vocab_size)
    work = StoreWork(Path(config.output), spec, frequency_ranks, ids=ids, scores=scores)
    work.check_all()
    return CapturePlan(record, shape, samples, spec, work, eod_token)


def _scores(
    folder: Path,
    spec: StoreSpec,
    shape: ModelShape,
    ids: NDArray[np.int64] | None,
    tokenizer: dict[str, Any] | None,
    masked: dict[str, str],
) -> Parts:
    """What of the scores is made in the same ranges."""
    sampled = {} if ids is None else {"sampled": {"selection": spec.parents["selection"], "num_scored": len(ids)}}
    parts = Parts(
        folder,
        num_samples=spec.num_samples,
        range_samples=spec.shard_samples,
        columns=(LOG_PROBS, COUNTS),
        parameters={
            "packing": spec.packing,
            "seq_length": spec.seq_length,
            **masked,
            "precision": precision(shape),
            **unrecorded_vocabulary(spec.vocab_size, tokenizer),
            **sampled,
        },
        parents={"dataset": spec.parents["dataset"], "model": spec.parents["model"]},
        tokenizer=tokenizer,
        ids=ids,
    )
    parts.check_all("--scores-output")
    return parts


def default_shard_samples(num_samples: int, seq_length: int) -> int:
    """Samples of a shard: a function of the dataset alone; nothing may depend on how many ranks there are."""
    return max(1, min(_SHARD_TOKENS // seq_length, -(-num_samples // _LEAST_SHARDS)))


def token_ranks(dataset: IndexedDataset, vocab_size: int) -> NDArray[np.int32]:
    """``[V]`` int32: the rank of each id by how often the dataset has it, so that rows are small; of a large dataset
    by even pieces of it."""
    tokens, pieces = dataset.tokens, 1024
    counts = np.zeros(vocab_size, np.int64)
    piece = -(-min(len(tokens), _RANKED_TOKENS) // pieces)
    for start in np.linspace(0, max(len(tokens) - piece, 0), pieces).astype(np.int64).tolist():
        counts += np.bincount(tokens[start : start + piece], minlength=vocab_size)[:vocab_size]
    return rank_by_frequency(counts)
