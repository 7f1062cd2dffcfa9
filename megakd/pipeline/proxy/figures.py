"""Quality of a proxy on differences that it was not fitted to, beside the baselines: figures, table, plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megakd.work.text_table import columns

Values = NDArray[np.float64]


def describe(true: Values, predictions: Mapping[str, Values], *, ratio: float) -> dict[str, dict[str, float | None]]:
    """Figures of `judge` for each prediction ``[n]`` of ``true`` ``[n]``, and under ``constant`` for a constant.

    A constant keeps samples at random, and agrees with probability r² + (1 - r)², r the share kept.
    """
    figures = {name: judge(true, predicted, ratio=ratio) for name, predicted in predictions.items()}
    share = math.floor(ratio * len(true)) / len(true)
    chance = {"pearson": None, "spearman": None, "r_squared": 0.0, "keep_agreement": share**2 + (1 - share) ** 2}
    return {**figures, "constant": chance}


def judge(true: Values, predicted: Values, *, ratio: float) -> dict[str, float | None]:
    """Hold predictions ``[n]`` against the truth ``[n]``.

    ``pearson`` and ``spearman``: correlations, None where either side is constant. ``r_squared``: 1 - squared error /
    variance. ``keep_agreement``: the share of samples that are kept by both or by neither, where each keeps the
    ``ratio`` with the largest values.
    """
    return {
        "pearson": correlation(true, predicted),
        "spearman": correlation(_ranks(true), _ranks(predicted)),
        "r_squared": float(1 - ((predicted - true) ** 2).mean() / true.var()) if true.var() > 0 else None,
        "keep_agreement": float((_kept(true, ratio) == _kept(predicted, ratio)).mean()),
    }


def correlation(x: Values, y: Values) -> float | None:
    """Pearson's correlation; None where either is constant."""
    spreads = x - x.mean(), y - y.mean()
    size = math.sqrt((spreads[0] ** 2).sum() * (spreads[1] ** 2).sum())
    return float((spreads[0] * spreads[1]).sum() / size) if size > 0 else None


def fit_line(x: Values, y: Values) -> tuple[float, float]:
    """Return ``(a, b)`` with the least sum of squares of ``y - a - b x``."""
    spread = x - x.mean()
    slope = float((spread * y).sum() / (spread**2).sum()) if spread.any() else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope


def table(figures: Mapping[str, Mapping[str, float | None]], *, ratio: float) -> str:
    """The figures as text, a line for each prediction, the best agreement first."""
    rows: list[tuple[str, ...]] = [("", "Pearson", "Spearman", "R²", f"agrees at {ratio:g}")]
    for name, row in sorted(figures.items(), key=lambda item: -(item[1]["keep_agreement"] or 0)):
        cells = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("pearson", "spearman", "r_squared")]
        rows.append((name, *cells, f"{row['keep_agreement']:.4f}"))
    return "\n".join(columns(rows, widths=(24, 9, 10, 9, 16), gap=""))


def draw(true: Values, predicted: Values) -> bytes:
    """Draw predicted against true differences, a point for each sample, as a PNG."""
    import matplotlib  # late: it loads for a second, and --help and refusals draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    axes.plot(true, predicted, ls="", marker=".", ms=3, alpha=0.5)
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, "r:", lw=0.8, label="equal")
    axes.set(xlabel="true difference, nats a token", ylabel="predicted")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _ranks(values: Values) -> Values:
    """Ranks from 0; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Values = (ends - 1 + ends - counts) / 2.0
    return means[inverse]


def _kept(values: Values, ratio: float) -> NDArray[np.bool_]:
    kept = np.zeros(len(values), np.bool_)
    kept[np.argsort(-values, kind="stable")[: math.floor(ratio * len(values))]] = True
    return kept
