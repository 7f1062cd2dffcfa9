"""What the runs came to: a table of held-out text and tasks, a plot over training tokens, and JSON of the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.run_folder.record import read_run
from megakd.work.text_table import markdown

TITLES = {
    "teacher": "teacher, SmolLM2-135M",
    "plain": "student alone, 20M",
    "draws": "draws from the teacher",
    "miniplm": "MiniPLM, the half that it keeps",
}
_METRIC = "acc_per_char"


def is_evaluated(folder: Path) -> bool:
    return any(folder.glob("*.json"))


def write(runs: Path, students: Sequence[str], *, seed: int) -> str:
    """Write table.md, figures.json and loss.png into ``runs``; returns the table and where they are."""
    found = {"teacher": _read(runs.parent / "teacher-evaluated")}
    found |= {name: _read(runs / f"{name}-evaluated") for name in students}
    tasks = list(next(iter(found.values()))["requests"])
    headings = ["", "held-out loss, nats", "bits per byte", "agreement", *tasks, "mean of tasks"]
    text = "\n".join(markdown(headings, [_row(name, figures, tasks) for name, figures in found.items()]))
    curves = {name: _curve(runs / name) for name in students}
    (runs / "table.md").write_text(text + "\n")
    (runs / "figures.json").write_text(json.dumps({"seed": seed, "models": found, "curves": curves}, indent=2) + "\n")
    _draw(runs / "loss.png", curves, teacher=found["teacher"]["held_out"]["lm_loss"])
    return f"{text}\n\n" + ", ".join(str(runs / name) for name in ("table.md", "figures.json", "loss.png"))


def _read(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    results = json.loads(path.read_text())
    return {"held_out": results["held_out"], "requests": results["requests"]}


def _row(name: str, figures: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    held_out = figures["held_out"]
    accuracies = [figures["requests"][task]["metrics"] for task in tasks]
    agreement = held_out.get("teacher", {}).get("agreement")
    mean = sum(metrics[_METRIC] for metrics in accuracies) / len(accuracies)
    error = math.sqrt(sum(metrics[f"{_METRIC}_stderr"] ** 2 for metrics in accuracies)) / len(accuracies)
    return [
        TITLES[name],
        f"{held_out['lm_loss']:.4f}",
        f"{held_out['bits_per_byte']:.4f}",
        "" if agreement is None else f"{100 * agreement:.1f}%",
        *(f"{100 * metrics[_METRIC]:.1f}" for metrics in accuracies),
        f"{100 * mean:.1f} ± {100 * error:.1f}",
    ]


def _curve(run: Path) -> list[tuple[int, float]]:
    """Training tokens and held-out loss of each evaluation in the course of a run."""
    record = read_run(run, flag="")
    tokens = {step.step: step.tokens for step in record.steps}
    return [(tokens[entry.step], entry.values["lm_loss"]) for entry in record.evaluations if entry.step in tokens]


def _draw(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, teacher: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot([tokens for tokens, _ in curve], [loss for _, loss in curve], marker="o", label=TITLES[name])
    axes.axhline(teacher, color="black", linestyle=":", label=TITLES["teacher"])
    axes.set(xlabel="training tokens of the student", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
