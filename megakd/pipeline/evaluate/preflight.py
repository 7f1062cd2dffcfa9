"""Flags of ``megakd evaluate``, checked against each other and against what is on disk, without torch."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megakd.data.agreement import Side, one_tokenizer, tokenizer_of_flags, true_vocabulary, unknown_tokenizers
from megakd.data.blend import Blend, parse_data_path, part_of
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import check_vocabulary
from megakd.data.samples.boundaries import check_boundaries
from megakd.data.samples.packing import open_samples
from megakd.data.samples.split import Split
from megakd.data.tokenizer import Tokenizer, build_tokenizer, same_tokenizer
from megakd.data.tokenizers.recorded import end_as_recorded, open_tokenizer, recorded_tokenizer
from megakd.errors import MismatchError, UsageError
from megakd.layout import is_first_rank
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.model.config import ModelShape
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.requests import RequestFile, read_requests
from megakd.work.console import tell


@dataclass(frozen=True)
class FrozenPlan:
    """A model of the evaluation: its record, with the true vocabulary, and the shape that it is run in."""

    record: CheckpointRecord
    shape: ModelShape


@dataclass(frozen=True)
class EvaluatePlan:
    """The configuration checked against what is on disk."""

    model: FrozenPlan
    teacher: FrozenPlan | None
    seq_length: int
    """Tokens of a sample of the held-out data, and the longest context of a task."""
    blend: Blend | None
    """Held-out data, in the order of training's own evaluation; None without any."""
    eod_token: int | None
    """Id that ends a document in the held-out data, besides its index; None if the mask does not need it."""
    tokenizer_record: dict[str, Any] | None
    tokenizer: Tokenizer | None
    """The model's tokenizer, opened if text is scored."""
    requests: tuple[RequestFile, ...]
    output: Path
    tensorboard: Path | None


def check_evaluate(config: EvaluateConfig, world_size: int) -> EvaluatePlan:
    """Refuse flags and files that cannot work together, and return what the run needs of them.

    Raises UsageError, MismatchError, CorruptError, with the value, what was expected, and the flag to change.
    """
    config.parallel().data_parallel_size(world_size)
    if config.task_names and find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-eval, which is not installed: pip install 'megakd[eval]'")
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    teacher = None
    if config.teacher_load is not None:
        teacher = read_record(
            config.teacher_load, config.teacher_iteration, role="--teacher-load", flag="--teacher-iteration"
        )
    seq_length = config.seq_length or record.seq_length
    config.check_seq_length(seq_length)
    datasets, weights = _open_datasets(config)
    tokenizer_record, vocab_size = _agree(config, datasets, record, teacher)
    tokenizer = _open_tokenizer(config, tokenizer_record) if config.scores_text else None
    eod_token = None
    blend = None
    if datasets:
        find = partial(open_tokenizer, tokenizer_type=config.tokenizer_type, tokenizer_model=config.tokenizer_model)
        samples = [open_samples(config.packing, dataset, seq_length, partial(find, dataset)) for dataset in datasets]
        check_vocabulary(samples, vocab_size)
        if config.eod_mask_loss:
            for dataset in datasets:
                eod_token = check_boundaries(dataset, tokenizer_record, "--eod-mask-loss", instead="drop the flag")
        blend = Blend(samples, weights, seed=0)  # the seed of training's evaluation, so that the two compare
        if config.split is not None:
            blend = part_of(blend, Split(config.split), 1)
            if blend is None:
                raise UsageError(f"--split {config.split} leaves no sample of {seq_length} tokens to evaluate on")
    return EvaluatePlan(
        model=_plan_model(config, record, vocab_size, seq_length),
        teacher=None if teacher is None else _plan_model(config, teacher, vocab_size, seq_length),
        seq_length=seq_length,
        blend=blend,
        eod_token=eod_token,
        tokenizer_record=tokenizer_record,
        tokenizer=tokenizer,
        requests=_read_all_requests(config),
        output=_writable(Path(config.output) if config.output is not None else _run_folder(record) / "evaluate"),
        tensorboard=_tensorboard(config, record),
    )


def _open_datasets(config: EvaluateConfig) -> tuple[list[IndexedDataset], list[float] | None]:
    if not config.held_out_path:
        return [], None
    weights, prefixes = parse_data_path(config.held_out_path)
    return [IndexedDataset(prefix) for prefix in prefixes], weights


def _agree(
    config: EvaluateConfig, datasets: list[IndexedDataset], record: CheckpointRecord, teacher: CheckpointRecord | None
) -> tuple[dict[str, Any] | None, int]:
    """Return the tokenizer that all parts share, None if it is not recorded anywhere, and the size of the vocabulary.

    Raises MismatchError for parts of different tokenizers, UsageError if nothing tells the vocabulary.
    """
    sides = [Side(f"dataset {dataset.prefix}", recorded_tokenizer(dataset)) for dataset in datasets]
    for model in (record, teacher):
        if model is not None:
            sides.append(
                Side(
                    f"the model {model.path}",
                    model.tokenizer,
                    model.vocab_size,
                    by_file=model.tokenizer_by_file,
                    padded=model.rows is not None,
                )
            )
    by_flags = tokenizer_of_flags(config.tokenizer_type, config.tokenizer_model, sides, vocab_size=config.vocab_size)
    if by_flags is not None:  # what the data was made with, where nothing is recorded
        sides = [by_flags, *(side for side in sides if side.tokenizer or side.vocab_size)]
    warning = unknown_tokenizers(sides)
    if warning is not None and is_first_rank():
        tell(warning)
    vocab_size = true_vocabulary(sides, stated=config.vocab_size)
    if vocab_size is None and record.rows is not None:
        raise UsageError(
            f"--load {record.path} tells {record.rows} rows of an embedding, padding among them, and nothing records "
            "a tokenizer: --tokenizer-type T --tokenizer-model FILE say which it is, or --vocab-size how many ids"
        )
    return one_tokenizer(sides), record.vocab_size if vocab_size is None else vocab_size


def _open_tokenizer(config: EvaluateConfig, recorded: dict[str, Any] | None) -> Tokenizer:
    """Open the model's tokenizer, for text. Raises UsageError where it is not known or is none for text."""
    kind = config.tokenizer_type or (recorded or {}).get("type")
    if kind is None or recorded is None:
        raise UsageError(
            f"--load {config.load} records no tokenizer, and tasks are text: say which it is with --tokenizer-type and "
            "--tokenizer-model"
        )
    if kind == "NullTokenizer":
        raise UsageError(
            f"--load {config.load} was trained on ids (NullTokenizer), which no text can be turned into: --tasks and "
            "--requests need a model of text"
        )
    model = config.tokenizer_model or recorded.get("path")
    try:
        tokenizer = build_tokenizer(kind, model)
    except UsageError as error:
        raise UsageError(f"opening the model's tokenizer: {error}; --tokenizer-model says where it is now") from error
    end_as_recorded(tokenizer, recorded)
    if not same_tokenizer(recorded, tokenizer):
        raise MismatchError(
            f"the tokenizer {model} is not the model's: {tokenizer.hash} there, {recorded['hash']} recorded; "
            "--tokenizer-model says where the right one is"
        )
    return tokenizer


def _read_all_requests(config: EvaluateConfig) -> tuple[RequestFile, ...]:
    files = tuple(read_requests(Path(path), limit=config.limit) for path in config.requests)
    names = [file.name for file in files]
    if twice := next((file for file in files if names.count(file.name) > 1), None):
        raise UsageError(f"--requests: two files of the name '{twice.name}', one of them {twice.path}: rename one")
    return files


def _plan_model(config: EvaluateConfig, record: CheckpointRecord, vocab_size: int, seq_length: int) -> FrozenPlan:
    record = dataclasses.replace(record, vocab_size=vocab_size, rows=None)
    shape = config.shape_of(record, seq_length)
    shape.check_layout(config.parallel(), record.role)
    return FrozenPlan(record, shape)


def _writable(folder: Path) -> Path:
    """Return a folder that results can be written to. Raises UsageError, before hours are spent on them."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--output {folder}: {there} is a file; expected a folder, new or there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: no permission to write in {there}; give a folder that can be written")
    return folder


def _run_folder(record: CheckpointRecord) -> Path:
    """Folder that the results of a checkpoint stand in: that of its run, or of the model itself."""
    return record.path.parent if record.path.name.startswith("iter_") else record.path


def _tensorboard(config: EvaluateConfig, record: CheckpointRecord) -> Path | None:
    if config.tensorboard_dir is not None:
        return Path(config.tensorboard_dir)
    folder = _run_folder(record) / "tensorboard"
    return folder if folder.is_dir() else None
