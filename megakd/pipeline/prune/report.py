"""Measured importance and what was cut, as a table, as JSON and as a plot."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from megakd.model.config import ModelShape
from megakd.pipeline.prune.artefact import Importance
from megakd.pipeline.prune.choice import Choice
from megakd.pipeline.prune.config import SIZES
from megakd.work.text_table import columns


def table(importance: Importance, choice: Choice, teacher: ModelShape) -> list[str]:
    """Lines for a terminal: each layer of the teacher, its influence, and how much of its importance stays.

    The shares are of the sum of the heads' and of the neurons' importance.
    """
    rows = [("layer", "influence", "stays as", "heads", "share", "neurons", "share")]
    places = {layer: place for place, layer in enumerate(choice.layers_L.tolist())}
    for layer in range(teacher.num_layers):
        influence = f"{max(importance.layers_L[layer], 0.0):.4f}"  # rounding may leave -1e-9
        if layer not in places:
            rows.append((str(layer), influence, "-", "", "", "", ""))
            continue
        place = places[layer]
        heads, neurons = choice.heads_LA[place], choice.neurons_LF[place]
        of_heads, of_neurons = importance.heads_LA[layer], importance.neurons_LF[layer]
        rows.append(
            (
                str(layer),
                influence,
                str(place),
                f"{len(heads)} of {len(of_heads)}",
                f"{of_heads[heads].sum() / (of_heads.sum() or 1):.3f}",
                f"{len(neurons)} of {len(of_neurons)}",
                f"{of_neurons[neurons].sum() / (of_neurons.sum() or 1):.3f}",
            )
        )
    share = importance.channels_H[choice.channels_H].sum() / (importance.channels_H.sum() or 1)
    return [
        *columns(rows),
        f"channels: {len(choice.channels_H)} of {len(importance.channels_H)}, share {share:.3f} of their importance",
    ]


def as_json(
    importance: Importance,
    choice: Choice,
    teacher: ModelShape,
    student: ModelShape,
    *,
    student_loss: float,
    settings: dict[str, Any],
) -> bytes:
    """JSON of the sizes, the losses, the layers' influence and the parts that stay, neurons excepted.

    The importance of every part, from which the choice follows, is in the arrays beside it.
    """
    record = {
        "settings": settings,
        "sizes": {name: {"teacher": getattr(teacher, name), "student": getattr(student, name)} for name in SIZES},
        "loss": {"teacher": importance.loss, "student": student_loss},
        "influence": importance.layers_L.tolist(),
        "layers": choice.layers_L.tolist(),
        "heads": choice.heads_LA.tolist(),
        "channels": choice.channels_H.tolist(),
    }
    return json.dumps(record, indent=1).encode() + b"\n"


def draw(importance: Importance, choice: Choice) -> bytes:
    """Draw the influence of the layers, and the sorted importance of channels, neurons and heads, as a PNG."""
    import matplotlib  # late: it loads for a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kept = set(choice.layers_L.tolist())
    colours = ["C0" if layer in kept else "0.8" for layer in range(len(importance.layers_L))]
    shown = np.maximum(importance.layers_L, 1e-6)  # a layer that does nothing has 0, which no logarithm shows
    left.bar(range(len(shown)), shown, color=colours)
    left.set(xlabel="layer of the teacher (grey: left out)", ylabel="influence, 1 - cos(input, output)", yscale="log")
    for colour, (name, values, count) in enumerate(
        (
            ("channels", importance.channels_H[None], len(choice.channels_H)),
            ("neurons", importance.neurons_LF, choice.neurons_LF.shape[1]),
            ("heads", importance.heads_LA, choice.heads_LA.shape[1]),
        )
    ):
        shares = np.sort(values / np.maximum(values.sum(1, keepdims=True), np.finfo(np.float64).tiny), axis=1)
        mean = shares[:, ::-1].cumsum(1).mean(0)
        places = [(place + 1) / len(mean) for place in range(len(mean))]
        right.plot(places, mean, f"C{colour}", lw=1.2, label=f"{name}: {count} of {len(mean)}")
        right.plot([count / len(mean)], [mean[count - 1]], f"C{colour}", marker="o", ms=5)
    right.set(xlabel="share of the parts, most important first", ylabel="share of their importance (mean over layers)")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def training_flags(student: ModelShape) -> str:
    """Flags of ``megakd train`` that describe the student, where they differ from the defaults."""
    words = [f"--{name.replace('_', '-')} {getattr(student, name)}" for name in SIZES]
    if student.kv_channels * student.num_attention_heads != student.hidden_size:
        words.append(f"--kv-channels {student.kv_channels}")
    return " ".join(words)
