"""``megakd plan``: costs of refining a corpus, scaling laws of training curves, and whether a teacher pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megakd.artefacts.durable_files import atomic_write
from megakd.artefacts.manifest import as_json
from megakd.config.tree import parse, to_dict
from megakd.errors import ExitStatus, UsageError
from megakd.pipeline.planning.config import CostConfig, FitConfig, PlanConfig
from megakd.pipeline.planning.costs import (
    Refinement,
    advise_ratio,
    amortised,
    gpu_hours,
    minillm_steps,
    storage,
    vanilla_kd_steps,
)
from megakd.pipeline.planning.costs_text import FIT_NOTE, describe_costs, describe_fit
from megakd.pipeline.planning.curves import Curve, read_curves
from megakd.pipeline.planning.distillation import DistillPlan, distillation_as_dict, plan_distillation
from megakd.pipeline.planning.distillation_law import law_as_dict
from megakd.pipeline.planning.distillation_text import describe_distillation
from megakd.pipeline.planning.plot import draw_fits
from megakd.pipeline.planning.scaling_law import Estimate, ScalingFit, fit_scaling

HELP = "count what refining and training cost, fit scaling laws to training curves, weigh a teacher against more data"
FORMAT, VERSION = "megakd-plan", 1
_READABLE = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(PlanConfig, argv, prog="megakd plan", description=HELP)
    lines: list[str] = []
    result: dict[str, Any] = {"format": FORMAT, "version": VERSION, "config": to_dict(config)}
    picture = None
    if config.cost.student:
        plan = config.cost.refinement()
        lines += describe_costs(config.cost, plan)
        result["costs"] = costs_as_dict(config.cost, plan)
    if config.scaling.fit:
        curves, fits = fit_curves(config.scaling)
        targets = [extrapolation_targets(config.scaling, curve) for curve in curves]
        lines += FIT_NOTE
        for curve, fit, flops in zip(curves, fits, targets):
            lines += describe_fit(curve, fit, flops, (curves[0].name, fits[0]))
        result["curves"] = [fit_as_dict(*both) for both in zip(curves, fits, targets)]
        if config.output is not None:
            until = max(flops for several in targets for flops in several)
            picture = draw_fits([curve.name for curve in curves], fits, until_flops=until)
    distillation: DistillPlan | None = None
    if config.distillation.distill or config.distillation.distill_fit:
        vocab_size, seq_length = config.cost.vocab_size, config.cost.seq_length
        distillation = plan_distillation(config.distillation, vocab_size=vocab_size, seq_length=seq_length)
        lines += describe_distillation(distillation)
        result["distillation"] = distillation_as_dict(distillation)
    print("\n".join(lines).rstrip())
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "plan.md", ("\n".join(lines).rstrip() + "\n").encode(errors="backslashreplace"))
        atomic_write(folder / "plan.json", orjson.dumps(as_json(result), option=_READABLE))
        if distillation is not None and distillation.fit is not None:
            law = orjson.dumps(as_json(law_as_dict(distillation.law)), option=_READABLE)
            atomic_write(folder / "distillation_law.json", law)
        if picture is not None:
            atomic_write(folder / "scaling.png", picture)
    return ExitStatus.COMPLETE


def fit_curves(config: FitConfig) -> tuple[list[Curve], list[ScalingFit]]:
    """Read and fit every curve of ``--fit``. Raises UsageError for one that cannot be fitted."""
    curves = read_curves(config.fit, points=config.fit_points, from_tokens=config.fit_from_tokens)
    fits = [
        fit_scaling(
            curve.flops_n,
            curve.loss_n,
            huber_delta=config.huber_delta,
            num_replicates=config.bootstrap,
            level=config.level,
            seed=config.seed,
            name=f"--fit {curve.name}",
        )
        for curve in curves
    ]
    return curves, fits


def extrapolation_targets(config: FitConfig, curve: Curve) -> list[float]:
    """FLOPs to extrapolate to, ascending. Raises UsageError for tokens if the curve has models of several sizes."""
    if config.extrapolate_tokens and curve.parameters is None:
        raise UsageError(
            f"--extrapolate-tokens: the points of {curve.name} are of several model sizes, or do not tell; use "
            "--extrapolate-flops (6 x parameters x tokens), or add a column parameters"
        )
    size = curve.parameters or 0.0
    flops = [*config.extrapolate_flops, *(6 * size * tokens for tokens in config.extrapolate_tokens)]
    return sorted(flops) or [10 * float(curve.flops_n.max())]


def costs_as_dict(config: CostConfig, plan: Refinement) -> dict[str, Any]:
    """All figures of the costs as plain data, in FLOPs, tokens, bytes and hours."""
    outputs = int(config.per_token_log_probs) + int(config.per_token_entropy)

    def hours(flops: float) -> float | None:
        return None if config.tflops_per_gpu is None else gpu_hours(flops, config.tflops_per_gpu)

    students = []
    for size in plan.students:
        sizes = {"student": size.parameters, "teacher": plan.teacher.parameters}
        students.append(
            {
                **dataclasses.asdict(size),
                "training_flops": plan.training_flops(size),
                "training_gpu_hours": hours(plan.training_flops(size)),
                "vanilla_kd_steps": vanilla_kd_steps(plan.steps, **sizes),
                "minillm_steps": minillm_steps(plan.steps, **sizes),
                "offline_share": amortised(plan, size, [1])[0],
            }
        )
    return {
        "teacher": dataclasses.asdict(plan.teacher),
        "reference": dataclasses.asdict(plan.reference),
        "students": students,
        "corpus_tokens": plan.corpus_tokens,
        "scored_tokens": plan.scored_tokens,
        "kept_tokens": plan.kept_tokens,
        "train_tokens": plan.train_tokens,
        "reference_flops": plan.reference_flops,
        "teacher_scoring_flops": plan.scoring_flops(plan.teacher),
        "reference_scoring_flops": plan.scoring_flops(plan.reference),
        "offline_flops": plan.offline_flops,
        "offline_gpu_hours": hours(plan.offline_flops),
        "proxy_flops": plan.proxy_flops,
        "break_even_students": plan.break_even_runs,
        "ratio_advice": dataclasses.asdict(advise_ratio(plan.train_tokens, plan.scored_tokens)),
        "storage_bytes": dataclasses.asdict(
            storage(plan, seq_length=config.seq_length, vocab_size=config.vocab_size, token_outputs=outputs)
        ),
    }


def fit_as_dict(curve: Curve, fit: ScalingFit, targets: Sequence[float]) -> dict[str, Any]:
    """One fitted curve as plain data: constants and extrapolations with intervals, doubts, points."""
    return {
        "name": curve.name,
        "parameters": curve.parameters,
        "law": {name: _interval(estimate) for name, estimate in fit.constants.items()},
        "level": fit.level,
        "extrapolations": [{"flops": flops, "loss": _interval(fit.at(flops))} for flops in targets],
        "doubts": fit.doubts,
        "points": [
            {"flops": flops, "loss": loss, "log_residual": residual}
            for flops, loss, residual in zip(fit.flops_n.tolist(), fit.loss_n.tolist(), fit.residuals_n.tolist())
        ],
    }


def _interval(estimate: Estimate) -> dict[str, float]:
    return dataclasses.asdict(estimate)
