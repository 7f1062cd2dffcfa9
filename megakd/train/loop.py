"""The training run. Read this first: everything that happens in a run is named here, in order."""

from __future__ import annotations

from megakd.errors import CorruptError, ExitStatus, MismatchError, NonFiniteError
from megakd.parallel import init_parallel
from megakd.teachers.protocol import NoTeacher
from megakd.train.build import (
    build_evaluator,
    build_exporter,
    build_journal,
    build_loader,
    build_metrics,
    build_objective,
    build_student,
    build_teacher,
    build_writer,
    restore,
)
from megakd.train.config import TrainConfig
from megakd.train.culprits import name_samples
from megakd.train.optim import Optimizer
from megakd.train.preflight import Plan
from megakd.train.settings import settings_of
from megakd.train.standing import Standing
from megakd.train.step import run_step
from megakd.train.stop import StopRequest


def train(config: TrainConfig, plan: Plan) -> ExitStatus:
    """Train the student that ``config`` describes, from step 0 or from the checkpoint that ``plan`` found.

    All ranks call it. Returns COMPLETE, or STOPPED if a signal or ``exit_interval`` ended the run after a save (FAILED
    if there was nowhere to save).

    Raises:
        NonFiniteError: a loss or a gradient is not finite.
        MismatchError, CorruptError: a logits store has changed or is damaged.
            The step that met the error was not applied, and the steps before it were saved.
    """
    training, data = config.training, config.data
    last_step = training.train_iters
    groups = init_parallel(config.parallel, seed=training.seed)
    stop = StopRequest(groups.device, minutes=training.exit_duration_in_mins)
    student = build_student(training, plan, groups)
    teacher = build_teacher(config.teacher, config.objective, plan, groups)  # a model, logits stores, both, or none
    objective = build_objective(config.objective, config.kd_schedule(), plan, groups, train_iters=last_step)
    optimizer = Optimizer(config.optim, student, train_iters=last_step, lengths=config.lr_lengths)
    start_step, objective = restore(plan, student, objective, optimizer, groups)
    batches = build_loader(data, training, plan, groups)
    metrics = build_metrics(config, plan, groups, start_step)  # it records the whole configuration
    journal = build_journal(  # rows of the student's own distribution
        config.logits_save, training, config.checkpoint, plan, objective, groups, metrics, start_step
    )
    evaluate = build_evaluator(
        config.evaluate, data, training, config.teacher, plan, student, teacher, objective, groups, metrics
    )
    exporter = build_exporter(config, plan, groups, metrics)  # Hugging Face folders beside checkpoints
    writer, save = build_writer(
        config.checkpoint,
        settings_of(config),
        plan,
        student,
        optimizer,
        batches,
        journal,
        groups,
        metrics,
        start_step,
        exporter,
    )

    if config.evaluate.skip_train and evaluate is not None:
        metrics.log_evaluation(start_step, evaluate(start_step))
        last_step = start_step

    stopped = False
    for step in range(start_step + 1, last_step + 1):
        metrics.start_clock()
        optimizer.zero_grad()
        before, batch = Standing.of(batches, groups), next(batches)
        current = objective.at(step)
        asked = teacher if current.needs_teacher else NoTeacher()  # left out where no term reads its targets
        try:
            loss = run_step(student, batch, asked, current, groups, step=step, keep=journal.at(step))
            update = optimizer.step(step, before.consumed_samples)
        except (NonFiniteError, MismatchError, CorruptError) as refusal:
            before.restore()  # nothing of this step was applied: the steps before it are sound
            save(step - 1, objective)
            writer.finish()
            metrics.close(complete=False)
            raise name_samples(refusal, student, batch, asked, current, groups, step=step) from None
        objective = objective.advance(step, loss.kd)
        metrics.log(step, loss, update, samples=batches.consumed_samples)
        writer.poll()
        exporter.poll()

        at_end = step == last_step
        stopped = not at_end and (stop.agreed() or step - start_step == training.exit_interval)
        if evaluate is not None and not stopped and _due(step, config.evaluate.eval_interval, at_end):
            try:
                metrics.log_evaluation(step, evaluate(step))
            except (NonFiniteError, MismatchError, CorruptError):  # of held-out data: the training is sound
                save(step, objective)
                writer.finish()
                metrics.close(complete=False)
                raise
        if _due(step, config.checkpoint.save_interval, at_end or stopped):
            save(step, objective)
        if stopped:
            break

    writer.finish()
    exporter.finish(stopped=stopped)
    if start_step >= last_step and not config.evaluate.skip_train:
        metrics.say(f"nothing to do: the checkpoint is at iteration {start_step}, --train-iters is {last_step}")
    if stopped and config.checkpoint.save:
        without = " without --ckpt-step" if config.checkpoint.ckpt_step is not None else ""
        metrics.say(f"stopped after iteration {step} as asked; the same command{without} continues from here")
    elif stopped:
        metrics.say(f"stopped after iteration {step} as asked; nothing was saved, because there is no --save")
    metrics.close(complete=not stopped)
    if not stopped:
        return ExitStatus.COMPLETE
    return ExitStatus.STOPPED if config.checkpoint.save else ExitStatus.FAILED


def _due(step: int, interval: int, at_end: bool) -> bool:
    return at_end or (interval > 0 and step % interval == 0)
