"""Flags of ``megakd score``, checked against each other and against what is on disk, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.config.tree import option
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import check_vocabulary
from megakd.data.order import permute
from megakd.data.samples.boundaries import boundaries_of
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.scores.artefact import COUNTS, LOG_PROBS, TOKEN_ENTROPIES, TOKEN_LOG_PROBS
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import UsageError
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.model.config import ModelShape
from megakd.model.proxy.artefact import Proxy, read_proxy
from megakd.pipeline.frozen.checks import common_tokenizer, skipped_token
from megakd.pipeline.frozen.config import FrozenConfig, precision
from megakd.pipeline.score.parts import Parts


@dataclass(frozen=True)
class ScoreConfig(FrozenConfig):
    """Flags of ``megakd score``."""

    load: str | None = option(None, "the model: a folder of checkpoints, or a Hugging Face folder", common=True)
    proxy: str | None = option(
        None,
        "folder of 'megakd proxy', in place of --load: scores are its predictions of teacher minus reference",
        common=True,
    )
    output: str = option(
        ...,
        "folder for the scores; unfinished work is in its subfolder parts. Jobs on several machines need a file system "
        "on which flock works across machines (NFS does, unless mounted with nolock or local_lock)",
        common=True,
    )
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)")
    mask_policy: Literal["all", "skip_after_eod", "reset"] = option(
        "all",
        "labels that count. all: every position; skip_after_eod: all but the first token of each further document, by "
        "the index or behind an end-of-document id (as MiniPLM's code); reset: as skip_after_eod, and the model sees "
        "each document alone, as with an attention mask and positions by document",
        common=True,
    )
    per_token_log_probs: bool = option(False, "store the log-probability of each token too (fp16)", common=True)
    per_token_entropy: bool = option(False, "store the entropy at each position too (fp16)", common=True)
    sample_fraction: float = option(
        1.0,
        "score only this share of the samples, drawn by --sample-seed: what 'megakd proxy' learns from",
        common=True,
    )
    sample_seed: int = option(
        1234, "seed of the draw; the same seed draws the same samples for every model", common=True
    )
    range_samples: int = option(
        0,
        "samples that are saved together, the most that a killed rank repeats; 0: 512, or a 16384th of the dataset if "
        "that is more, divided by --sample-fraction",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Files of the scores, without the manifest."""
        per_token = [TOKEN_LOG_PROBS] * self.per_token_log_probs + [TOKEN_ENTROPIES] * self.per_token_entropy
        return (LOG_PROBS, COUNTS, *per_token)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if (self.load is None) == (self.proxy is None):
            raise UsageError("which model? --load CHECKPOINT, or --proxy DIR of 'megakd proxy': one of them")
        if self.proxy is not None and (self.iteration, self.per_token_log_probs, self.per_token_entropy) != (
            None,
            0,
            0,
        ):
            raise UsageError("--proxy gives one number a sample: no --iteration, and nothing per token")
        if self.range_samples < 0:
            raise UsageError(f"--range-samples is {self.range_samples}; expected 0 or more")
        if not 0 < self.sample_fraction <= 1:
            raise UsageError(f"--sample-fraction {self.sample_fraction}: expected more than 0, and 1 for all samples")
        super().validate()


@dataclass(frozen=True)
class ScorePlan:
    """The configuration checked against what is on disk."""

    record: CheckpointRecord
    shape: ModelShape
    samples: Samples
    eod_token: int | None
    """Id that ends a document besides the index, if the mask policy needs it and the tokenizer has one."""
    parts: Parts
    proxy: Proxy | None = None
    """Proxy whose predictions are the scores; None: log-probabilities under the model's own head."""


def check_score(config: ScoreConfig, world_size: int) -> ScorePlan:
    """Refuse flags and files that cannot work together, and return what the run needs of them.

    Raises UsageError, MismatchError (also if ``--output`` holds other scores than these), CorruptError.
    """
    config.parallel().data_parallel_size(world_size)
    if config.proxy is not None:
        proxy = read_proxy(config.proxy)
        proxy.check_samples(packing=config.packing, seq_length=config.seq_length, mask_policy=config.mask_policy)
        return check_score_of(proxy.record, config, proxy)
    assert config.load is not None  # validate
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    return check_score_of(record, config)


def check_score_of(record: CheckpointRecord, config: ScoreConfig, proxy: Proxy | None = None) -> ScorePlan:
    """Check as `check_score` does, for a checkpoint record already read; the world size is not checked."""
    dataset = IndexedDataset(config.data_path)
    record, tokenizer = common_tokenizer(
        dataset, record, tokenizer_model=config.tokenizer_model, vocab_size=config.vocab_size
    )
    shape = config.frozen_shape(record)
    shape.check_layout(config.parallel(), "--load" if proxy is None else "--proxy")
    find_tokenizer = partial(open_tokenizer, dataset, tokenizer_model=config.tokenizer_model)
    samples = open_samples(config.packing, dataset, config.seq_length, find_tokenizer)
    check_vocabulary([samples], record.vocab_size)
    eod_token = skipped_token(config.mask_policy, dataset, tokenizer)
    ids: NDArray[np.int64] | None = None
    optional: dict[str, Any] = {}
    if proxy is not None:
        scale = proxy.manifest.parameters["fit"]["teacher_scale"]
        optional["predicts"] = {"difference": "teacher - reference", "teacher_scale": scale}
    if config.sample_fraction < 1:
        ids = draw_sample(samples.num_samples, fraction=config.sample_fraction, seed=config.sample_seed)
        optional["sampled"] = {"fraction": config.sample_fraction, "seed": config.sample_seed, "num_scored": len(ids)}
    scored_together = max(512, -(-samples.num_samples // 16384))
    parts = Parts(
        Path(config.output),
        num_samples=samples.num_samples,
        range_samples=config.range_samples or math.ceil(scored_together / config.sample_fraction),
        columns=config.columns,
        parameters={
            "packing": samples.packing,
            "seq_length": config.seq_length,
            **masked_labels(config.mask_policy, dataset),
            "precision": precision(shape),
            **unrecorded_vocabulary(record.vocab_size, tokenizer),
            **optional,
        },
        parents={"dataset": dataset.fingerprint, "model": (proxy.manifest if proxy else record).fingerprint},
        tokenizer=tokenizer,
        ids=ids,
    )
    parts.check_all()
    return ScorePlan(record, shape, samples, eod_token, parts, proxy)


def draw_sample(num_samples: int, *, fraction: float, seed: int) -> NDArray[np.int64]:
    """Draw ``round(fraction * num_samples)`` sample ids, at least one; ``[n]`` int64, ascending.

    A pure function of its arguments. A larger fraction contains every id of a smaller one with the same seed.
    """
    count = max(1, round(fraction * num_samples))
    # Its own key: with the plain seed the ids would be the samples that a training run sees first.
    key = xxhash.xxh3_64_intdigest(f"scored sample {seed}".encode()) >> 2
    return np.sort(permute(np.arange(count), num_samples=num_samples, seed=key, epoch=0))


def masked_labels(mask_policy: str, dataset: IndexedDataset) -> dict[str, str]:
    """Parameters by which scores record the labels that they leave out."""
    told_by = {} if mask_policy == "all" else {"boundaries": boundaries_of(dataset)}
    return {"mask_policy": mask_policy, **told_by}


def unrecorded_vocabulary(vocab_size: int, tokenizer: Mapping[str, Any] | None) -> dict[str, int]:
    """Parameter with the size of the scored vocabulary, for manifests whose tokenizer does not have it."""
    return {} if tokenizer is not None and tokenizer["vocab_size"] == vocab_size else {"vocab_size": vocab_size}
