"""The scaling law L(C) = L_inf + A / C^a of one training curve: fitted robustly, with bootstrap intervals.

C: floating-point operations of training, 6 x parameters x tokens. L: held-out loss, nats a token. The form and its use
are MiniPLM's (arXiv 2410.17215); Huber's loss on log residuals is Chinchilla's (arXiv 2203.15556). Axes: ``P`` fits
made side by side, ``n`` points.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from megakd.errors import UsageError
from megakd.pipeline.planning.huber_fit import Floats, Model, descend

MIN_POINTS = 5  # three constants, and two more to estimate the noise
_STARTS = np.geomspace(0.03, 1.5, 24)  # exponents to start from; what has been published lies within 0.05 and 0.6
_EXPONENTS = (1e-3, 10.0)
_LOG_LARGEST = math.log(sys.float_info.max)
_CHUNK_FLOATS = 1 << 20


@dataclass(frozen=True)
class ScalingLaw:
    """``loss = floor + coefficient / flops ** exponent``: L_inf, A and a of the formula."""

    floor: float
    coefficient: float
    exponent: float

    def loss(self, flops: float) -> float:
        """The loss after ``flops`` of training."""
        return self.floor + self.coefficient * math.exp(-self.exponent * math.log(flops))

    def flops(self, loss: float) -> float:
        """FLOPs of training that reach ``loss``; infinite at the floor and below."""
        if loss <= self.floor:
            return math.inf
        log_flops = (math.log(self.coefficient) - math.log(loss - self.floor)) / self.exponent
        return math.exp(log_flops) if log_flops < _LOG_LARGEST else math.inf


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law, the points it was fitted to, and as many laws fitted to points redrawn from its residuals.

    flops_n, loss_n: the points, by increasing flops. residuals_n: log of the loss over the law's. level: confidence
    level of the intervals. replicates: the redrawn laws; empty for intervals without width.
    """

    law: ScalingLaw
    flops_n: Floats
    loss_n: Floats
    residuals_n: Floats
    level: float
    replicates: tuple[ScalingLaw, ...] = field(repr=False)

    def at(self, flops: float) -> Estimate:
        """The loss after ``flops``, if the law still holds there."""
        return self._estimate(self.law.loss(flops), [law.loss(flops) for law in self.replicates])

    @property
    def constants(self) -> dict[str, Estimate]:
        """``floor``, ``coefficient`` and ``exponent``, each with its interval."""
        return {
            name: self._estimate(getattr(self.law, name), [getattr(law, name) for law in self.replicates])
            for name in ("floor", "coefficient", "exponent")
        }

    @property
    def doubts(self) -> list[str]:
        """Reasons not to rely on the fit, a sentence each."""
        doubts = []
        floor, span = self.constants["floor"], float(self.flops_n[-1] / self.flops_n[0])
        if self.law.floor < 0.01 * self.loss_n.min() or floor.high - floor.low > 0.2 * self.law.floor:
            doubts.append(
                f"the floor is hardly determined ({floor.value:.3f}, {floor.low:.3f} to {floor.high:.3f}): "
                "the points end too far above it"
            )
        if span < 8:
            doubts.append(f"the points span a factor {span:.2g} of compute; a law wants 10 and more")
        if not _EXPONENTS[0] * 1.01 < self.law.exponent < _EXPONENTS[1] * 0.99:
            doubts.append(f"the exponent {self.law.exponent:.3g} lies at the limit of the search: this is no power law")
        return doubts

    def _estimate(self, value: float, redrawn: list[float]) -> Estimate:
        if not redrawn:
            return Estimate(value, value, value)
        low, high = np.quantile(redrawn, [(1 - self.level) / 2, (1 + self.level) / 2]).tolist()
        return Estimate(value, low, high)


def fit_scaling(
    flops_n: Floats,
    loss_n: Floats,
    *,
    huber_delta: float = 1e-3,
    num_replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    name: str = "the curve",
) -> ScalingFit:
    """Fit a law to points, with confidence intervals.

    Minimises the sum of Huber(log loss - log law), quadratic up to ``huber_delta``, linear beyond, so that one bad
    point weighs little. The intervals are percentiles over ``num_replicates`` fits to the law times redrawn residuals,
    widened by sqrt(n / (n - 3)) for the three fitted constants. They account for the noise of the points alone, and are
    a little narrow: intervals of 95% held the truth in 90% of simulated curves of 12 points. Points along one run share
    their noise, which makes them narrower still; and an interval says nothing about whether the law still holds.

    Raises:
        UsageError: fewer than 5 different computes, numbers that are not positive, a loss that does not fall.
    """
    order_n = np.argsort(flops_n, kind="stable")
    flops_n = np.asarray(flops_n, dtype=np.float64)[order_n]
    loss_n = np.asarray(loss_n, dtype=np.float64)[order_n]
    _check(flops_n, loss_n, name)
    # Compute around its geometric mean: A itself reaches 1e11, and is all but the exponent's double.
    middle = float(np.log(flops_n).mean())
    x_n, log_loss_n = np.log(flops_n) - middle, np.log(loss_n)
    starts_P3 = _starts(x_n, loss_n)
    model, (lowest_3, highest_3) = _log_law(x_n), _limits(log_loss_n)
    fit = partial(descend, model, lowest_K=lowest_3, highest_K=highest_3, delta=huber_delta)
    tried_P3, cost_P = fit(np.broadcast_to(log_loss_n, (len(starts_P3), len(x_n))), starts_P3, tolerance=1e-10)
    best_3 = tried_P3[np.argmin(cost_P)]
    fitted_n = model(best_3[None])[0][0]
    residuals_n = log_loss_n - fitted_n
    widened_n = residuals_n * math.sqrt(len(x_n) / (len(x_n) - 3))
    random, replicates = np.random.default_rng(seed), []
    chunk = max(1, _CHUNK_FLOATS // len(x_n))
    for done in range(0, num_replicates, chunk):
        drawn_Pn = random.choice(widened_n, size=(min(chunk, num_replicates - done), len(x_n)))
        starts_P3 = np.broadcast_to(best_3, (len(drawn_Pn), 3))
        redrawn_P3, _ = fit(fitted_n + drawn_Pn, starts_P3, tolerance=1e-5)
        replicates += [_law(row_3, middle) for row_3 in redrawn_P3]
    return ScalingFit(_law(best_3, middle), flops_n, loss_n, residuals_n, level, tuple(replicates))


def _check(flops_n: Floats, loss_n: Floats, name: str) -> None:
    for flops, loss in zip(flops_n.tolist(), loss_n.tolist()):
        if not (0 < flops < math.inf and 0 < loss < math.inf):
            raise UsageError(f"{name}: loss {loss} after {flops} FLOPs; expected positive, finite numbers")
    different = len(np.unique(flops_n))
    if different < MIN_POINTS:
        raise UsageError(
            f"{name}: {different} points of different compute; a fit of three constants needs at least {MIN_POINTS}: "
            "evaluate more often (--eval-interval), or add runs"
        )
    half = len(loss_n) // 2
    early, late = float(np.median(loss_n[:half])), float(np.median(loss_n[-half:]))
    if late >= early:
        raise UsageError(
            f"{name}: the loss does not fall with compute (median {early:.4f} over the first half of the points, "
            f"{late:.4f} over the last); there is no law to fit"
        )


def _starts(x_n: Floats, loss_n: Floats) -> Floats:
    """``[P, 3]``: logs of floor, coefficient and exponent: for each exponent the least squares, kept positive."""
    starts = []
    for exponent in _STARTS.tolist():
        power_n = np.exp(-exponent * x_n)
        slope = float(np.cov(power_n, loss_n, bias=True)[0, 1] / power_n.var())
        coefficient = max(slope, 1e-3 * float(loss_n.min()))
        floor = max(float((loss_n - coefficient * power_n).mean()), 0.05 * float(loss_n.min()))
        starts.append((math.log(floor), math.log(coefficient), math.log(exponent)))
    return np.array(starts)


def _law(theta_3: Floats, middle: float) -> ScalingLaw:
    log_floor, log_term, log_exponent = theta_3.tolist()
    exponent = math.exp(log_exponent)
    return ScalingLaw(math.exp(log_floor), math.exp(log_term + exponent * middle), exponent)


def _log_law(x_n: Floats) -> Model:
    """Log of the law at x, the centred log of compute. theta: logs of the floor, of the falling term at x = 0, and of
    the exponent."""

    def model(theta_P3: Floats) -> tuple[Floats, Floats]:
        exponent_P1 = np.exp(theta_P3[:, 2:])
        falling_Pn = np.exp(theta_P3[:, 1:2] - exponent_P1 * x_n)
        law_Pn = np.exp(theta_P3[:, :1]) + falling_Pn
        share_Pn = falling_Pn / law_Pn
        return np.log(law_Pn), np.stack([1 - share_Pn, share_Pn, -share_Pn * x_n * exponent_P1], axis=1)

    return model


def _limits(log_loss_n: Floats) -> tuple[Floats, Floats]:
    lowest_3 = np.array([log_loss_n.min() - 20, -np.inf, math.log(_EXPONENTS[0])])
    return lowest_3, np.array([log_loss_n.max(), np.inf, math.log(_EXPONENTS[1])])
