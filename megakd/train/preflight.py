"""Checks of a training run before it starts, in a second or two: all that needs no process group.

No megatron; torch only if the list of tensors of a checkpoint is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megakd.data.agreement import Side, one_tokenizer, tokenizer_of_flags, true_vocabulary, unknown_tokenizers
from megakd.data.blend import Blend, parse_data_path, part_of
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import Loader, check_vocabulary
from megakd.data.samples.boundaries import check_boundaries
from megakd.data.samples.packing import Packing, open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.samples.selected import SelectedSamples, selection_of
from megakd.data.selection import Selection
from megakd.data.tokenizers.recorded import open_tokenizer, recorded_tokenizer
from megakd.errors import MismatchError, UsageError
from megakd.layout import ParallelConfig
from megakd.logits.spec import StoreSpec
from megakd.logits.store import LogitsStore
from megakd.model.checkpoint.record import CheckpointRecord, check_resume, latest_iteration, read_record
from megakd.model.config import ModelShape
from megakd.model.huggingface.export_plan import check_exportable
from megakd.model.low_precision import check_rows
from megakd.train.config import CheckpointConfig, DataConfig, TrainConfig, TrainingConfig
from megakd.train.journal_config import journal_specs
from megakd.train.record.writers import check_writers
from megakd.train.stored_targets import check_stores, open_stores
from megakd.train.teacher_config import TeacherConfig


@dataclass(frozen=True)
class Plan:
    """A training run, resolved from its configuration and checked against the data and the checkpoints on disk."""

    student: ModelShape
    vocab_size: int
    seq_length: int
    tokenizer: dict[str, Any] | None
    blend: Blend
    valid_blend: Blend | None
    resume: CheckpointRecord | None
    weights_only: bool
    """True for a new run that takes only the weights of ``resume``."""
    teacher: CheckpointRecord | None
    teacher_shape: ModelShape | None
    teacher_layout: ParallelConfig
    """The model's as teacher; the student's where there is none."""
    stores: tuple[LogitsStore | None, ...] = ()
    """One for each dataset, None for a dataset without a store; empty if no store is read."""
    valid_stores: tuple[LogitsStore | None, ...] = ()
    journal: tuple[StoreSpec, ...] = ()
    """Form of the kept rows of the student's own distribution, one for each dataset; empty if none are kept."""
    warnings: tuple[str, ...] = ()
    """Lines about what could not be checked."""

    @property
    def continued(self) -> CheckpointRecord | None:
        """The checkpoint of the run that this one continues; None for a new run, from whatever weights."""
        return None if self.weights_only else self.resume

    @property
    def has_teacher(self) -> bool:
        """True if there is anything to distil from: a model, or targets stored for some of the training data."""
        return self.teacher is not None or self.reads_stores

    @property
    def reads_stores(self) -> bool:
        """True if some of the training data has stored targets."""
        return any(store is not None for store in self.stores)

    @property
    def parents(self) -> dict[str, str]:
        """Fingerprints of the datasets, selections, stores and teacher that this run is made from."""
        fingerprints = {
            f"data{index}": samples.dataset.fingerprint for index, samples in enumerate(self.blend.datasets)
        }
        for index, samples in enumerate(self.blend.datasets):
            if (selection := selection_of(samples)) is not None:
                fingerprints[f"selection{index}"] = selection.fingerprint
        for index, store in enumerate(self.stores):
            if store is not None:
                fingerprints[f"logits{index}"] = store.fingerprint
        return fingerprints | ({"teacher": self.teacher.fingerprint} if self.teacher else {})

    @property
    def changed_teachers(self) -> list[str]:
        """Differences between the teachers of this run and of the checkpoint that it continues, a phrase each."""
        if self.continued is None:
            return []
        then, now = self.continued.parents, self.parents
        return [
            f"{key}: {then.get(key, 'none')} there, {now.get(key, 'none')} here"
            for key in sorted(then | now)
            if re.fullmatch(r"teacher|logits\d+", key) and then.get(key) != now.get(key)
        ]


def check_run(config: TrainConfig, world_size: int) -> Plan:
    """Refuse a run that cannot work, and return the plan of it.

    Raises:
        UsageError, MismatchError, CorruptError: with the value, what was expected, and the flag to change.
    """
    check_writers(config.logging)
    data_size = config.parallel.data_parallel_size(world_size)
    config.training.check_batch(data_size)
    student, start = _student(config)
    student.check_layout(config.parallel, "student")
    student.check_sequence(config.data.seq_length, "student")
    sizes = {"micro_batch_size": config.training.micro_batch_size, "seq_length": config.data.seq_length}
    check_rows(student, config.parallel, "student", **sizes)
    if config.parallel.interleaved:
        _check_interleaving(config.training, config.parallel, data_size)
    data = config.data
    blend = _open_blend(data, data.data_path, data.packing, data.selection, seed=config.training.seed)
    if data.split is not None:
        blend = part_of(blend, data.split_shares, 0) or blend
    valid_blend = _open_valid_blend(data, needed=config.evaluate.skip_train)
    datasets = [*blend.datasets, *(valid_blend.datasets if valid_blend else [])]
    for held_out in valid_blend.datasets if valid_blend else ():
        _ = held_out.dataset.text_bytes  # damaged ones are refused now, before a step is lost
    teacher = _read_teacher(config.teacher)
    resume, weights_only = start or _read_resume(config.checkpoint, student)
    sides = _sides(data, datasets, teacher, resume, weights_only)
    tokenizer, vocab_size = one_tokenizer(sides), true_vocabulary(sides, stated=data.vocab_size)
    if vocab_size is None:
        raise UsageError(
            "the data has no manifest that tells its vocabulary: set --vocab-size, or say which tokenizer it was made "
            "with: --tokenizer-type, --tokenizer-model"
        )
    check_vocabulary(datasets, vocab_size)
    for samples in datasets if data.eod_mask_loss else ():
        check_boundaries(samples.dataset, tokenizer, "--eod-mask-loss", instead="drop the flag")
    teacher = None if teacher is None else teacher.of_vocabulary(vocab_size)
    resume = None if resume is None else resume.of_vocabulary(vocab_size)
    teacher_layout, teacher_shape = config.teacher_parallel(), None
    if teacher is not None:
        bf16 = config.student.bf16 if config.teacher.bf16 is None else config.teacher.bf16
        teacher_shape = _frozen_shape(config.teacher, teacher, bf16=bf16)
        teacher_layout.data_parallel_size(world_size)
        _check_teacher(teacher, teacher_shape, teacher_layout, config.parallel, seq_length=data.seq_length)
        check_rows(teacher_shape, teacher_layout, "teacher", **sizes)
    open_all = partial(open_stores, tokenizer=tokenizer, vocab_size=vocab_size)
    stores = open_all(config.teacher.logits_load_dir, blend, flag="--logits-load-dir")
    valid_stores: tuple[LogitsStore | None, ...] = ()
    if valid_blend is not None:
        valid_stores = open_all(config.teacher.valid_logits_load_dir, valid_blend, flag="--valid-logits-load-dir")
    for opened in (stores, valid_stores):
        check_stores(opened, config.objective)
    journal = journal_specs(
        config.logits_save, blend, save=config.checkpoint.save, vocab_size=vocab_size, tokenizer=tokenizer
    )
    if resume is not None:
        _check_resume(
            resume,
            student,
            weights_only=weights_only,
            vocab_size=vocab_size,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            trains_taid=config.trains_taid,
        )
    if resume is not None and not weights_only:
        _check_order(config.training, blend, data.seq_length, data_size, resume)
    doubt = None
    if config.checkpoint.hf_exports is not None and not config.evaluate.skip_train:
        doubt = check_exportable(
            student,
            tokenizer,
            None if resume is None else resume.huggingface,
            seq_length=data.seq_length,
            tokenizer_type=data.tokenizer_type,
            tokenizer_model=data.tokenizer_model,
            what="--hf-export-interval: the student",
        )
    return Plan(
        student=student,
        vocab_size=vocab_size,
        seq_length=data.seq_length,
        tokenizer=tokenizer,
        blend=blend,
        valid_blend=valid_blend,
        resume=resume,
        weights_only=weights_only,
        teacher=teacher,
        teacher_shape=teacher_shape,
        teacher_layout=teacher_layout,
        stores=stores,
        valid_stores=valid_stores,
        journal=() if config.evaluate.skip_train else journal,
        warnings=tuple(filter(None, [unknown_tokenizers(sides), doubt and f"Warning: --hf-export-interval: {doubt}"])),
    )


def student_rows(shape: ModelShape, vocab_size: int, parallel: ParallelConfig) -> int:
    """Return the rows of the padded vocabulary in ``parallel``, the student's layout."""
    return shape.rows(vocab_size, parallel.tensor_model_parallel_size)


def _open_blend(
    data: DataConfig, data_path: list[str | float], packing: Packing, selections: Sequence[str] = (), *, seed: int
) -> Blend:
    """Open every dataset of ``data_path``, as packed or selected.

    seed: of the order. It is fixed for held-out data, so that evaluations on a part of it compare over seeds.
    """
    weights, prefixes = parse_data_path([str(part) for part in data_path])
    if selections and len(selections) != len(prefixes):
        raise UsageError(
            f"--selection has {len(selections)} entries, --data-path {len(prefixes)} datasets: one for each, in their "
            "order; 'all' for a dataset that is used whole"
        )
    datasets: list[Samples] = []
    for prefix, folder in zip(prefixes, selections or ["all"] * len(prefixes)):
        dataset, selection = IndexedDataset(prefix), None if folder == "all" else Selection(folder)
        if selection is not None:  # first: under another packing the dataset may have no samples at all
            selection.check(dataset, packing=packing, seq_length=data.seq_length)
        samples = _open_samples(data, dataset, packing)
        datasets.append(samples if selection is None else SelectedSamples(samples, selection))
    return Blend(datasets, weights, seed)


def _open_valid_blend(data: DataConfig, *, needed: bool) -> Blend | None:
    """Open the held-out data: datasets of its own, or the second part of a split; None where there is none.

    needed: the run only evaluates, so that a split which leaves no held-out sample is refused.
    """
    packing = data.valid_packing or data.packing
    if data.valid_data_path:
        return _open_blend(data, data.valid_data_path, packing, seed=0)
    if data.split is None or data.split_shares.shares[1] == 0:
        return None
    held_out = part_of(_open_blend(data, data.data_path, packing, seed=0), data.split_shares, 1)
    if held_out is None and needed:
        raise UsageError(f"--skip-train only evaluates, and --split {data.split} leaves no sample to evaluate on")
    return held_out


def _open_samples(data: DataConfig, dataset: IndexedDataset, packing: Packing) -> Samples:
    tokenizer = partial(
        open_tokenizer, dataset, tokenizer_type=data.tokenizer_type, tokenizer_model=data.tokenizer_model
    )
    return open_samples(packing, dataset, data.seq_length, tokenizer)


def _sides(
    data: DataConfig,
    datasets: Sequence[Samples],
    teacher: CheckpointRecord | None,
    resume: CheckpointRecord | None,
    weights_only: bool,
) -> list[Side]:
    """List everything that records a tokenizer or a vocabulary. Stores are compared with their dataset when opened."""
    by_prefix = {
        samples.dataset.prefix: Side(f"dataset {samples.dataset.prefix}", recorded_tokenizer(samples.dataset))
        for samples in datasets
    }
    sides = list(by_prefix.values())
    if teacher is not None:
        sides.append(_side_of(f"the teacher {teacher.path}", teacher, teacher.vocab_size))
    if resume is not None:  # the vocabulary of a continued run is checked with its shape
        rows = resume.vocab_size if weights_only else None
        sides.append(_side_of(f"the checkpoint {resume.path}", resume, rows))
    by_flags = tokenizer_of_flags(data.tokenizer_type, data.tokenizer_model, sides, vocab_size=data.vocab_size)
    # where nothing is recorded, flags say what the data was made with
    return sides if by_flags is None else [by_flags, *(side for side in sides if side.tokenizer or side.vocab_size)]


def _side_of(name: str, record: CheckpointRecord, vocab_size: int | None) -> Side:
    padded = record.rows is not None
    return Side(name, record.tokenizer, vocab_size, by_file=record.tokenizer_by_file, padded=padded)


def _check_interleaving(training: TrainingConfig, parallel: ParallelConfig, data_size: int) -> None:
    for size in training.batch_sizes.levels:
        count = size // (training.micro_batch_size * data_size)
        if not count % parallel.pipeline_model_parallel_size:
            continue
        raise UsageError(
            f"the interleaved schedule needs a multiple of --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} microbatches a step; this run has {count} "
            "(--global-batch-size / (--micro-batch-size x data-parallel size))"
        )


def _read_teacher(teacher: TeacherConfig) -> CheckpointRecord | None:
    if teacher.load is None:
        return None
    return read_record(
        teacher.load, teacher.iteration, role="teacher", flag="--teacher-iteration", shape=teacher.shape()
    )


def _frozen_shape(teacher: TeacherConfig, record: CheckpointRecord, *, bf16: bool) -> ModelShape:
    """Return the shape of the teacher's model with the layers and the precision that it is run in."""
    return record.shape.frozen(
        transformer_impl=teacher.transformer_impl,
        bf16=bf16,
        fp8_format=teacher.fp8_format,
        fp8_recipe=teacher.fp8_recipe,
    )


def _student(config: TrainConfig) -> tuple[ModelShape, tuple[CheckpointRecord | None, bool] | None]:
    """Return the student's shape: as described, or that of the checkpoint to start from where nothing describes it.

    Also returns the result of `_read_resume` in the latter case, else None.
    """
    described = config.student.given or not (config.checkpoint.load or config.checkpoint.save)
    resume, weights_only = (None, False) if described else _read_resume(config.checkpoint, None)
    if resume is None:
        return config.student.resolve("student"), None
    return config.student.of_checkpoint(resume.shape, str(resume.path)), (resume, weights_only)


def _check_teacher(
    record: CheckpointRecord,
    shape: ModelShape,
    layout: ParallelConfig,
    student_layout: ParallelConfig,
    *,
    seq_length: int,
) -> None:
    if shape.num_experts and any(
        getattr(layout, name) != getattr(student_layout, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    ):
        raise UsageError(
            "a teacher with experts needs the student's layout; drop --teacher-tensor-model-parallel-size and "
            "--teacher-pipeline-model-parallel-size"
        )
    shape.check_layout(layout, "teacher")
    shape.check_sequence(seq_length, f"teacher {record.path}")
    shape.warn_of_length(seq_length, f"teacher {record.path}")
    _check_weights(record, "teacher")


def _read_resume(checkpoint: CheckpointConfig, student: ModelShape | None) -> tuple[CheckpointRecord | None, bool]:
    """Return the checkpoint to start from, if any, and True if only its weights are taken."""
    if checkpoint.save:
        _check_save(Path(checkpoint.save))
    own_step = checkpoint.ckpt_step if checkpoint.load in (None, checkpoint.save) else None
    if checkpoint.save and (own_step is not None or latest_iteration(checkpoint.save) is not None):
        # a stopped run continues, whatever --load says
        flag = "--ckpt-step" if checkpoint.load is None else f"--load {checkpoint.save} --ckpt-step"
        return read_record(checkpoint.save, own_step, role="--save", flag=flag), False
    if not checkpoint.load or checkpoint.starts_afresh:
        return None, False
    record = read_record(checkpoint.load, checkpoint.ckpt_step, role="--load", flag="--ckpt-step", shape=student)
    if record.foreign and not checkpoint.finetune:
        where = record.path if record.form == "huggingface" else record.path.parent
        raise MismatchError(
            f"{record.path} was not written by 'megakd train': no run to continue; to start from its weights: "
            f"--load {where} --finetune, and another --save"
        )
    return record, checkpoint.finetune


def _check_resume(
    record: CheckpointRecord,
    student: ModelShape,
    *,
    weights_only: bool,
    vocab_size: int,
    use_distributed_optimizer: bool,
    trains_taid: bool,
) -> None:
    if weights_only:
        use_distributed_optimizer = record.use_distributed_optimizer
        vocab_size = record.vocab_size  # compared with the tokenizer's already; further rows are padding
    check_resume(record, student, vocab_size=vocab_size, use_distributed_optimizer=use_distributed_optimizer)
    if trains_taid and not weights_only and "taid" not in record.objective_state:
        raise MismatchError(
            f"{record.path} holds no state of taid: it was trained with another divergence; continue it with that one, "
            "or start a new run from its weights (--load DIR --finetune and another --save)"
        )
    _check_weights(record, "checkpoint")


def _check_order(
    training: TrainingConfig, blend: Blend, seq_length: int, data_size: int, resume: CheckpointRecord
) -> None:
    """Refuse a checkpoint of other data or of another order."""
    try:
        Loader(
            blend,
            seq_length=seq_length,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            data_parallel_size=data_size,
            rampup=training.rampup,
            state=resume.loader_state,
        )
    except MismatchError as error:
        raise MismatchError(
            f"{resume.path}: {error}: --load {resume.path.parent} --finetune, with another --save"
        ) from None


def _check_save(folder: Path) -> None:
    """Refuse a ``--save`` that no checkpoint can be written to, before steps are made that would be lost."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--save {folder}: {there} is a file; expected a folder, new or there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--save {folder}: no permission to write in {there}; give a folder that can be written")


def _check_weights(record: CheckpointRecord, role: str) -> None:
    from megakd.model.checkpoint.tensor_names import check_weights  # late: it needs torch, which takes a second to load

    check_weights(record.path, record.shape, role)
