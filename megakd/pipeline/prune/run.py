"""Pruning: importance measured or read, parts chosen, weights cut, the student's loss, its checkpoint written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megakd.artefacts.manifest import atomic_write
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import dump
from megakd.errors import ExitStatus
from megakd.model.checkpoint.load import load_weights
from megakd.model.checkpoint.save import CheckpointWriter, record_parameters
from megakd.model.checkpoint.tensor_names import check_weights
from megakd.model.config import ModelShape
from megakd.model.gpt import HiddenGPTModel, build_model
from megakd.parallel import Groups, init_parallel
from megakd.pipeline.prune.artefact import Importance, write_importance
from megakd.pipeline.prune.calibration import Calibration
from megakd.pipeline.prune.choice import Choice, choose
from megakd.pipeline.prune.config import PruneConfig
from megakd.pipeline.prune.observer import Observer
from megakd.pipeline.prune.preflight import PrunePlan
from megakd.pipeline.prune.report import as_json, draw, table, training_flags
from megakd.pipeline.prune.slices import cut_parameter, source_name
from megakd.pipeline.prune.transfer import fill_student_inplace
from megakd.work.console import tell
from megakd.work.progress import Progress, clock

REPORT, PLOT = "prune.json", "prune.png"


def prune(config: PruneConfig, plan: PrunePlan) -> ExitStatus:
    """Cut the student out of the teacher and save it. All ranks call it."""
    groups = init_parallel(config.parallel(), seed=config.seed)
    folder = Path(config.save)
    with ExitStack() as stack:
        if groups.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(folder / "prune.lock"))
            atomic_write(folder / "config.yaml", dump(config).encode())
        teacher = _load_teacher(plan, groups)
        calibration = Calibration(
            plan.samples,
            plan.ids,
            groups,
            micro_batch_size=config.micro_batch_size,
            vocab_size=plan.record.vocab_size,
            chunk_bytes=config.head_chunk_mbytes << 20,
        )
        importance = plan.importance or measure(config, plan, teacher, calibration, groups)
        if groups.rank == 0 and plan.importance is None:
            write_importance(folder, importance, settings=plan.settings, parents=plan.parents, tokenizer=plan.tokenizer)
        choice = choose(
            importance,
            plan.record.shape,
            plan.student,
            layer_choice=config.layer_choice,
            prune_layers=config.prune_layers,
        )
        student = cut_student(config, plan, teacher, choice, groups)
        del teacher
        loss = calibration.run(student, ticked=_progress(config, plan, groups, "judged"))
        _save(config, plan, student, groups)
        if groups.rank == 0:
            _report(config, plan, importance, choice, loss)
    return ExitStatus.COMPLETE


def measure(
    config: PruneConfig, plan: PrunePlan, teacher: HiddenGPTModel, calibration: Calibration, groups: Groups
) -> Importance:
    """Run the teacher over the calibration samples and return the importance of its parts, on every rank."""
    observer = Observer(
        teacher, plan.shape, groups, sequence=config.sequence_aggregation, samples=config.sample_aggregation
    )
    loss = calibration.run(teacher, observer=observer, ticked=_progress(config, plan, groups, "measured"))
    return observer.importance(num_samples=len(plan.ids), loss=loss)


def cut_student(
    config: PruneConfig, plan: PrunePlan, teacher: HiddenGPTModel, choice: Choice, groups: Groups
) -> HiddenGPTModel:
    """Build the student in the teacher's layout, with the weights of the parts that stay."""
    student = _build(plan, frozen_student(plan), groups)
    fill_student_inplace(
        student,
        teacher,
        groups,
        source=partial(source_name, choice=choice),
        cut=partial(cut_parameter, choice=choice, teacher=plan.record.shape, rescale_norms=config.rescale_norms),
    )
    return student


def frozen_student(plan: PrunePlan) -> ModelShape:
    """Shape of the student as it runs here."""
    return plan.student.frozen(
        transformer_impl="local", bf16=plan.shape.bf16, fp8_format=None, fp8_recipe=plan.shape.fp8_recipe
    )


def _load_teacher(plan: PrunePlan, groups: Groups) -> HiddenGPTModel:
    check_weights(plan.record.path, plan.record.shape, "--load")
    model = _build(plan, plan.shape, groups)
    load_weights(plan.record, [model], groups)
    return model


def _build(plan: PrunePlan, shape: ModelShape, groups: Groups) -> HiddenGPTModel:
    vocab_size, seq_length = plan.record.vocab_size, plan.samples.seq_length
    (model,) = build_model(shape, groups, vocab_size=vocab_size, seq_length=seq_length)
    model.requires_grad_(False).eval()
    return model


def _progress(config: PruneConfig, plan: PrunePlan, groups: Groups, done: str) -> Callable[[float], None]:
    """Lines about the share of the calibration samples that is done, from the first rank of the last stage."""
    progress = Progress(len(plan.ids), done=0, interval=config.log_interval)

    def tick(share: float) -> None:
        progress.done = share * len(plan.ids)
        if groups.rank == 0 and share < 1 and progress.is_due():
            rate = progress.fresh * plan.samples.seq_length / progress.seconds
            tell(
                f"{done} {progress.done:.0f} of {len(plan.ids)} samples ({100 * share:.1f} %, {rate:.0f} tokens/s, "
                f"{clock(progress.seconds_left)} left)"
            )

    return tick


def _save(config: PruneConfig, plan: PrunePlan, student: HiddenGPTModel, groups: Groups) -> None:
    parameters = record_parameters(
        plan.student,
        groups,
        iteration=0,
        vocab_size=plan.record.vocab_size,
        seq_length=plan.record.seq_length,
        loader_state={},
        objective_state={},
    )
    if plan.record.huggingface is not None:  # of the folder that the weights come from: an export keeps what it said
        parameters["huggingface"] = plan.record.huggingface
    writer = CheckpointWriter(config.save, background=False)
    writer.save_weights(
        0, [student], groups, parameters=parameters, parents=dict(plan.parents), tokenizer=plan.tokenizer
    )


def _report(config: PruneConfig, plan: PrunePlan, importance: Importance, choice: Choice, loss: float) -> None:
    folder, teacher, student = Path(config.save), plan.record.shape, plan.student
    cut = {
        "layer_choice": "prune_layers" if config.prune_layers is not None else config.layer_choice,
        "rescale_norms": config.rescale_norms,
    }
    settings = {**plan.settings, **cut}
    report = as_json(importance, choice, teacher, student, student_loss=loss, settings=settings)
    atomic_write(folder / REPORT, report)
    atomic_write(folder / PLOT, draw(importance, choice))
    for line in table(importance, choice, teacher):
        tell(line, on="stdout")
    tell(f"loss on the calibration samples: {importance.loss:.4f} before, {loss:.4f} after, nats a token", on="stdout")
    tell(f"student: megakd train --load {folder} --finetune {training_flags(student)} ...", on="stdout")
