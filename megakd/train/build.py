"""How each part of a run is built from the configuration and the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.config.tree import dump
from megakd.data.blend import Blend
from megakd.data.loader import Loader
from megakd.data.tokenizer import build_tokenizer
from megakd.logits.store import LogitsStore
from megakd.model.checkpoint.load import load_teacher, load_training_state, load_weights
from megakd.model.checkpoint.save import CheckpointWriter, record_parameters
from megakd.model.gpt import build_model, resolve_transformer_impl
from megakd.model.initial_weights import set_initial_weights
from megakd.parallel import Groups, build_groups
from megakd.teachers.mixed_teacher import MixedTeacher
from megakd.teachers.model_teacher import ModelTeacher, NoTeacher, Teacher
from megakd.teachers.store_teacher import StoreTeacher
from megakd.train.config import TrainConfig
from megakd.train.evaluate import Evaluator
from megakd.train.journal import TrainingJournal
from megakd.train.objective.objective import Objective, make_objective
from megakd.train.optim import Optimizer, Student, wrap_student
from megakd.train.preflight import Plan, student_rows
from megakd.train.record.metrics import Cost, Metrics
from megakd.train.settings import changed_settings, keep_configuration, settings_of


def build_student(config: TrainConfig, plan: Plan, groups: Groups) -> Student:
    """The student: weights from the seed, or from the checkpoint that ``--finetune`` starts from."""
    chunks = build_model(plan.student, groups, vocab_size=plan.vocab_size, seq_length=config.data.seq_length)
    if plan.resume is None:
        set_initial_weights(chunks, plan.student, groups, vocab_size=plan.vocab_size, seed=config.training.seed)
    elif plan.weights_only:
        load_weights(plan.resume, chunks, groups)
    return wrap_student(chunks, config.parallel, groups)


def build_teacher(config: TrainConfig, plan: Plan, groups: Groups) -> Teacher:
    """What the training data has stored, a frozen model in its own layout for the rest, or either, or none."""
    return _combine(config, plan, plan.stores, plan.blend, _build_model_teacher(config, plan, groups), groups)


def _build_model_teacher(config: TrainConfig, plan: Plan, groups: Groups) -> ModelTeacher | None:
    if plan.teacher is None or plan.teacher_shape is None:
        return None
    own = build_groups(config.teacher_parallel(), groups)
    chunks = build_model(
        plan.teacher_shape, own, vocab_size=plan.vocab_size, seq_length=config.data.seq_length, with_head=False
    )
    rows = student_rows(plan.student, plan.vocab_size, config) // config.parallel.tensor_model_parallel_size
    head_weight_vH = load_teacher(plan.teacher, chunks, own, groups, rows=rows)
    return ModelTeacher(chunks, head_weight_vH, own, groups)


def _combine(
    config: TrainConfig,
    plan: Plan,
    stores: Sequence[LogitsStore | None],
    blend: Blend,
    model: ModelTeacher | None,
    groups: Groups,
) -> Teacher:
    if not any(stores):
        return model or NoTeacher()
    own = config.teacher
    stored = StoreTeacher(
        stores,
        blend,
        groups,
        vocab_size=plan.vocab_size,
        threads=own.logits_load_decode_threads,
        ahead=own.logits_load_prefetch_depth,
    )
    if model is None:
        return stored
    return MixedTeacher(stored, model, groups, always=config.objective.rho_keep < 1)


def build_objective(config: TrainConfig, plan: Plan, groups: Groups) -> Objective:
    """The loss for this rank's slice of the vocabulary."""
    return make_objective(
        config.objective,
        groups,
        vocab_size=plan.vocab_size,
        padded_vocab_size=student_rows(plan.student, plan.vocab_size, config),
        with_teacher=config.teacher.is_there,
        from_store=config.teacher.reads_stores,
        train_iters=config.training.train_iters,
        schedule=config.kd_schedule(),
    )


def build_optimizer(config: TrainConfig, student: Student) -> Optimizer:
    """The optimizer and its learning rate, which counts steps or samples as the run's length does."""
    return Optimizer(
        config.optim,
        student,
        train_iters=config.training.train_iters,
        lengths=config.lr_lengths,
    )


def restore(plan: Plan, student: Student, objective: Objective, optimizer: Optimizer, groups: Groups) -> int:
    """Load the state to continue from, in place; the step it was taken at, 0 for a new run."""
    if plan.resume is None or plan.weights_only:
        return 0
    load_training_state(plan.resume, student.chunks, optimizer.inner, groups)
    optimizer.give_weights()
    objective.load_state(plan.resume.objective_state)
    return plan.resume.iteration


def build_loader(config: TrainConfig, plan: Plan, groups: Groups) -> Loader:
    """The batches of every step, continued where the checkpoint stopped."""
    return Loader(
        plan.blend,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        eod_token=(plan.tokenizer or {}).get("eod"),
        eod_mask_loss=config.data.eod_mask_loss,
        vocab_size=plan.vocab_size,
        rampup=config.training.rampup,
        state=plan.resume.loader_state if plan.resume is not None and not plan.weights_only else None,
    )


def build_journal(
    config: TrainConfig, plan: Plan, objective: Objective, groups: Groups, metrics: Metrics, start_step: int
) -> TrainingJournal:
    """What keeps the student's own rows; nothing where no ``--logits-save-dir`` is given, or nothing is trained."""
    samples_a_step = config.training.global_batch_size // groups.data_size
    resume = None if plan.weights_only else plan.resume
    return TrainingJournal(
        config.logits_save.dir or "",
        () if config.evaluate.skip_train else plan.journal,
        plan.blend,
        objective,
        groups,
        start_step=start_step,
        counted=() if resume is None else resume.journal,
        from_step=config.logits_save.from_step,
        num_records=samples_a_step * (config.checkpoint.save_interval or config.training.train_iters),
        say=metrics.say,
    )


def build_metrics(config: TrainConfig, plan: Plan, groups: Groups, start_step: int) -> Metrics:
    """The record of the run; writes the resolved configuration beside it and says what runs where."""
    cost = Cost.of(plan.student, plan.teacher_shape, seq_length=config.data.seq_length, vocab_size=plan.vocab_size)
    metrics = Metrics(
        config,
        cost,
        rank=groups.rank,
        world_size=groups.world_size,
        start_step=start_step,
        evaluated=plan.resume.fingerprint if config.evaluate.skip_train and plan.resume is not None else None,
    )
    parallel = config.parallel
    metrics.say(
        f"world size {groups.world_size} on {groups.device.type}: TP {parallel.tensor_model_parallel_size}, "
        f"PP {parallel.pipeline_model_parallel_size}, CP {parallel.context_parallel_size}, DP {groups.data_size} | "
        f"layers: {resolve_transformer_impl(plan.student)} | vocabulary {plan.vocab_size}"
        + (f" | teacher {plan.teacher.path}" if plan.teacher else "")
        + "".join(f" | logits store {store.folder}" for store in plan.stores if store is not None)
        + (f" | continues after iteration {start_step}" if start_step else "")
    )
    if plan.valid_blend is None and config.data.has_held_out:
        metrics.say(f"Warning: nothing is evaluated: --split {config.data.split} leaves no held-out sample of the data")
    if config.checkpoint.starts_afresh:
        metrics.say(f"--load {config.checkpoint.load} holds no checkpoint yet: weights come from --seed")
    if config.checkpoint.ckpt_step is not None and start_step:
        metrics.say(
            f"Warning: --ckpt-step {config.checkpoint.ckpt_step}: later checkpoints stay until this run writes theirs; "
            "leave the flag out to go on with what it writes"
        )
    for warning in plan.warnings:
        metrics.say(warning)
    for change in () if config.evaluate.skip_train else plan.changed_teachers:
        metrics.say(f"Warning: this run goes on with other targets than its checkpoint: {change}")
    schedule = config.kd_schedule()
    if schedule is not None and plan.resume is not None and not plan.weights_only:
        for change in schedule.changes(plan.resume.objective_state.get("schedule", {})):
            metrics.say(f"Warning: this run goes on with another schedule than {plan.resume.path}: {change}")
    if groups.rank > 0 or config.evaluate.skip_train:
        return metrics
    if plan.resume is not None and not plan.weights_only:
        for change in changed_settings(config, plan.student, plan.resume):
            metrics.say(f"Warning: {change}")
    if config.checkpoint.save is None:
        metrics.say("Warning: without --save DIR nothing of this run is kept: no checkpoint, no record of its steps")
    elif start_step < config.training.train_iters:
        keep_configuration(Path(config.checkpoint.save), dump(config), first_step=start_step + 1)
    return metrics


def build_evaluator(
    config: TrainConfig,
    plan: Plan,
    student: Student,
    teacher: Teacher,
    objective: Objective,
    groups: Groups,
    metrics: Metrics,
) -> Evaluator | None:
    """Evaluation on the held-out data, or None where there is none."""
    if plan.valid_blend is None:
        return None
    model = teacher.model if isinstance(teacher, MixedTeacher) else teacher
    teacher = _combine(
        config, plan, plan.valid_stores, plan.valid_blend, model if isinstance(model, ModelTeacher) else None, groups
    )
    return Evaluator(
        student,
        teacher,
        objective.held_out(with_teacher=not isinstance(teacher, NoTeacher)),
        groups,
        blend=plan.valid_blend,
        config=config,
        vocab_size=plan.vocab_size,
        eod_token=(plan.tokenizer or {}).get("eod"),
        token_bytes=_token_bytes(config, plan, metrics),
        tokenizer=(plan.tokenizer or {}).get("hash"),
    )


def build_writer(
    config: TrainConfig,
    plan: Plan,
    student: Student,
    objective: Objective,
    optimizer: Optimizer,
    batches: Loader,
    journal: TrainingJournal,
    groups: Groups,
    metrics: Metrics,
    start_step: int,
) -> tuple[CheckpointWriter, Callable[[int], None]]:
    """The checkpoint writer, and ``save(step)``: nothing for a step that is saved already, or without ``--save``."""
    folder = config.checkpoint.save
    saved, settings = start_step, settings_of(config)
    background = config.checkpoint.async_save and folder is not None
    writer = CheckpointWriter(folder or ".", background=background, saved=metrics.log_checkpoint)

    def save(step: int) -> None:
        nonlocal saved
        if folder is None or step == saved:
            return
        saved = step
        journal.commit(step)
        parameters = record_parameters(
            plan.student,
            groups,
            iteration=step,
            vocab_size=plan.vocab_size,
            seq_length=config.data.seq_length,
            loader_state=batches.state(),
            objective_state=objective.state(),
            journal=journal.counted,
        ) | {"settings": settings}
        writer.save(
            step,
            student.whole(),
            optimizer.inner,
            groups,
            parameters=parameters,
            parents=plan.parents,
            tokenizer=plan.tokenizer,
        )

    return writer, save


def _token_bytes(config: TrainConfig, plan: Plan, metrics: Metrics) -> NDArray[np.int32] | None:
    """UTF-8 bytes of each token, for bits per byte; None, with a word why, where the tokenizer cannot be opened."""
    recorded = plan.tokenizer or {}
    kind: Any = config.data.tokenizer_type or recorded.get("type")
    model = config.data.tokenizer_model or recorded.get("path")
    if kind is None:
        return None
    if model is not None and not Path(model).exists():
        metrics.say(f"no bits per byte: tokenizer {model} is not there (--tokenizer-model tells where it is)")
        return None
    vocab_size = plan.vocab_size - 1 if kind == "NullTokenizer" else plan.vocab_size
    return build_tokenizer(kind, model, vocab_size=vocab_size).token_bytes()
