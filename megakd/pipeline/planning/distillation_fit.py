"""Fit of the distillation scaling law to measured runs, of students alone and of students with teachers.

Axes: ``P`` starts, ``K`` constants, ``n`` runs.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.errors import UsageError
from megakd.pipeline.planning.csv_tables import open_table, positive
from megakd.pipeline.planning.distillation_law import DistillationLaw, SupervisedLaw
from megakd.pipeline.planning.huber_fit import Floats, Model, descend

MIN_ALONE, MIN_DISTILLED = 8, 12  # six and nine constants, and something left over
_COLUMNS = ("parameters", "tokens", "loss", "teacher_loss")
_TINY = 1e-30  # imaginary step of a derivative: nothing is subtracted, so nothing is lost
_TOLERANCE = 1e-9
_MOST_LEFT = 4  # starts that are followed to the end
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class Runs:
    """Measured runs. teacher_loss_n: NaN for a run without a teacher."""

    parameters_n: Floats
    tokens_n: Floats
    loss_n: Floats
    teacher_loss_n: Floats

    def __getitem__(self, chosen_n: NDArray[np.bool_]) -> Runs:
        columns = (self.parameters_n, self.tokens_n, self.loss_n, self.teacher_loss_n)
        return Runs(*(column[chosen_n] for column in columns))

    @property
    def distilled_n(self) -> NDArray[np.bool_]:
        """True for runs with a teacher."""
        return np.isfinite(self.teacher_loss_n)


@dataclass(frozen=True)
class DistillationFit:
    """A fitted law with its residuals: log of the measured loss over the law's, for runs alone and distilled."""

    law: DistillationLaw
    alone_residuals_n: Floats
    distilled_residuals_n: Floats


def read_runs(paths: Sequence[str]) -> Runs:
    """Read CSV files with the columns parameters (without embeddings), tokens, loss and teacher_loss, the last empty
    for a run without a teacher. Raises UsageError for other files."""
    rows: list[list[float]] = []
    for path in map(Path, paths):
        table = open_table("--distill-fit", path)
        missing = set(_COLUMNS) - set(table.fieldnames or ())
        if missing:
            raise UsageError(
                f"--distill-fit {path}: no column {', '.join(sorted(missing))}; expected {', '.join(_COLUMNS)}"
            )
        for row in table:
            rows.append([_value(path, table, column, row[column]) for column in _COLUMNS])
    return Runs(*np.array(rows, dtype=np.float64).reshape(-1, len(_COLUMNS)).T)


def fit_distillation(runs: Runs, *, huber_delta: float = 1e-4) -> DistillationFit:
    """Fit the supervised law to the runs alone, then the distillation law to the others, each from a grid of starts.

    Minimises the sum of Huber(log loss - log law) as in the paper, by a damped Gauss-Newton descent in place of its
    L-BFGS-B. If no teacher is far ahead of its student, c1 and d1 compensate each other: predictions are determined,
    these two constants are not.

    Raises UsageError for too few runs, or runs that all have one size, length or teacher.
    """
    alone, distilled = runs[~runs.distilled_n], runs[runs.distilled_n]
    _check("runs alone (teacher_loss empty)", alone, MIN_ALONE, ("parameters", "tokens"))
    _check("distilled runs", distilled, MIN_DISTILLED, ("parameters", "tokens", "teacher_loss"))
    law, alone_residuals_n = _fit_alone(alone, huber_delta)
    return _fit_distilled(distilled, law, alone_residuals_n, huber_delta)


def _fit_alone(runs: Runs, delta: float) -> tuple[SupervisedLaw, Floats]:
    x_n, y_n, middles = _centred(runs)

    def log_law(theta_PK: Complex) -> Complex:
        log_law_Pn: Complex = np.log(np.exp(theta_PK[:, :1]) + np.exp(_log_short(theta_PK[:, 1:], x_n, y_n)))
        return log_law_Pn

    level, starts = float(runs.loss_n.mean()), []
    for floor, alpha, beta, gamma in itertools.product((0.4, 0.7, 0.9), (0.25, 0.5), (0.25, 0.5), (0.4, 1.0)):
        above = max(level - floor * runs.loss_n.min(), 1e-3)
        log_term = math.log(above) / gamma - math.log(2)  # either term at the middle
        starts.append([math.log(floor * runs.loss_n.min()), log_term, log_term, *np.log([alpha, beta, gamma])])
    exponents = ([-5.0] * 3, [2.0] * 3)
    floors = (math.log(runs.loss_n.min()) - 12, math.log(runs.loss_n.min()))
    best_K, residuals_n = _best(log_law, runs.loss_n, starts, (floors, (-200, 200), (-200, 200)), exponents, delta)
    return SupervisedLaw(math.exp(best_K[0]), *_scales(best_K[1:], middles)), residuals_n


def _fit_distilled(runs: Runs, alone: SupervisedLaw, alone_residuals_n: Floats, delta: float) -> DistillationFit:
    x_n, y_n, middles = _centred(runs)
    log_teacher_n = np.log(runs.teacher_loss_n)
    sizes = zip(runs.parameters_n.tolist(), runs.tokens_n.tolist())
    log_alone_n = np.log([alone.loss(parameters, tokens) for parameters, tokens in sizes])

    def log_law(theta_PK: Complex) -> Complex:
        c0, log_c1, log_f1, log_d1 = (theta_PK[:, k : k + 1] for k in range(4))
        ratio_Pn = (log_teacher_n - log_alone_n - log_d1) / np.exp(log_f1)
        large_Pn = ratio_Pn.real > 40
        bracket_Pn = np.where(large_Pn, ratio_Pn, np.log1p(np.exp(np.where(large_Pn, 0, ratio_Pn))))
        factor_Pn = -c0 * log_teacher_n - np.exp(log_c1 + log_f1) * bracket_Pn
        above_Pn = np.exp(np.clip(factor_Pn.real, -600, 600) + 1j * factor_Pn.imag)
        log_law_Pn: Complex = np.log(runs.teacher_loss_n + above_Pn * np.exp(_log_short(theta_PK[:, 4:], x_n, y_n)))
        return log_law_Pn

    starts = []
    for c0, c1, f1, d1, alpha, gamma in itertools.product(
        (0.5, 2.5), (20.0, 500.0), (0.07, 0.2), (1.0, 1.3), (0.3, 0.6), (0.5, 1.0)
    ):
        bracket_n = np.logaddexp(0, (log_teacher_n - log_alone_n - math.log(d1)) / f1)
        above_n = np.abs(runs.loss_n - runs.teacher_loss_n) + 1e-3
        level = float(np.mean(np.log(above_n) + c0 * log_teacher_n + c1 * f1 * bracket_n))
        log_term = level / gamma - math.log(2)
        starts.append([c0, *np.log([c1, f1, d1]), log_term, log_term, *np.log([alpha, alpha, gamma])])
    free = ((-10.0, 20.0), (-7.0, 12.0), (-5.0, 2.0), (-1.5, 1.5), (-200.0, 200.0), (-200.0, 200.0))
    best_K, residuals_n = _best(log_law, runs.loss_n, starts, free, ([-5.0] * 3, [2.0] * 3), delta)
    c0, log_c1, log_f1, log_d1 = best_K[:4].tolist()
    c1, f1, d1 = math.exp(log_c1), math.exp(log_f1), math.exp(log_d1)
    source = f"fitted to {len(alone_residuals_n)} runs alone and {len(residuals_n)} distilled"
    law = DistillationLaw(alone, *_scales(best_K[4:], middles), c0=c0, c1=c1, f1=f1, d1=d1, source=source)
    return DistillationFit(law, alone_residuals_n, residuals_n)


def _best(
    log_law: Callable[[Complex], Complex],
    loss_n: Floats,
    starts: Sequence[Sequence[float]],
    free: Sequence[tuple[float, float]],
    exponents: tuple[list[float], list[float]],
    delta: float,
) -> tuple[Floats, Floats]:
    """The constants of the best of all starts, and its residuals."""
    log_loss_n, theta_PK = np.log(loss_n), np.array(starts, dtype=np.float64)
    lowest_K = np.array([*(low for low, _ in free), *exponents[0]])
    highest_K = np.array([*(high for _, high in free), *exponents[1]])
    for max_steps in (30, 1000):  # all a little, then the best to the end
        theta_PK, cost_P = descend(
            _with_slopes(log_law),
            np.broadcast_to(log_loss_n, (len(theta_PK), len(log_loss_n))),
            theta_PK,
            lowest_K=lowest_K,
            highest_K=highest_K,
            delta=delta,
            tolerance=_TOLERANCE,
            max_steps=max_steps,
        )
        theta_PK = theta_PK[np.argsort(cost_P)[:_MOST_LEFT]]
    best_K = theta_PK[0]
    residuals_n: Floats = log_loss_n - log_law(best_K[None].astype(np.complex128)).real[0]
    return best_K, residuals_n


def _with_slopes(log_law: Callable[[Complex], Complex]) -> Model:
    """The law with its derivatives by complex steps: Im f(x + ih) / h is f'(x) to the last bit for a tiny h."""

    def model(theta_PK: Floats) -> tuple[Floats, Floats]:
        theta = theta_PK.astype(np.complex128)
        steps = 1j * _TINY * np.eye(theta.shape[1])
        slopes_PKn = np.stack([log_law(theta + step_K).imag / _TINY for step_K in steps], axis=1)
        return log_law(theta).real, slopes_PKn

    return model


def _log_short(theta_P5: Complex, x_n: Floats, y_n: Floats) -> Complex:
    """``[P, n]``: gamma · log(A / N^alpha + B / D^beta); theta: logs of both terms at the middle, of the exponents."""
    alpha, beta, gamma = (np.exp(theta_P5[:, k : k + 1]) for k in (2, 3, 4))
    by_size_Pn, by_tokens_Pn = theta_P5[:, :1] - alpha * x_n, theta_P5[:, 1:2] - beta * y_n
    larger_Pn = np.maximum(by_size_Pn.real, by_tokens_Pn.real)
    sum_Pn = np.exp(by_size_Pn - larger_Pn) + np.exp(by_tokens_Pn - larger_Pn)
    short_Pn: Complex = gamma * (larger_Pn + np.log(sum_Pn))
    return short_Pn


def _centred(runs: Runs) -> tuple[Floats, Floats, tuple[float, float]]:
    """Logs of parameters and tokens around their means, so that scales and exponents are fitted apart; the means."""
    x_n, y_n = np.log(runs.parameters_n), np.log(runs.tokens_n)
    return x_n - x_n.mean(), y_n - y_n.mean(), (float(x_n.mean()), float(y_n.mean()))


def _scales(theta_5: Floats, middles: tuple[float, float]) -> tuple[float, float, float, float, float]:
    """A, B, alpha, beta, gamma."""
    alpha, beta, gamma = np.exp(theta_5[2:]).tolist()
    return math.exp(theta_5[0] + alpha * middles[0]), math.exp(theta_5[1] + beta * middles[1]), alpha, beta, gamma


def _check(what: str, runs: Runs, least: int, columns: Sequence[str]) -> None:
    if len(runs.loss_n) < least:
        raise UsageError(f"--distill-fit: {len(runs.loss_n)} {what}; expected at least {least}")
    for column in columns:
        values: Any = getattr(runs, f"{column}_n")
        if len(np.unique(values)) < 3:
            raise UsageError(f"--distill-fit: {what} have fewer than 3 different values of {column}: no law to fit")


def _value(path: Path, table: csv.DictReader[str], column: str, text: str | None) -> float:
    if column == "teacher_loss" and not (text or "").strip():
        return math.nan
    return positive("--distill-fit", path, table, column, text)
