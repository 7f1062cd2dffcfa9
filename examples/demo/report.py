"""What the runs recorded, as one table, one plot and one JSON file of figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_metrics(run: Path) -> list[Record]:
    """The records of SAVE/metrics.jsonl: training steps, and evaluations under the key ``valid``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_steps(run: Path) -> list[Record]:
    return [record for record in read_metrics(run) if "valid" not in record]


def evaluations(run: Path) -> list[Record]:
    return [record for record in read_metrics(run) if "valid" in record]


def largest_difference(one: Path, other: Path) -> float:
    """Over the steps that both runs have, the largest difference of LM or KD loss, in nats a token."""
    first, second = ({record["step"]: record for record in training_steps(run)} for run in (one, other))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError(f"{one} and {other} have no step in common")
    return max(float(abs(first[step][key] - second[step][key])) for step in common for key in ("lm_loss", "kd_loss"))


def write(runs: Path, *, seed: int) -> str:
    """Write figures.json and loss.png into ``runs``; returns the table and where they are."""
    figures = {"seed": seed, **{name: measure(runs, name) for name in ("teacher", "plain", "distilled")}}
    (runs / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(runs, figures)
    return f"{table(figures)}\n\nplot: {runs / 'loss.png'}, figures: {runs / 'figures.json'}"


def measure(runs: Path, name: str) -> Record:
    """One model's figures: held-out values of its last evaluation, and what its training took."""
    whole = runs / f"{name}-held-out"
    steps = training_steps(runs / name)
    tokens = steps[-1]["tokens"]
    seconds = statistics.median(record["seconds"] for record in steps)
    return {
        **evaluations(whole if whole.exists() else runs / name)[-1]["valid"],
        "train_tokens": tokens,
        "tokens_per_second": tokens / len(steps) / seconds,
    }


def table(figures: Record) -> str:
    """The figures side by side, in Markdown."""
    columns = {"teacher": "teacher 6 x 256", "plain": "student 4 x 128", "distilled": "the same, distilled"}
    rows = (
        ("held-out LM loss, nats a token", "lm_loss", "{:.4f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("forward KL from the teacher, nats", "kd_loss", "{:.4f}"),
        ("top-1 agreement with the teacher", "agreement", "{:.1%}"),
        ("training tokens", "train_tokens", "{:,.0f}"),
        ("training tokens/s", "tokens_per_second", "{:,.0f}"),
    )
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for title, key, form in rows:
        cells = [form.format(figures[name][key]) if key in figures[name] else "" for name in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    plain, distilled, teacher = (figures[name]["lm_loss"] for name in ("plain", "distilled", "teacher"))
    lines += ["", f"Held-out loss with the teacher, less that without: {distilled - plain:+.4f} nats a token."]
    if plain > teacher:
        lines[-1] += f" The distance to the teacher changes by {(distilled - plain) / (plain - teacher):+.0%}."
    return "\n".join(lines)


def draw(runs: Path, figures: Record) -> None:
    """Held-out loss against tokens, both students, the teacher's last value as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, colour, label in (("plain", "tab:orange", "alone"), ("distilled", "tab:blue", "with the teacher")):
        steps, points = training_steps(runs / name), evaluations(runs / name)
        millions = steps[-1]["tokens"] / steps[-1]["step"] / 1e6  # a step
        trained = curve(steps, lambda record: record["lm_loss"], millions)
        held_out = curve(points, lambda record: record["valid"]["lm_loss"], millions)
        axes.plot(*trained, colour, lw=0.6, alpha=0.3)
        axes.plot(*held_out, colour, marker="o", ms=3, label=f"student {label}")
    axes.axhline(figures["teacher"]["lm_loss"], color="grey", ls="--", lw=1, label="the teacher, trained")
    low = min(figures[name]["lm_loss"] for name in ("teacher", "plain", "distilled"))
    axes.set(xlabel="training tokens, millions", ylabel="LM loss, nats a token (dots: held out)")
    axes.set_ylim(low - 0.3, low + 3)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(runs / "loss.png", dpi=110)
    pyplot.close(figure)


def curve(records: list[Record], value: Callable[[Record], float], millions: float) -> tuple[list[float], list[float]]:
    """Tokens in millions, and the value at each."""
    return [record["step"] * millions for record in records], [value(record) for record in records]
