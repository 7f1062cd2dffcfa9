"""The plots of a report, each a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from megakd.pipeline.report.figures import Figures
from megakd.pipeline.report.sample_text import visible
from megakd.pipeline.report.tables import Table

_MOST_DOMAINS = 40
_ALIKE = 0.005  # curves of shares that nowhere differ by more lie on one another


def draw(figures: Figures, tables: dict[str, Table], per: str) -> dict[str, bytes]:
    """Draw tables: name of the table -> PNG; a table with nothing to compare has none. per: the unit of an NLL."""
    import matplotlib  # late: it loads for a second, and --help and refusals draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots: dict[str, Callable[[Any], None]] = {
        "scores": lambda axes: _scores(axes, figures, per),
        "cumulative": lambda axes: _cumulative(axes, figures, tables["cumulative"], per),
        "nll": lambda axes: _nll(axes, figures, per),
    }
    if len(tables["domains"].rows) > 1:
        plots["domains"] = lambda axes: _domains(axes, tables["domains"])
    if lengths := several_lengths(tables["lengths"]):
        plots["lengths"] = lambda axes: _lengths(axes, lengths)
    pictures = {}
    for name, plot in plots.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        plot(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pyplot.close(figure)
        pictures[name] = buffer.getvalue()
    return pictures


def several_lengths(table: Table) -> dict[str, list[tuple[Any, ...]]]:
    """Kind of length -> its rows, for kinds with more than one class: a single class shows nothing."""
    kinds = {of: [row for row in table.rows if row[0] == of] for of in dict.fromkeys(row[0] for row in table.rows)}
    return {of: rows for of, rows in kinds.items() if len(rows) > 1}


def _scores(axes: Any, figures: Figures, per: str) -> None:
    edges, of_samples = figures.score_edges, figures.scores
    widths = np.diff(edges)
    inner = slice(1, -1) if len(widths) > 4 else slice(None)  # the bins of the tails are as wide as they need be
    drawn = [(of_samples.samples, "all", 0.35), (of_samples.kept, "kept", 0.9)]
    if np.array_equal(of_samples.samples, of_samples.kept):
        drawn = [(of_samples.samples, "all, which are kept", 0.9)]
    for amount, label, alpha in drawn:
        heights = amount / widths / figures.num_candidates
        axes.stairs(heights[inner], edges[1:-1] if inner.start else edges, fill=True, alpha=alpha, label=label)
    axes.set(xlabel=_score_label(figures, per), ylabel="density of samples")
    axes.legend(fontsize="small")


def _cumulative(axes: Any, figures: Figures, table: Table, per: str) -> None:
    scores, *shares = (np.array(column) for column in zip(*table.rows))
    for names, values in _distinct(dict(zip(("samples", "tokens", "kept samples"), shares))):
        axes.plot(scores, values, lw=1.2, label=names)
    if len(scores) > 5:
        axes.set_xlim(scores[1], scores[-2])
    axes.set(xlabel=_score_label(figures, per), ylabel="share at or above", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _distinct(curves: dict[str, Any]) -> list[tuple[str, Any]]:
    """Each curve once, under the names of all curves that lie on it."""
    distinct: list[tuple[list[str], Any]] = []
    for name, values in curves.items():
        same = next((names for names, drawn in distinct if np.abs(drawn - values).max() < _ALIKE), None)
        if same is None:
            distinct.append(([name], values))
        else:
            same.append(name)
    return [(", ".join(names) + (" (alike)" if len(names) > 1 else ""), values) for names, values in distinct]


def _score_label(figures: Figures, per: str) -> str:
    counts = figures.scores.samples
    below, above = (int(counts[0]), int(counts[-1])) if len(counts) > 4 else (0, 0)
    return f"score, nats a {per}" + _outside(f"{below:,} samples below, {above:,} above", below + above)


def _nll(axes: Any, figures: Figures, per: str) -> None:
    edges = figures.nll_edges
    drawn = np.ma.masked_equal(figures.nll.T, 0)
    mesh = axes.pcolormesh(edges, edges, drawn, norm="log", cmap="viridis")
    whole = len(edges) <= 5
    low, high = (edges[0], edges[-1]) if whole else (edges[1], edges[-2])
    outside = 0 if whole else figures.num_candidates - int(figures.nll[1:-1, 1:-1].sum())
    axes.plot([low, high], [low, high], "r", lw=0.8, ls=":", label="equal")
    label = f"NLL of the teacher, nats a {per}" + _outside(f"{outside:,} samples", outside)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel=label, ylabel="NLL of the reference")
    axes.figure.colorbar(mesh, label="samples")
    axes.legend(fontsize="small", loc="upper left")


def _outside(told: str, count: int) -> str:
    return f"\n(outside of the plot: {told})" if count else ""


def _domains(axes: Any, table: Table) -> None:
    rows = sorted(table.rows, key=lambda row: (-row[1], row[0]))[:_MOST_DOMAINS][::-1]
    names = [visible(str(row[0]))[:40].replace("$", r"\$") for row in rows]  # a pair of dollars would be a formula
    axes.barh(range(len(rows)), [0 if row[5] != row[5] else row[5] for row in rows])
    axes.set_yticks(range(len(rows)), names, fontsize="x-small")
    more = len(table.rows) - len(rows)
    axes.set(xlabel="share of samples kept" + (f"\n({more:,} smaller domains are not drawn)" if more else ""))
    axes.set_xlim(0, 1)


def _lengths(axes: Any, kinds: dict[str, list[tuple[Any, ...]]]) -> None:
    classes = sorted({(row[1], row[2]) for rows in kinds.values() for row in rows})
    for of, rows in kinds.items():
        axes.plot([row[1] for row in rows], [row[7] for row in rows], marker="o", ms=4, label=of)
    axes.set_xscale("log", base=2)
    names = [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in classes]
    axes.set_xticks([low for low, _ in classes], names, fontsize="x-small", rotation=30 if len(names) > 6 else 0)
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="share of samples kept", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
