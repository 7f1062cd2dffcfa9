"""The plots of a report, each a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from megakd.pipeline.report_figures import Figures
from megakd.pipeline.report_tables import Table
from megakd.pipeline.report_text import visible

_MOST_DOMAINS = 40


def draw(figures: Figures, tables: dict[str, Table]) -> dict[str, bytes]:
    """By the name of the table that each shows."""
    import matplotlib  # late: it loads for a second, and --help and refusals draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots: dict[str, Callable[[Any], None]] = {
        "scores": lambda axes: _scores(axes, figures),
        "cumulative": lambda axes: _cumulative(axes, tables["cumulative"]),
        "nll": lambda axes: _nll(axes, figures),
        "domains": lambda axes: _domains(axes, tables["domains"]),
        "lengths": lambda axes: _lengths(axes, tables["lengths"]),
    }
    pictures = {}
    for name, plot in plots.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        plot(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pyplot.close(figure)
        pictures[name] = buffer.getvalue()
    return pictures


def _scores(axes: Any, figures: Figures) -> None:
    edges = figures.score_edges
    widths = np.diff(edges)
    inner = slice(1, -1) if len(widths) > 4 else slice(None)  # the bins of the tails are as wide as they need be
    for amount, label, alpha in ((figures.scores.samples, "all", 0.35), (figures.scores.kept, "kept", 0.9)):
        heights = amount / widths / figures.num_candidates
        axes.stairs(heights[inner], edges[1:-1] if inner.start else edges, fill=True, alpha=alpha, label=label)
    axes.set(xlabel="score, nats", ylabel="density of samples")
    axes.legend(fontsize="small")


def _cumulative(axes: Any, table: Table) -> None:
    scores, samples, tokens, kept = (np.array(column) for column in zip(*table.rows))
    for values, label in ((samples, "samples"), (tokens, "tokens"), (kept, "kept samples")):
        axes.plot(scores, values, lw=1.2, label=label)
    if len(scores) > 4:
        axes.set_xlim(scores[1], scores[-2])
    axes.set(xlabel="score, nats", ylabel="share at or above", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _nll(axes: Any, figures: Figures) -> None:
    edges = figures.nll_edges
    drawn = np.ma.masked_equal(figures.nll.T, 0)
    mesh = axes.pcolormesh(edges, edges, drawn, norm="log", cmap="viridis")
    low, high = (edges[1], edges[-2]) if len(edges) > 5 else (edges[0], edges[-1])
    axes.plot([low, high], [low, high], "r", lw=0.8, ls=":", label="equal")
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="NLL of the teacher", ylabel="NLL of the reference")
    axes.figure.colorbar(mesh, label="samples")
    axes.legend(fontsize="small")


def _domains(axes: Any, table: Table) -> None:
    rows = sorted(table.rows, key=lambda row: (-row[1], row[0]))[:_MOST_DOMAINS][::-1]
    names = [visible(str(row[0]))[:40].replace("$", r"\$") for row in rows]  # a pair of dollars would be a formula
    axes.barh(range(len(rows)), [0 if row[5] != row[5] else row[5] for row in rows])
    axes.set_yticks(range(len(rows)), names, fontsize="x-small")
    axes.set(xlabel="share of samples kept", xlim=(0, 1))


def _lengths(axes: Any, table: Table) -> None:
    for of in dict.fromkeys(row[0] for row in table.rows):
        rows = [row for row in table.rows if row[0] == of]
        axes.plot([row[1] for row in rows], [row[7] for row in rows], marker="o", ms=4, label=of)
    axes.set(xscale="log", xlabel="tokens", ylabel="share of samples kept", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
