"""Flags of ``megakd capture``, checked against each other and against what is on disk, without torch."""

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

_SHARD_TOKENS = 1 << 22  # of a shard at most: hundreds of megabytes, and the most that a killed rank repeats
_LEAST_SHARDS = 64  # of a dataset, so that many ranks find work
_RANKED_TOKENS = 1 << 26  # counted for the frequency ranks of ids, at most


@dataclass(frozen=True)
class CaptureConfig(FrozenConfig):
    """Flags of ``megakd capture``."""

    load: str = option(..., "the teacher: a folder of checkpoints, or a Hugging Face folder", common=True)
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)")
    output: str = option(
        ...,
        "folder for the store. Jobs on several machines need a file system on which flock works across machines",
        common=True,
    )
    selection: str | None = option(
        None,
        "folder of 'megakd select' with the only samples that are captured; the others have no targets",
        common=True,
    )
    kind: Literal["top_p_k", "samples", "renormalised_samples"] = option(
        "top_p_k",
        "content of a row. top_p_k: the --top-k best ids, cut to the shortest prefix with mass --top-p (arXiv "
        "2410.16215); samples: how often each id came in --draws draws, unbiased (arXiv 2503.16870); "
        "renormalised_samples: the ids of --draws draws with their probabilities, renormalised (Gemma 3)",
        common=True,
    )
    top_k: int | None = option(None, "most ids of a row, with top_p_k (default: 100)", common=True)
    top_p: float | None = option(
        None,
        "probability mass under the whole softmax at which a row ends, with top_p_k; 1: at --top-k ids (default: 0.95)",
        common=True,
    )
    draws: int | None = option(
        None, "draws of a row (default: 50 with samples, 256 with renormalised_samples, as Gemma 3)", common=True
    )
    proposal_exponent: float = option(
        1.0,
        "power of the teacher's probabilities that samples are drawn from, renormalised: a temperature of 1/power. "
        "Each id then has its share of the draws times p/q, which is unbiased too (arXiv 2503.16870: as "
        "good from 0.8 to 1.2)",
    )
    seed: int = option(1234, "seed of the draws; a draw depends only on seed, dataset and token position", common=True)
    value_bits: Literal["8", "16", "32"] | None = option(
        None,
        "bits per stored log-probability: 8 (default, about 5 after coding: equal steps of p^(1/8)), 16 (256 places "
        "within each step) or 32 (exact); counts are always exact",
        common=True,
    )
    scores_output: str | None = option(
        None, "folder for scores of the samples, computed in the same pass, as 'megakd score' does", common=True
    )
    mask_policy: Literal["all", "skip_after_eod"] = option(
        "all", "labels that count in the scores, as for 'megakd score'; rows are always of whole samples", common=True
    )
    shard_samples: int = option(
        0,
        "samples of a shard, the most that a killed rank repeats; 0: 4M tokens, or a 64th of a small dataset",
        common=True,
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
        """Most ids of a row of top_p_k, and the probability mass at which a row ends."""
        return 100 if self.top_k is None else self.top_k, 0.95 if self.top_p is None else self.top_p

    def rows(self) -> dict[str, Any]:
        """Fields of a `StoreSpec` that describe a row."""
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
    """Id that ends a document besides the index, if scores are made and their mask policy needs it."""


def check_capture(config: CaptureConfig, world_size: int) -> CapturePlan:
    """Refuse flags and files that cannot work together, and return what the run needs of them.

    Raises UsageError, MismatchError (also if ``--output`` holds another store than this one), CorruptError.
    """
    config.parallel().data_parallel_size(world_size)
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    return check_capture_of(record, config)


def check_capture_of(record: CheckpointRecord, config: CaptureConfig) -> CapturePlan:
    """Check as `check_capture` does, for a checkpoint record already read; the world size is not checked."""
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
    """Scores in ``folder`` that are made in the ranges of the store's shards. masked: their parameters on labels."""
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
    """Samples of a shard: a function of the dataset alone, because no result may depend on the number of ranks."""
    return max(1, min(_SHARD_TOKENS // seq_length, -(-num_samples // _LEAST_SHARDS)))


def token_ranks(dataset: IndexedDataset, vocab_size: int) -> NDArray[np.int32]:
    """``[V]`` int32: rank of each id by its frequency in the dataset, which makes rows small.

    A dataset of more than 2^26 tokens is counted in 1,024 evenly spaced pieces.
    """
    tokens, pieces = dataset.tokens, 1024
    counts = np.zeros(vocab_size, np.int64)
    piece = -(-min(len(tokens), _RANKED_TOKENS) // pieces)
    for start in np.linspace(0, max(len(tokens) - piece, 0), pieces).astype(np.int64).tolist():
        counts += np.bincount(tokens[start : start + piece], minlength=vocab_size)[:vocab_size]
    return rank_by_frequency(counts)
