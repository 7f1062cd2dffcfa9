"""What the students of a sweep came to: one table with its noise, one plot, one JSON file of figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import FIRST, LM, Setting

from megakd.run_folder.record import read_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Noise:
    """Standard deviations of held-out losses over seeds, nats a token.

    lm, first: of either baseline. paired: of the one less the other at the same seed, which is what a difference of two
    settings is to be held against: seeds move all settings alike.
    """

    lm: float
    first: float
    paired: float
    seeds: int

    @property
    def floor(self) -> float:
        """A difference below two deviations says nothing. From few seeds this is rough."""
        return 2 * self.paired


def write(runs: Path, tables: Mapping[str, Sequence[Setting]], *, seed: int, seeds: int) -> str:
    """Write sweep.json, table.md and sweep.png into ``runs``; returns the table and where they are.

    tables: the settings that are trained. seeds: how many, from ``seed`` on, the baselines have.
    """
    over_seeds = {
        setting.name: [held_out(runs, setting, seed + more)["lm_loss"] for more in range(seeds)]
        for setting in (LM, FIRST)
    }
    noise = measure_noise(over_seeds[LM.name], over_seeds[FIRST.name])
    values = {
        setting.name: held_out(runs, setting, seed)
        for setting in (LM, FIRST, *(setting for table in tables.values() for setting in table))
    }
    record = {
        "seed": seed,
        "over_seeds": over_seeds,
        "noise": None if noise is None else vars(noise),
        "settings": values,
    }
    (runs / "sweep.json").write_text(json.dumps(record, indent=2) + "\n")
    losses = {name: float(value["lm_loss"]) for name, value in values.items()}
    text = markdown(losses, tables, noise)
    (runs / "table.md").write_text(text + "\n")
    draw(runs / "sweep.png", losses, tables, noise)
    return f"{text}\n\n{', '.join(str(runs / name) for name in ('table.md', 'sweep.json', 'sweep.png'))}"


def held_out(runs: Path, setting: Setting, seed: int) -> Record:
    """A student's last evaluation."""
    return dict(read_run(runs / f"{setting.name}-seed-{seed}", flag="").evaluations[-1].values)


def measure_noise(lm: Sequence[float], first: Sequence[float]) -> Noise | None:
    """From the losses of the baselines, seed for seed; None from one seed."""
    if len(lm) < 2:
        return None
    paired = [one - other for one, other in zip(first, lm, strict=True)]
    stdev = statistics.stdev
    return Noise(lm=stdev(lm), first=stdev(first), paired=stdev(paired), seeds=len(lm))


def markdown(losses: Mapping[str, float], tables: Mapping[str, Sequence[Setting]], noise: Noise | None) -> str:
    """One table, the baselines above, and a line on the noise."""
    header = ("", "setting", "held-out LM loss, nats a token", "less LM alone", "less the first", "paper, gain %")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for table, settings in {"baseline": (LM, FIRST), **tables}.items():
        for setting in settings:
            loss = losses[setting.name]
            less = [_difference(loss - losses[base.name], noise) for base in (LM, FIRST)]
            paper = "" if setting.paper is None else f"{setting.paper:+.1f}"
            lines.append(f"| {table} | {setting.title} | {loss:.4f} | {less[0]} | {less[1]} | {paper} |")
    lines += ["", _noise_line(noise)]
    return "\n".join(lines)


def _difference(value: float, noise: Noise | None) -> str:
    if value == 0:
        return ""
    return f"**{value:+.4f}**" if noise is not None and abs(value) > noise.floor else f"{value:+.4f}"


def _noise_line(noise: Noise | None) -> str:
    if noise is None:
        return "Noise: not known from one seed (--seeds 3)."
    return (
        f"Noise over {noise.seeds} seeds, standard deviation in nats: LM alone {noise.lm:.4f}, the first configuration "
        f"{noise.first:.4f}, their difference at the same seed {noise.paired:.4f}. Bold: more than twice the last one."
    )


def draw(path: Path, losses: Mapping[str, float], tables: Mapping[str, Sequence[Setting]], noise: Noise | None) -> None:
    """A panel for each table: what each setting is above or below the first configuration, the noise as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = losses[FIRST.name]
    longest = max((len(settings) for settings in tables.values()), default=1)
    size = (3.2 * max(len(tables), 1), 2.0 + 0.28 * longest)
    figure, panels = pyplot.subplots(1, max(len(tables), 1), figsize=size, squeeze=False, layout="constrained")
    for axes, (table, settings) in zip(panels[0], tables.items()):
        if noise is not None:
            axes.axvspan(-noise.floor, noise.floor, color="grey", alpha=0.2, lw=0)
        axes.axvline(losses[LM.name] - base, color="tab:orange", ls="--", lw=1)
        axes.plot([losses[setting.name] - base for setting in settings], range(len(settings)), "o", color="tab:blue")
        axes.set_yticks(range(len(settings)), [setting.name for setting in settings], fontsize=8)
        axes.set(title=table, ylim=(len(settings) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    figure.supxlabel(
        "held-out LM loss less\nthe first configuration's, nats\n(dashed: LM alone; grey: noise)", fontsize=8
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
