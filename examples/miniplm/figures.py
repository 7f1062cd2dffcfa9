"""What became of the planted noise and of the students: tables, one plot and one JSON file of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from noise import KINDS
from numpy.typing import NDArray
from planted import sample_kinds

from megakd.data.scores.artefact import Scores
from megakd.data.selection import Selection
from megakd.run_folder.figures import RunName, measure
from megakd.run_folder.record import read_run

Record = dict[str, Any]
MODELS = ("teacher", "reference", "reference-small")
STUDENTS = {"refined": "refined half", "random": "a random half", "noise-free": "a random half without the noise"}
NOISE = "all noise"
COLOURS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red")))


def write(runs: Path, tokens: NDArray[np.int64], *, seed: int) -> str:
    """Write figures.json, table.md and miniplm.png into ``runs``; returns the tables and where they are.

    tokens: ``[num_samples, len(KINDS)]``, of each candidate.
    """
    nll = {name: per_token_nll(runs / f"scores-{name}") for name in MODELS}
    kept = {name: kept_mask(runs / name) for name in (*STUDENTS, "refined-small")}
    score = nll["reference"] - nll["teacher"]
    record = {
        "seed": seed,
        "kinds": by_kind(tokens, nll, kept),
        "negative_scores": float((score < 0).mean()),
        "correlation": {name: float(np.corrcoef(score, nll[name])[0, 1]) for name in ("reference", "teacher")},
        "agreement": float((kept["refined"] == kept["refined-small"]).mean()),
        "models": {name: last_evaluation(runs / name) for name in MODELS},
        "students": {name: student(runs, name) for name in STUDENTS},
    }
    (runs / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(runs, score, kept["refined"], sample_kinds(tokens))
    text = table(record)
    (runs / "table.md").write_text(text + "\n")
    files = ("table.md", "figures.json", "miniplm.png", "report/report.html")
    return f"{text}\n\n{', '.join(str(runs / file) for file in files)}"


def per_token_nll(folder: Path) -> NDArray[np.float64]:
    """``[num_samples]``, nats a token."""
    scores = Scores(folder)
    return -np.asarray(scores.log_probs, np.float64) / scores.counts


def kept_mask(folder: Path) -> NDArray[np.bool_]:
    """``[num_samples]``: which samples a selection keeps."""
    selection = Selection(folder)
    mask = np.zeros(selection.num_samples, np.bool_)
    mask[selection.ids] = True
    return mask


def by_kind(
    tokens: NDArray[np.int64], nll: dict[str, NDArray[np.float64]], kept: dict[str, NDArray[np.bool_]]
) -> dict[str, Record]:
    """For each kind, and for all noise together: how much of it there is, how it scores, how much is dropped.

    dropped: of its samples, the share that the refined half leaves out. dropped_small: that the smaller reference's
    half does. tokens, kept_tokens: its share of all tokens, and of the tokens kept, whatever its samples count as.
    """
    kinds, refined = sample_kinds(tokens), kept["refined"]
    groups = {name: (kinds == place, [place]) for place, name in enumerate(KINDS)}
    groups[NOISE] = (kinds > 0, list(range(1, len(KINDS))))
    return {
        name: {
            "samples": int(mask.sum()),
            "share": float(mask.mean()),
            "tokens": float(tokens[:, places].sum() / tokens.sum()),
            "kept_share": share(mask, of=refined),
            "kept_tokens": float(tokens[refined][:, places].sum() / tokens[refined].sum()),
            "dropped": share(~refined, of=mask),
            "dropped_small": share(~kept["refined-small"], of=mask),
            "dropped_random": share(~kept["random"], of=mask),
            **{f"nll_{model}": mean(values, mask) for model, values in nll.items()},
        }
        for name, (mask, places) in groups.items()
    }


def share(some: NDArray[np.bool_], *, of: NDArray[np.bool_]) -> float | None:
    """Of the samples in ``of``, the share that is in ``some``; None of none."""
    return float(some[of].mean()) if of.any() else None


def mean(values: NDArray[np.float64], of: NDArray[np.bool_]) -> float | None:
    return float(values[of].mean()) if of.any() else None


def student(runs: Path, name: str) -> Record:
    """What a student was trained on, and its last evaluation on the held-out text."""
    folder = runs / f"student-{name}"
    tokens = read_run(folder, flag="").steps[-1].tokens
    return {**last_evaluation(folder), "samples_to_choose": len(Selection(runs / name)), "train_tokens": tokens}


def last_evaluation(run: Path) -> Record:
    return dict(read_run(run, flag="").evaluations[-1].values)


def table(record: Record) -> str:
    """The figures in Markdown."""
    shares_of = ("of all tokens", "of all samples", "of the samples kept", "dropped", "dropped, smaller reference")
    header = ("kind", *shares_of, "NLL teacher", "NLL reference", "score")
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    for name, row in record["kinds"].items():
        score = None if row["samples"] == 0 else row["nll_reference"] - row["nll_teacher"]
        shares = [row[key] for key in ("tokens", "share", "kept_share", "dropped", "dropped_small")]
        nats = [row["nll_teacher"], row["nll_reference"], score]
        cells = [form(value, "{:.1%}") for value in shares] + [form(value, "{:.2f}") for value in nats]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    correlation = record["correlation"]
    lines += [
        "",
        f"Score against NLL of the reference: correlation {correlation['reference']:.3f}; of the teacher "
        f"{correlation['teacher']:.3f}. Negative scores: {record['negative_scores']:.1%}. The smaller reference "
        f"decides {record['agreement']:.1%} of the samples alike.",
        "",
        "| student trained on | held-out LM loss, nats a token | bits per byte | training tokens |",
        "|---|---|---|---|",
    ]
    for name, title in STUDENTS.items():
        row = record["students"][name]
        values = f"{row['lm_loss']:.4f} | {form(row.get('bits_per_byte'), '{:.4f}')} | {row['train_tokens']:,}"
        lines.append(f"| {title} | {values} |")
    refined, random = (record["students"][name]["lm_loss"] for name in ("refined", "random"))
    models = ", ".join(f"{name} {record['models'][name]['lm_loss']:.4f}" for name in MODELS)
    lines += ["", f"Refined less random: {refined - random:+.4f} nats a token. Held-out loss of the models: {models}."]
    return "\n".join(lines)


def form(value: Any, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def draw(runs: Path, score: NDArray[np.float64], kept: NDArray[np.bool_], kinds: NDArray[np.int64]) -> None:
    """The scores of each kind and the least one kept; the students' held-out loss against training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    low, high = np.quantile(score, (0.002, 0.998)).tolist()
    bins = np.linspace(low, high, 80).tolist()
    for place, name in enumerate(KINDS):
        left.hist(score[kinds == place], bins, histtype="step", color=COLOURS[name], label=name)
    left.axvline(score[kept].min(), color="grey", ls="--", lw=1, label="kept from here on")
    left.set(xlabel="NLL reference - NLL teacher, nats a token", ylabel="samples")
    for name, title in STUDENTS.items():
        run = RunName(None, runs / f"student-{name}", None)
        points = measure(run, read_run(run.folder, flag=""), None).curve
        millions, losses = [point.tokens / 1e6 for point in points], [point.values["lm_loss"] for point in points]
        right.plot(millions, losses, marker="o", ms=3, label=title)
    right.set(xlabel="training tokens, millions", ylabel="held-out LM loss, nats a token")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(runs / "miniplm.png", dpi=100)
    pyplot.close(figure)
