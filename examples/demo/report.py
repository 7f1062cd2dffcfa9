"""What the runs recorded, as one table, one plot and one JSON file of figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.logits.store import LogitsStore

Record = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """title: in the table. style: of its line, as matplotlib has it. store: the logits store that it reads."""

    title: str
    style: str
    store: str | None = None


STUDENTS = {
    "plain": Student("student alone, 4 layers of 128", "k-o"),
    "online": Student("online: the teacher runs beside it", "C0-o"),
    "top-k": Student("offline: the teacher's best ids", "C1-s", "store-top-k"),
    "sampled": Student("offline: draws from the teacher", "C2-^", "store-sampled"),
    "miniplm": Student("MiniPLM: on the half that it keeps", "C3-v"),
    "miniplm-top-k": Student("MiniPLM, and the teacher's best ids", "C4-d", "store-top-k"),
}
"""In the order of the table; their runs are named so."""


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
    """Write table.md, figures.json and loss.png into ``runs``; returns the table and where they are."""
    figures = {"seed": seed, **{name: measure(runs, name) for name in ("teacher", *STUDENTS)}}
    (runs / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (runs / "table.md").write_text(table(figures) + "\n")
    draw(runs, figures)
    return f"{table(figures)}\n\nplot: {runs / 'loss.png'}, figures: {runs / 'figures.json'}"


def measure(runs: Path, name: str) -> Record:
    """One model's figures: held-out values of its last evaluation, what its training took, and what it read."""
    whole = runs / f"{name}-held-out"
    steps = training_steps(runs / name)
    tokens = steps[-1]["tokens"]
    seconds = statistics.median(record["seconds"] for record in steps)
    figures = {
        **evaluations(whole if whole.exists() else runs / name)[-1]["valid"],
        "train_tokens": tokens,
        "tokens_per_second": tokens / len(steps) / seconds,
    }
    store = STUDENTS[name].store if name in STUDENTS else None
    return figures if store is None else {**figures, "store_bytes_per_token": bytes_per_token(runs / store)}


def bytes_per_token(folder: Path) -> float:
    """Of a logits store, as ``megakd show`` says it: its shards' bytes, indices among them, over its rows."""
    parameters = LogitsStore(folder).manifest.parameters
    total = sum(rows_bytes + index_bytes for _, rows_bytes, index_bytes in filter(None, parameters["shards"]))
    return float(total / parameters["rows"])


def table(figures: Record) -> str:
    """The figures, a model a line, in Markdown."""
    columns = (
        ("held-out LM loss, nats", "lm_loss", "{:.4f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("agreement with the teacher", "agreement", "{:.1%}"),
        ("calibration error", "calibration_error", "{:.2%}"),
        ("store, bytes a token", "store_bytes_per_token", "{:.1f}"),
        ("training tokens", "train_tokens", "{:,.0f}"),
        ("training tokens/s", "tokens_per_second", "{:,.0f}"),
    )
    titles = {"teacher": "teacher, 6 layers of 256", **{name: student.title for name, student in STUDENTS.items()}}
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, title in titles.items():
        own = figures[name]
        cells = [form.format(own[key]) if key in own else "" for _, key, form in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    plain, teacher = figures["plain"]["lm_loss"], figures["teacher"]["lm_loss"]
    lines += ["", "Held-out loss less that of the student alone, in nats a token (share of the teacher's lead):"]
    for name in STUDENTS:
        if name != "plain":
            change = figures[name]["lm_loss"] - plain
            share = f" ({change / (teacher - plain):.0%})" if plain > teacher else ""
            lines.append(f"- {STUDENTS[name].title}: {change:+.4f}{share}")
    return "\n".join(lines)


def draw(runs: Path, figures: Record) -> None:
    """Held-out loss against tokens, a line a student; the teacher's last value as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, student in STUDENTS.items():
        steps, points = training_steps(runs / name), evaluations(runs / name)
        millions = steps[-1]["tokens"] / steps[-1]["step"] / 1e6  # a step
        held_out = curve(points, lambda record: record["valid"]["lm_loss"], millions)
        axes.plot(*held_out, student.style, ms=4, lw=1.2, label=student.title)
    axes.axhline(figures["teacher"]["lm_loss"], color="grey", ls="--", lw=1, label="the teacher, on the whole split")
    axes.set(xlabel="training tokens, millions", ylabel="held-out LM loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(runs / "loss.png", dpi=110)
    pyplot.close(figure)


def curve(records: list[Record], value: Callable[[Record], float], millions: float) -> tuple[list[float], list[float]]:
    """Tokens in millions, and the value at each."""
    return [record["step"] * millions for record in records], [value(record) for record in records]
