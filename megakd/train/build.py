"""Parts of a training run, each built from the options that it reads and from the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megakd.config.tree import dump, to_dict
from megakd.data.batch_sizes import Ramp
from megakd.data.blend import Blend
from megakd.data.loader import Loader
from megakd.data.samples.label_bytes import why_no_bytes
from megakd.logits.store import LogitsStore
from megakd.model.checkpoint.load import load_teacher, load_training_state, load_weights
from megakd.model.checkpoint.save import CheckpointWriter, record_parameters
from megakd.model.gpt import build_model, resolve_transformer_impl
from megakd.model.initial_weights import set_initial_weights
from megakd.parallel import Groups, build_groups
from megakd.teachers.mixed_teacher import MixedTeacher
from megakd.teachers.model_teacher import ModelTeacher
from megakd.teachers.protocol import NoTeacher, Teacher
from megakd.teachers.store_teacher import StoreTeacher
from megakd.train.config import CheckpointConfig, DataConfig, EvaluateConfig, TrainConfig, TrainingConfig
from megakd.train.evaluate import Evaluator
from megakd.train.hf_export import HfExporter
from megakd.train.journal import TrainingJournal
from megakd.train.journal_config import LogitsSaveConfig
from megakd.train.objective.config import ObjectiveConfig
from megakd.train.objective.objective import Objective, make_objective
from megakd.train.objective.schedule import KDSchedule
from megakd.train.optim import Optimizer, Student, wrap_student
from megakd.train.preflight import Plan, student_rows
from megakd.train.record.metrics import Cost, Metrics
from megakd.train.settings import changed_settings, keep_configuration, settings_of
from megakd.train.teacher_config import TeacherConfig


def build_student(training: TrainingConfig, plan: Plan, groups: Groups) -> Student:
    """Build the student: weights from the seed, or from the checkpoint that ``--finetune`` starts from."""
    chunks = build_model(plan.student, groups, vocab_size=plan.vocab_size, seq_length=plan.seq_length)
    if plan.resume is None:
        set_initial_weights(chunks, plan.student, groups, vocab_size=plan.vocab_size, seed=training.seed)
    elif plan.weights_only:
        load_weights(plan.resume, chunks, groups)
    return wrap_student(chunks, groups.parallel, groups)


def build_teacher(teacher: TeacherConfig, objective: ObjectiveConfig, plan: Plan, groups: Groups) -> Teacher:
    """Build the teacher: stored targets where the data has them, a frozen model in its own layout for the rest.

    Either of them may be missing; without both the teacher says nothing.
    """
    model = _build_model_teacher(plan, groups)
    return _combine(plan.stores, plan.blend, model, teacher, plan, groups, rho_keep=objective.rho_keep)


def _build_model_teacher(plan: Plan, groups: Groups) -> ModelTeacher | None:
    if plan.teacher is None or plan.teacher_shape is None:
        return None
    teacher_groups = build_groups(plan.teacher_layout, groups)
    chunks = build_model(
        plan.teacher_shape, teacher_groups, vocab_size=plan.vocab_size, seq_length=plan.seq_length, with_head=False
    )
    padded = student_rows(plan.student, plan.vocab_size, groups.parallel)
    rows = padded // groups.parallel.tensor_model_parallel_size
    head_weight_vH = load_teacher(plan.teacher, chunks, teacher_groups, groups, rows=rows)
    return ModelTeacher(chunks, head_weight_vH, teacher_groups, groups)


def _combine(
    stores: Sequence[LogitsStore | None],
    blend: Blend,
    model: ModelTeacher | None,
    teacher: TeacherConfig,
    plan: Plan,
    groups: Groups,
    *,
    rho_keep: float,
) -> Teacher:
    """Build the teacher of ``blend`` from its stores, one for each dataset, and from the model."""
    if not any(stores):
        return model or NoTeacher()
    stored = StoreTeacher(
        stores,
        blend,
        groups,
        vocab_size=plan.vocab_size,
        threads=teacher.logits_load_decode_threads,
        ahead=teacher.logits_load_prefetch_depth,
    )
    if model is None:
        return stored
    return MixedTeacher(stored, model, groups, always=rho_keep < 1)


def build_objective(
    objective: ObjectiveConfig, schedule: KDSchedule | None, plan: Plan, groups: Groups, *, train_iters: int
) -> Objective:
    """Build the loss for this rank's slice of the vocabulary."""
    return make_objective(
        objective,
        groups,
        vocab_size=plan.vocab_size,
        padded_vocab_size=student_rows(plan.student, plan.vocab_size, groups.parallel),
        with_teacher=plan.has_teacher,
        from_store=plan.reads_stores,
        train_iters=train_iters,
        schedule=schedule,
    )


def restore(
    plan: Plan, student: Student, objective: Objective, optimizer: Optimizer, groups: Groups
) -> tuple[int, Objective]:
    """Load the weights and the optimizer's state of the run that this one continues, in place.

    Returns the step that they were saved at, and the objective as it stood then; 0 and ``objective`` for a new run.
    """
    if plan.continued is None:
        return 0, objective
    load_training_state(plan.continued, student.chunks, optimizer.inner, groups)
    optimizer.give_weights()
    return plan.continued.iteration, objective.restored(plan.continued.objective_state)


def build_loader(data: DataConfig, training: TrainingConfig, plan: Plan, groups: Groups) -> Loader:
    """Build the batches of every step, continued where the checkpoint stopped."""
    return _load(
        plan.blend,
        data,
        training,
        plan,
        groups,
        rampup=training.rampup,
        state=None if plan.continued is None else plan.continued.loader_state,
    )


def _load(
    blend: Blend,
    data: DataConfig,
    training: TrainingConfig,
    plan: Plan,
    groups: Groups,
    *,
    rampup: Ramp | None = None,
    state: Mapping[str, Any] | None = None,
) -> Loader:
    return Loader(
        blend,
        seq_length=plan.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        eod_token=(plan.tokenizer or {}).get("eod"),
        eod_mask_loss=data.eod_mask_loss,  # in evaluation too: means over positions of the same kind as in training
        vocab_size=plan.vocab_size,
        rampup=rampup,
        state=state,
    )


def build_journal(
    logits_save: LogitsSaveConfig,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    plan: Plan,
    objective: Objective,
    groups: Groups,
    metrics: Metrics,
    start_step: int,
) -> TrainingJournal:
    """Build the journal of the student's own rows; it keeps nothing without ``--logits-save-dir``."""
    samples_a_step = training.global_batch_size // groups.data_size
    return TrainingJournal(
        logits_save.dir or "",
        plan.journal,
        plan.blend,
        objective,
        groups,
        start_step=start_step,
        counted=() if plan.continued is None else plan.continued.journal,
        from_step=logits_save.from_step,
        num_records=samples_a_step * (checkpoint.save_interval or training.train_iters),
        say=metrics.say,
    )


def build_metrics(config: TrainConfig, plan: Plan, groups: Groups, start_step: int) -> Metrics:
    """Build the record of the run, write the resolved configuration beside it, and say what runs where."""
    skip_train, folder = config.evaluate.skip_train, config.checkpoint.save
    metrics = Metrics(
        config.training,
        config.logging,
        Cost.of(plan.student, plan.teacher_shape, seq_length=plan.seq_length, vocab_size=plan.vocab_size),
        seq_length=plan.seq_length,
        folder=None if folder is None else Path(folder),
        settings=to_dict(config),
        rank=groups.rank,
        world_size=groups.world_size,
        start_step=start_step,
        trains=not skip_train,
        evaluated=plan.resume.fingerprint if skip_train and plan.resume is not None else None,
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
    for change in () if skip_train else plan.changed_teachers:
        metrics.say(f"Warning: this run goes on with other targets than its checkpoint: {change}")
    schedule = config.kd_schedule()
    if schedule is not None and plan.continued is not None:
        for change in schedule.changes(plan.continued.objective_state.get("schedule", {})):
            metrics.say(f"Warning: this run goes on with another schedule than {plan.continued.path}: {change}")
    if groups.rank > 0 or skip_train:
        return metrics
    if plan.continued is not None:
        for change in changed_settings(settings_of(config), plan.student, plan.continued):
            metrics.say(f"Warning: {change}")
    if folder is None:
        metrics.say("Warning: without --save DIR nothing of this run is kept: no checkpoint, no record of its steps")
    elif start_step < config.training.train_iters:
        keep_configuration(Path(folder), dump(config), first_step=start_step + 1)
    return metrics


def build_evaluator(
    evaluate: EvaluateConfig,
    data: DataConfig,
    training: TrainingConfig,
    teacher_config: TeacherConfig,
    plan: Plan,
    student: Student,
    teacher: Teacher,
    objective: Objective,
    groups: Groups,
    metrics: Metrics,
) -> Evaluator | None:
    """Build the evaluation on the held-out data; None where there is none. teacher, objective: of the training."""
    if plan.valid_blend is None:
        return None
    model = teacher.model if isinstance(teacher, MixedTeacher) else teacher
    held_out_teacher = _combine(
        plan.valid_stores,
        plan.valid_blend,
        model if isinstance(model, ModelTeacher) else None,
        teacher_config,
        plan,
        groups,
        rho_keep=objective.gates.rho_keep,
    )
    held_out_objective = objective.held_out(with_teacher=not isinstance(held_out_teacher, NoTeacher))
    num_samples = sum(samples.num_samples for samples in plan.valid_blend.datasets)
    missing = why_no_bytes(plan.valid_blend.datasets)
    if missing is not None:
        metrics.say(f"no bits per byte: {missing}")
    return Evaluator(
        student,
        held_out_teacher if held_out_objective.needs_teacher else NoTeacher(),
        held_out_objective,
        groups,
        batches=partial(_load, plan.valid_blend, data, training, plan, groups),
        # at most one pass: no sample is counted twice while another has not been seen
        num_batches=max(1, min(evaluate.eval_iters, num_samples // training.global_batch_size)),
        distils=objective.term is not None,
        counts_bytes=missing is None,
        tokenizer=(plan.tokenizer or {}).get("hash"),
    )


def build_writer(
    checkpoint: CheckpointConfig,
    settings: Mapping[str, Any],
    plan: Plan,
    student: Student,
    optimizer: Optimizer,
    batches: Loader,
    journal: TrainingJournal,
    groups: Groups,
    metrics: Metrics,
    start_step: int,
    exporter: HfExporter,
) -> tuple[CheckpointWriter, Callable[[int, Objective], None]]:
    """Build the checkpoint writer, and ``save(step, objective)``, which a run without ``--save`` does nothing in.

    A step that is saved already is not saved again. settings: `settings_of` the run, which a checkpoint records.
    """
    folder = checkpoint.save
    saved = start_step
    background = checkpoint.async_save and folder is not None

    def saved_one(path: Path) -> None:
        metrics.log_checkpoint(path)
        exporter.saved(path)

    writer = CheckpointWriter(folder or ".", background=background, saved=saved_one)
    came_from = None if plan.resume is None else plan.resume.huggingface

    def save(step: int, objective: Objective) -> None:
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
            seq_length=plan.seq_length,
            loader_state=batches.state(),
            objective_state=objective.state(),
            journal=journal.counted,
        ) | {"settings": dict(settings)}
        if came_from is not None:  # of the folder that the weights came from: an export keeps what it said
            parameters["huggingface"] = came_from
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


def build_exporter(config: TrainConfig, plan: Plan, groups: Groups, metrics: Metrics) -> HfExporter:
    """Build the exporter of checkpoints as Hugging Face folders; it does nothing without ``--hf-export-interval``."""
    return HfExporter(
        config.checkpoint,
        options={"tokenizer_type": config.data.tokenizer_type, "tokenizer_model": config.data.tokenizer_model},
        last_step=config.training.train_iters,
        is_first=groups.rank == 0 and not config.evaluate.skip_train,
        say=metrics.say,
    )
