"""Plot of runs: held-out loss against training tokens, and against FLOPs."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

from megakd.pipeline.compare.groups import Group
from megakd.pipeline.compare.table import UNITS, Comparison, Metric, compares
from megakd.run_folder.figures import Point


def draw(comparison: Comparison, *, suffix: str) -> bytes:
    """Draw the groups, and return the bytes of a file of the kind that ``suffix`` names.

    A group is a line through the means over its runs at the steps that all of them evaluated; several runs have a band
    of one standard deviation. Against FLOPs a thin dotted line includes the teacher's forward passes. Groups that were
    evaluated on other data than the baseline are left out (the table's notes name them).
    """
    import matplotlib  # late: it loads for a second, and most comparisons draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    base = comparison.base.runs[0].curve_key
    for number, group in enumerate(comparison.groups):
        if base is not None and any(
            run.curve_key is not None and not compares(run.curve_key, base, comparison.metric) for run in group.runs
        ):
            continue
        colour = f"C{number % 10}"
        points = mean_curve(group, comparison.metric)
        if not points:
            continue
        losses = [loss for _, loss, _ in points]
        tokens = [statistics.fmean(point.tokens for point in several) / 1e6 for several, _, _ in points]
        left.plot(tokens, losses, colour, marker="o", ms=3, lw=1.2, label=group.label)
        if len(group.runs) > 1:
            low, high = ([loss + sign * sd for _, loss, sd in points] for sign in (-1, 1))
            left.fill_between(tokens, low, high, color=colour, alpha=0.15, lw=0)
        alone, whole = (_flops(points, name) for name in ("flops", "all_flops"))
        if alone is not None:
            right.plot(alone, losses, colour, marker="o", ms=3, lw=1.2)
        if whole is not None and whole != alone:
            right.plot(whole, losses, colour, ls=":", marker="o", ms=2, lw=1)
    for axes in (left, right):
        if comparison.target is not None:
            axes.axhline(comparison.target, color="grey", ls="--", lw=0.8)
        axes.grid(alpha=0.3)
    left.set(xlabel="training tokens, millions", ylabel=UNITS[comparison.metric])
    # captures and scorings for many students are far more than the training of a small one
    right.set(xscale="log", xlabel="FLOPs of the student (dotted: with its teacher's forward passes)")
    if left.lines:
        left.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def mean_curve(group: Group, metric: Metric) -> list[tuple[list[Point], float, float]]:
    """Points, mean and deviation of the loss at each number of tokens at which every run of the group was evaluated."""
    curves = [{point.tokens: point for point in run.curve if metric in point.values} for run in group.runs if run.curve]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = []
    for tokens in common:
        several = [curve[tokens] for curve in curves]
        losses = [point.values[metric] for point in several]
        found.append((several, statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return found


def _flops(points: Sequence[tuple[list[Point], float, float]], name: str) -> list[float] | None:
    sums = [[getattr(point, name) for point in several] for several, _, _ in points]
    return None if any(value is None for values in sums for value in values) else [statistics.fmean(v) for v in sums]
