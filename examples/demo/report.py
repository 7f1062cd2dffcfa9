"""What the runs came to, by ``megakd compare``, and what their stores take: a table, a plot and JSON of the figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megakd.logits.store import LogitsStore
from megakd.pipeline.compare.config import CompareConfig
from megakd.pipeline.compare.main import compare_runs
from megakd.pipeline.compare.plot import draw
from megakd.pipeline.compare.table import Comparison, as_csv, as_dict, markdown
from megakd.run_folder.record import read_run


@dataclass(frozen=True)
class Student:
    """title: in the table. store: the logits store that it reads."""

    title: str
    store: str | None = None


STUDENTS = {
    "plain": Student("student alone, 4 layers of 128"),
    "online": Student("online: the teacher runs beside it"),
    "top-k": Student("offline: the teacher's best ids", "store-top-k"),
    "sampled": Student("offline: draws from the teacher", "store-sampled"),
    "miniplm": Student("MiniPLM: on the half that it keeps"),
    "miniplm-top-k": Student("MiniPLM, and the teacher's best ids", "store-top-k"),
}
"""In the order of the table; their runs are named so."""
TEACHER = "teacher, 6 layers of 256"


def is_evaluated(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and bool(read_run(run, flag="").evaluations)


def largest_difference(one: Path, other: Path) -> float:
    """Over the steps that both runs have, the largest difference of LM or KD loss, in nats a token."""
    first, second = ({step.step: step for step in read_run(run, flag="").steps} for run in (one, other))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError(f"{one} and {other} have no step in common")
    pairs = [
        (getattr(first[step], key), getattr(second[step], key)) for step in common for key in ("lm_loss", "kd_loss")
    ]
    return max(abs((a or 0.0) - (b or 0.0)) for a, b in pairs)


def write(runs: Path, *, seed: int) -> str:
    """Write table.md, table.csv, figures.json and loss.png into ``runs``; returns the table and where they are."""
    comparison = compare_runs(request(runs))
    stores = {name: bytes_per_token(runs / name) for name in sorted({s.store for s in STUDENTS.values() if s.store})}
    text = table(comparison, stores)
    (runs / "table.md").write_text(text + "\n")
    (runs / "table.csv").write_text(as_csv(comparison))
    figures = {"seed": seed, "store_bytes_per_token": stores, **as_dict(comparison)}
    (runs / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (runs / "loss.png").write_bytes(draw(comparison, suffix=".png"))
    return f"{text}\n\n" + ", ".join(str(runs / name) for name in ("table.md", "table.csv", "figures.json", "loss.png"))


def request(runs: Path) -> CompareConfig:
    """What ``megakd compare`` is asked: the students, each with its evaluation on the whole split, and the teacher."""
    words = [f"{student.title}={runs / name}+{runs / name}-held-out" for name, student in STUDENTS.items()]
    return CompareConfig(
        run=[*words, f"{TEACHER}={runs / 'teacher'}"],
        models=[str(runs / name) for name in ("teacher", "reference")],
        scores=[str(runs / f"scores-{name}") for name in ("teacher", "reference")],
    )


def table(comparison: Comparison, stores: dict[str, float]) -> str:
    """The comparison in Markdown, and a line on the stores."""
    sizes = ", ".join(f"{name} {size:.1f}" for name, size in stores.items())
    return f"{markdown(comparison)}\n- Bytes a token of the logits stores: {sizes}."


def bytes_per_token(folder: Path) -> float:
    """Of a logits store, as ``megakd show`` says it: its shards' bytes, indices among them, over its rows."""
    parameters = LogitsStore(folder).manifest.parameters
    total = sum(rows_bytes + index_bytes for _, rows_bytes, index_bytes in filter(None, parameters["shards"]))
    return float(total / parameters["rows"])
