"""Robust fits of a law's logarithm to points, many side by side: Levenberg-Marquardt on Huber's loss.

Axes: ``P`` fits made side by side, ``K`` constants, ``n`` points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Model = Callable[[Floats], tuple[Floats, Floats]]
"""``theta_PK -> (log_law_Pn, slopes_PKn)``: log of the law, and its derivatives by the constants."""

_MOST_DAMPING = 1e6  # beyond it steps vanish beside the constants


def descend(
    model: Model,
    log_value_Pn: Floats,
    theta_PK: Floats,
    *,
    lowest_K: Floats,
    highest_K: Floats,
    delta: float,
    tolerance: float,
    max_steps: int = 300,
) -> tuple[Floats, Floats]:
    """Minimise the sum of Huber(log value - log law) from every start, each with its own damping: ``(theta, cost_P)``.

    lowest_K, highest_K: limits of the constants. delta: residuals up to here count quadratically, larger ones linearly.
    tolerance: a fit is done when a step that lowers the cost moves no constant by more.
    """
    theta_PK = np.array(theta_PK)
    damping_P = np.full(len(theta_PK), 1e-2)
    cost_P = _huber(log_value_Pn - model(theta_PK)[0], delta)
    left = np.arange(len(theta_PK))  # the fits that are not done
    for _ in range(max_steps):
        step_PK = _step(model, log_value_Pn[left], theta_PK[left], damping_P[left], delta)
        trial_PK = np.clip(theta_PK[left] + step_PK, lowest_K, highest_K)
        trial_cost_P = _huber(log_value_Pn[left] - model(trial_PK)[0], delta)
        better_P = trial_cost_P < cost_P[left]
        theta_PK[left[better_P]], cost_P[left[better_P]] = trial_PK[better_P], trial_cost_P[better_P]
        damping_P[left] = np.clip(damping_P[left] * np.where(better_P, 0.2, 5.0), 1e-10, _MOST_DAMPING)
        still_P = np.where(better_P, np.abs(step_PK).max(axis=1) > tolerance, damping_P[left] < _MOST_DAMPING)
        left = left[still_P]
        if not len(left):
            break
    return theta_PK, cost_P


def _huber(residuals_Pn: Floats, delta: float) -> Floats:
    size_Pn = np.abs(residuals_Pn)
    cost_P: Floats = np.where(size_Pn <= delta, 0.5 * size_Pn**2, delta * (size_Pn - 0.5 * delta)).sum(axis=1)
    return cost_P


def _step(model: Model, log_value_Pn: Floats, theta_PK: Floats, damping_P: Floats, delta: float) -> Floats:
    """``[P, K]``: the damped Gauss-Newton step, each point with the weight that Huber's loss gives it."""
    log_law_Pn, slopes_PKn = model(theta_PK)
    residuals_Pn = log_value_Pn - log_law_Pn
    weighted_PKn = slopes_PKn * (delta / np.maximum(np.abs(residuals_Pn), delta))[:, None, :]
    curvature_PKK = weighted_PKn @ slopes_PKn.transpose(0, 2, 1)
    diagonal_PK = np.einsum("pii->pi", curvature_PKK)
    damped_PKK = curvature_PKK + np.eye(theta_PK.shape[1]) * (damping_P[:, None] * diagonal_PK + 1e-14)[:, None, :]
    descent_PK1 = weighted_PKn @ residuals_Pn[:, :, None]
    step_PK: Floats = np.clip(np.linalg.solve(damped_PKK, descent_PK1)[:, :, 0], -2, 2)
    return step_PK
