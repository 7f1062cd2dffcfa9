"""Flags of ``megakd prune`` checked against the teacher, the dataset and what lies in ``--save``, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import check_vocabulary
from megakd.data.order import permute
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import UsageError
from megakd.model.checkpoint.record import CheckpointRecord, latest_iteration, read_record
from megakd.model.config import ModelShape
from megakd.pipeline.frozen.checks import common_tokenizer
from megakd.pipeline.frozen.config import precision
from megakd.pipeline.frozen.output_folder import check_output
from megakd.pipeline.prune.artefact import MANIFEST, Importance, read_importance
from megakd.pipeline.prune.config import PruneConfig
from megakd.pipeline.prune.student import student_shape


@dataclass(frozen=True)
class PrunePlan:
    """The configuration checked against what is on disk.

    shape: the teacher's, as it runs. ids: ``[n]`` calibration samples, ascending. settings: what a measured importance
    depends on besides its parents. importance: measured by an earlier run; None to measure it.
    """

    record: CheckpointRecord
    shape: ModelShape
    student: ModelShape
    samples: Samples
    ids: NDArray[np.int64]
    tokenizer: dict[str, Any] | None
    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    importance: Importance | None


def check_prune(config: PruneConfig, world_size: int) -> PrunePlan:
    """Refuse flags and files that cannot work together, and return what the run needs of them.

    Raises UsageError, MismatchError, CorruptError.
    """
    config.parallel().data_parallel_size(world_size)
    folder = Path(config.save)
    if folder.is_dir() and latest_iteration(folder) is not None:
        raise UsageError(f"--save {folder} holds checkpoints already; give the student a folder of its own")
    check_output(folder, "--save", MANIFEST)
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    dataset = IndexedDataset(config.data_path)
    record, tokenizer = common_tokenizer(
        dataset, record, tokenizer_model=config.tokenizer_model, vocab_size=config.vocab_size
    )
    bf16 = record.shape.bf16 if config.bf16 is None else config.bf16
    shape = record.shape.frozen(transformer_impl="local", bf16=bf16, fp8_format=None, fp8_recipe="delayed")
    student = dataclasses.replace(student_shape(config, record.shape), bf16=bf16)
    for model, role in ((shape, "the teacher"), (student, "the student")):
        model.check_layout(config.parallel(), role)
    find_tokenizer = partial(open_tokenizer, dataset, tokenizer_model=config.tokenizer_model)
    samples = open_samples(config.packing, dataset, config.seq_length, find_tokenizer)
    check_vocabulary([samples], record.vocab_size)
    parents = {"teacher": record.fingerprint, "dataset": dataset.fingerprint}
    settings = {
        "calibration_samples": min(config.calibration_samples, samples.num_samples),
        "seed": config.seed,
        "packing": samples.packing,
        "seq_length": config.seq_length,
        "precision": precision(shape),
        "sequence_aggregation": config.sequence_aggregation,
        "sample_aggregation": config.sample_aggregation,
    }
    importance = None
    if config.importance is not None:
        importance = read_importance(config.importance)
        importance.check(record.shape, settings=settings, parents=parents)
    ids = draw_calibration(samples.num_samples, count=config.calibration_samples, seed=config.seed)
    return PrunePlan(record, shape, student, samples, ids, tokenizer, settings, parents, importance)


def draw_calibration(num_samples: int, *, count: int, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` sample ids, or all; ``[n]`` int64, ascending.

    A pure function of its arguments. A larger count contains every id of a smaller one with the same seed.
    """
    # Its own key: with the plain seed the ids would be the samples that a training run sees first.
    key = xxhash.xxh3_64_intdigest(f"calibration sample {seed}".encode()) >> 2
    places = np.arange(min(count, num_samples))
    return np.sort(permute(places, num_samples=num_samples, seed=key, epoch=0))
