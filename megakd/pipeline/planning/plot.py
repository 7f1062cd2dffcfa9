"""Plot of fitted scaling laws: points, curves up to the largest extrapolation, and intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from megakd.pipeline.planning.scaling_law import ScalingFit


def draw_fits(names: Sequence[str], fits: Sequence[ScalingFit], *, until_flops: float) -> bytes:
    """Draw loss against compute as a PNG, each law from its first point to ``until_flops``, its floor dotted."""
    import matplotlib  # late: it loads for a second, and most plans draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, fit) in enumerate(zip(names, fits)):
        colour = f"C{number % 10}"
        grid = np.geomspace(fit.flops_n[0], max(until_flops, fit.flops_n[-1]), 80)
        estimates = [fit.at(flops) for flops in grid.tolist()]
        label = f"{name}: {fit.law.floor:.3f} + {fit.law.coefficient:.3g} / C^{fit.law.exponent:.3f}"
        axes.plot(grid, [estimate.value for estimate in estimates], colour, lw=1.2, label=label)
        axes.fill_between(grid, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, lw=0)
        axes.plot(fit.flops_n, fit.loss_n, colour, ls="", marker="o", ms=3)
        axes.axhline(fit.law.floor, color=colour, ls=":", lw=0.8)
    axes.set(xscale="log", xlabel="compute C, FLOPs", ylabel="held-out loss, nats a token")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
