"""Students alone against students distilled, at equal tokens and at equal FLOPs: does a teacher pay?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.pipeline.planning.costs import ModelSize, model_size
from megakd.pipeline.planning.distillation_fit import DistillationFit, fit_distillation, read_runs
from megakd.pipeline.planning.distillation_law import PUBLISHED, DistillationLaw, law_as_dict, read_law


@dataclass(frozen=True)
class DistillConfig:
    """The students and teachers to weigh, and the law to do it by."""

    distill: list[str] = option(
        [], "sizes of students to distil: parameters, checkpoint folders or presets", common=True
    )
    distill_tokens: list[float] = option(
        [], "training tokens of each student (default: 20 and 160 a parameter)", common=True
    )
    distill_teacher: list[str] = option([], "sizes of the teachers to choose from", common=True)
    distill_teacher_tokens: list[float] = option(
        [], "training tokens of each teacher; one number for all or one each (default: 20 a parameter)", common=True
    )
    distill_teacher_loss: list[float] = option(
        [], "held-out loss of each teacher, if it is known (default: by the supervised law)", common=True
    )
    distill_students: int = option(1, "number of students that share the training of a teacher")
    distill_fit: list[str] = option(
        [], "runs to fit the law to: CSV files of parameters (no embeddings), tokens, loss, teacher_loss", common=True
    )
    distill_law: str | None = option(
        None, "a distillation_law.json that --distill-fit wrote (default: the published constants)", common=True
    )
    distill_huber_delta: float = option(1e-4, "log residual of the fit up to which runs count quadratically")

    def validate(self) -> None:
        """Raise UsageError for flags that need others, and for numbers out of range."""
        dependent = ("tokens", "teacher", "teacher_tokens", "teacher_loss")
        if not self.distill:
            for name in dependent:
                if getattr(self, f"distill_{name}"):
                    raise UsageError(f"--distill-{name.replace('_', '-')} without --distill SIZE...: whom to distil?")
            if self.distill_law is not None:
                raise UsageError("--distill-law without --distill SIZE...: there is nothing to plan for")
        elif not (self.distill_teacher or self.distill_teacher_loss):
            raise UsageError(
                "--distill without a teacher: add --distill-teacher SIZE... or --distill-teacher-loss LOSS"
            )
        if self.distill_fit and self.distill_law is not None:
            raise UsageError("--distill-fit makes a law and --distill-law brings one: give one of them")
        for name in ("tokens", "teacher_tokens", "teacher_loss"):
            values = getattr(self, f"distill_{name}")
            if not all(0 < value < math.inf for value in values):
                raise UsageError(f"--distill-{name.replace('_', '-')} {values}: expected positive numbers")
        teachers = len(self.distill_teacher)
        if teachers and len(self.distill_teacher_loss) not in (0, teachers):
            raise UsageError(
                f"--distill-teacher-loss: {len(self.distill_teacher_loss)} for {teachers} teachers; expected one each"
            )
        if len(self.distill_teacher_tokens) not in (0, 1, teachers):
            raise UsageError(
                f"--distill-teacher-tokens: {len(self.distill_teacher_tokens)} for {teachers} teachers; expected one "
                "for all or one each"
            )
        if self.distill_students < 1:
            raise UsageError(f"--distill-students {self.distill_students}: expected 1 or more")
        if self.distill_huber_delta <= 0:
            raise UsageError(f"--distill-huber-delta {self.distill_huber_delta}: expected a positive number")


@dataclass(frozen=True)
class Candidate:
    """A teacher: its loss, and the FLOPs of a forward pass over a token and of all its training (None: not known)."""

    name: str
    loss: float
    forward_flops: float | None
    training_flops: float | None


@dataclass(frozen=True)
class Account:
    """One way to count a distilled student's FLOPs, and a student trained alone with as many.

    flops: of the student and the counted part of its teacher. alone_loss: loss of the student trained alone with as
    many FLOPs. wins: the range of tokens in which distilling is better at equal FLOPs; None if there is none.
    """

    flops: float
    alone_loss: float
    wins: tuple[float, float] | None


@dataclass(frozen=True)
class Pair:
    """A student and a teacher. accounts: the teacher's outputs exist; it runs beside the student; it is trained too."""

    teacher: Candidate
    loss: float
    accounts: tuple[Account, ...]


@dataclass(frozen=True)
class StudentPlan:
    """A student trained for some tokens. best_teacher_loss: loss of the teacher that would make it best."""

    student: ModelSize
    tokens: float
    alone_loss: float
    best_teacher_loss: float
    pairs: tuple[Pair, ...]

    @property
    def best(self) -> Pair:
        """The pair with the least loss of the student."""
        return min(self.pairs, key=lambda pair: pair.loss)


@dataclass(frozen=True)
class DistillPlan:
    """The law and the students weighed by it. fit: None if the law was not fitted here."""

    law: DistillationLaw
    fit: DistillationFit | None
    students: tuple[StudentPlan, ...]


def plan_distillation(config: DistillConfig, *, vocab_size: int, seq_length: int) -> DistillPlan:
    """Fit or read the law, and pair every student with every teacher. Raises UsageError, MismatchError."""
    fit = None
    if config.distill_fit:
        fit = fit_distillation(read_runs(config.distill_fit), huber_delta=config.distill_huber_delta)
    law = fit.law if fit else read_law(Path(config.distill_law)) if config.distill_law else PUBLISHED

    def size(spec: str, flag: str) -> ModelSize:
        return model_size(spec, flag=flag, vocab_size=vocab_size, seq_length=seq_length)

    teachers = _candidates(config, law, [size(spec, "distill-teacher") for spec in config.distill_teacher])
    plans = []
    for student in [size(spec, "distill") for spec in config.distill]:
        body = law_parameters(student)
        for tokens in config.distill_tokens or (20 * body, 160 * body):
            plans.append(
                StudentPlan(
                    student,
                    tokens,
                    alone_loss=law.alone.loss(body, tokens),
                    best_teacher_loss=law.best_teacher_loss(body, tokens),
                    pairs=tuple(_pair(law, student, tokens, teacher, config.distill_students) for teacher in teachers),
                )
            )
    return DistillPlan(law, fit, tuple(plans))


def law_parameters(size: ModelSize) -> float:
    """The law's N: parameters without the projection to the vocabulary; a size given as a number is N itself."""
    return size.parameters - size.projection


def _candidates(config: DistillConfig, law: DistillationLaw, sizes: list[ModelSize]) -> list[Candidate]:
    known = config.distill_teacher_loss
    if not sizes:
        return [Candidate(f"loss {loss:g}", loss, None, None) for loss in known]
    tokens = config.distill_teacher_tokens or [20 * law_parameters(size) for size in sizes]
    tokens = tokens * len(sizes) if len(tokens) == 1 else tokens
    losses = known or [law.alone.loss(law_parameters(size), seen) for size, seen in zip(sizes, tokens)]
    return [
        Candidate(size.name, loss, 2 * size.parameters, 6 * size.parameters * seen)
        for size, seen, loss in zip(sizes, tokens, losses)
    ]


def _pair(law: DistillationLaw, student: ModelSize, tokens: float, teacher: Candidate, sharing: int) -> Pair:
    """Pair two models. FLOPs: 3 F(N_S) D_S + F(N_T) (D_S if it runs beside + 3 D_T if it is trained), F = 2N."""
    body, per_token = law_parameters(student), 6 * student.parameters

    def account(run: float, train: float) -> Account:
        def alone_tokens(of_student: float) -> float:
            return of_student + (run * of_student + train) / per_token

        return Account(
            flops=per_token * alone_tokens(tokens),
            alone_loss=law.alone.loss(body, alone_tokens(tokens)),
            wins=law.winning_range(body, teacher.loss, alone_tokens),
        )

    accounts = [account(0.0, 0.0)]
    if teacher.forward_flops is not None and teacher.training_flops is not None:
        accounts += [account(teacher.forward_flops, 0.0)]
        accounts += [account(teacher.forward_flops, teacher.training_flops / sharing)]
    return Pair(teacher, law.loss(body, tokens, teacher.loss), tuple(accounts))


def distillation_as_dict(plan: DistillPlan) -> dict[str, Any]:
    """All figures as plain data: losses in nats a token, FLOPs, tokens. Infinite tokens are null in JSON."""
    figures: dict[str, Any] = {"students": [dataclasses.asdict(student) for student in plan.students]}
    if plan.fit is not None:
        figures["alone_log_residuals"] = plan.fit.alone_residuals_n.tolist()
        figures["distilled_log_residuals"] = plan.fit.distilled_residuals_n.tolist()
    return {"law": law_as_dict(plan.law), **figures}
