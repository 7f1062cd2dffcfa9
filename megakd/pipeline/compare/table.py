"""A comparison: the figures of each group against the baseline, and the notes, as table, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megakd.pipeline.compare.groups import Group, Spread, paired
from megakd.run_folder.figures import HeldOutKey, Run, reached
from megakd.work import text_table

FORMAT, VERSION = "megakd-compare", 1
Metric = Literal["lm_loss", "bits_per_byte"]
_RULES = {"documents": "those of the original text", "tokens": "those that ids decode to, as older versions did"}
UNITS: dict[Metric, str] = {"lm_loss": "held-out LM loss, nats a token", "bits_per_byte": "held-out bits per byte"}


@dataclass(frozen=True)
class Comparison:
    """Groups held against a baseline.

    metric: unit of the compared losses, bits per byte if tokenizers differ. target: the loss up to which tokens and
    FLOPs are counted; None if the baseline has no curve. notes: caveats for a reader, a line each.
    """

    groups: tuple[Group, ...]
    base: Group
    metric: Metric
    target: float | None
    notes: tuple[str, ...]

    def final(self, run: Run, name: str) -> float | None:
        """A held-out figure of a run; None if it has no such figure."""
        return None if run.final is None else run.final.get(name)

    def difference(self, group: Group) -> tuple[Spread, bool] | None:
        """A group's loss less the baseline's, and True if it is taken seed by seed; None if they do not compare."""
        if group is self.base or not comparable(group, self.base, self.metric):
            return None
        return paired(group, self.base, lambda run: self.final(run, self.metric))

    def reached(self, run: Run, of: Literal["tokens", "flops", "all_flops"]) -> float | None:
        """Tokens or FLOPs up to the target; None if it was not reached, or on other data than the baseline's."""
        base_key, key = self.base.runs[0].curve_key, run.curve_key
        if self.target is None or base_key is None or key is None or not compares(key, base_key, self.metric):
            return None
        points = [(getattr(point, of), point.values[self.metric]) for point in run.curve if self.metric in point.values]
        if any(x is None for x, _ in points):
            return None
        return reached([x for x, _ in points], [y for _, y in points], self.target)


def compare(groups: Sequence[Group], base: Group, *, target_loss: float | None) -> Comparison:
    """Hold every group against ``base``."""
    runs = [run for group in groups for run in group.runs]
    tokenizers = {run.key.tokenizer for run in runs if run.key is not None and run.key.tokenizer is not None}
    metric: Metric = "bits_per_byte" if len(tokenizers) > 1 else "lm_loss"
    target = target_loss
    if target is None:
        last = base.spread(lambda run: run.curve[-1].values.get(metric) if run.curve else None)
        target = None if last is None else last.mean
    return Comparison(tuple(groups), base, metric, target, tuple(_notes(groups, base, metric)))


def compares(key: HeldOutKey, base: HeldOutKey, metric: Metric) -> bool:
    """Return whether figures on two sets of held-out data compare: the same tokens, or bits per byte of other ones, if
    the bytes were counted by one rule."""
    if metric == "bits_per_byte" and not _one_rule(key, base):
        return False
    if metric == "bits_per_byte" and key.tokenizer != base.tokenizer:
        return True
    return key.same(base)


def comparable(group: Group, base: Group, metric: Metric) -> bool:
    """Return whether all held-out figures of both groups compare with one another."""
    keys = [run.key for run in (*group.runs, *base.runs) if run.key is not None]
    return all(compares(key, keys[-1], metric) for key in keys)


def _one_rule(key: HeldOutKey, base: HeldOutKey) -> bool:
    """Return whether two evaluations counted bytes by one rule, as far as both did."""
    return None in (key.bytes_of, base.bytes_of) or key.bytes_of == base.bytes_of


def _notes(groups: Sequence[Group], base: Group, metric: Metric) -> list[str]:
    notes = []
    if metric == "bits_per_byte":
        notes.append(
            "The runs have different tokenizers, so that losses a token do not compare: bits per byte are compared."
        )
    if not comparable(base, base, metric):
        notes.append(f"The runs of {base.label} were evaluated on different held-out data ({_held_out(base)}).")
    notes += _notes_of_bytes(groups, metric)
    for group in groups:
        keys = [run.key for run in (*group.runs, *base.runs) if run.key is not None]
        told = metric == "bits_per_byte" and not all(_one_rule(key, keys[-1]) for key in keys)
        if group is not base and not comparable(group, base, metric) and not told:
            notes.append(
                f"{group.label}: evaluated on other held-out data than {base.label}, or on a part of another size "
                f"({_held_out(group)}; {_held_out(base)}): no difference is taken."
            )
        notes += [note for run in group.runs for note in _notes_of(run, group, base, metric)]
    amounts = {run.tokens for group in groups for run in group.runs if run.record.steps}
    if len(amounts) > 1:
        listed = ", ".join(f"{amount:,}" for amount in sorted(amounts))
        notes.append(f"The runs were trained on different numbers of tokens: {listed}.")
    return list(dict.fromkeys(notes))


def _notes_of_bytes(groups: Sequence[Group], metric: Metric) -> list[str]:
    """Note of runs whose bytes were counted by different rules, or by the older one where it matters; else none."""
    by_rule: dict[str, list[str]] = {}
    for group in groups:
        for rule in dict.fromkeys(run.key.bytes_of for run in group.runs if run.key is not None and run.key.bytes_of):
            by_rule.setdefault(rule, []).append(group.label)
    if metric == "bits_per_byte" and list(by_rule) == ["tokens"]:
        return [
            "Bytes are those that ids decode to, as older versions counted them: bits per byte are wrong for "
            "tokenizers that normalise text or have unknown ids."
        ]
    if len(by_rule) < 2:
        return []
    rules = "; ".join(f"{', '.join(labels)}: {_RULES.get(rule, rule)}" for rule, labels in sorted(by_rule.items()))
    return [f"Bits per byte do not compare, the bytes were counted by different rules ({rules}); evaluate anew."]


def _notes_of(run: Run, group: Group, base: Group, metric: Metric) -> list[str]:
    name = group.label if len(group.runs) == 1 else f"{group.label} ({run.name.folder})"
    notes = []
    if run.unfinished is not None:
        notes.append(f"{name} {run.unfinished}: its figures are those of its last evaluation.")
    if run.final is not None and metric == "bits_per_byte" and metric not in run.final:
        notes.append(f"{name} has no bits per byte: its held-out data does not record the bytes of its text.")
    if run.final is None:
        notes.append(f"{name} has no evaluations: train with --valid-data-path, or evaluate it with --skip-train.")
    if not run.record.steps:
        notes.append(f"{name} has recorded no training step.")
    if comparable(group, base, metric) and not _curves_compare(run, base, metric):
        notes.append(
            f"{name}: evaluated in the course of its training on other held-out data than {base.label}, on a part of "
            "another size, or with bytes counted otherwise: the work up to a loss is not told, nor is it drawn."
        )
    if run.key is not None and not run.key.recorded:
        notes.append(f"{name}: an older record, which does not say what was held out; told by paths and token counts.")
    key, base_key = run.key, base.runs[0].key
    if metric == "bits_per_byte" and key is not None and base_key is not None and key.num_bytes != base_key.num_bytes:
        notes.append(f"{name}: evaluated on {key.num_bytes} bytes of text, {base.label} on {base_key.num_bytes}.")
    if run.costs is None:
        notes.append(f"{name}: no FLOPs: neither its record nor a checkpoint tells the size of the model.")
    else:
        notes += [f"{name}: not counted in its FLOPs: {missing}." for missing in run.costs.missing]
    return notes


def _curves_compare(run: Run, base: Group, metric: Metric) -> bool:
    key, base_key = run.curve_key, base.runs[0].curve_key
    return key is None or base_key is None or compares(key, base_key, metric)


def _held_out(group: Group) -> str:
    found = {
        f"{run.key.num_tokens:,} tokens" + (f" of {run.key.data[:8]}" if run.key.recorded and run.key.data else "")
        for run in group.runs
        if run.key is not None
    }
    return f"{group.label}: {' and '.join(sorted(found)) or 'none'}"


@dataclass(frozen=True)
class _Column:
    """A column. title: in the Markdown table. name: in the CSV. value: figure of a run. form: its format."""

    title: str
    name: str
    value: Callable[[Run], float | None]
    form: str

    def text(self, group: Group) -> str:
        """The figure of a group with its spread, marked if part of the work could not be counted, or if not all runs
        have the figure."""
        figure = group.spread(self.value)
        if figure is None:
            return ""
        incomplete = self.name.startswith("all_flops") and any(run.costs and run.costs.missing for run in group.runs)
        spread = f" ± {self.form.format(figure.sd)}" if figure.sd else ""
        partly = "" if figure.n == len(group.runs) else f" ({figure.n} of {len(group.runs)} runs)"
        return ("≥ " if incomplete else "") + self.form.format(figure.mean) + spread + partly


def _columns(comparison: Comparison) -> list[_Column]:
    def figure(title: str, name: str, form: str) -> _Column:
        return _Column(title, name, lambda run: comparison.final(run, name), form)

    target = "" if comparison.target is None else f"{comparison.target:.4f}"
    losses = [figure("bits per byte", "bits_per_byte", "{:.4f}")]
    if comparison.metric == "lm_loss":
        losses = [figure("held-out LM loss, nats", "lm_loss", "{:.4f}"), *losses]
    columns = [
        *losses,
        figure("agreement", "agreement", "{:.1%}"),
        figure("calibration error", "calibration_error", "{:.2%}"),
        _Column("tokens", "tokens", lambda run: run.tokens or None, "{:,.0f}"),
        _Column("tokens/s", "tokens_per_second", lambda run: run.tokens_per_second, "{:,.0f}"),
        _Column(f"tokens to {target}", "tokens_to_target", lambda run: comparison.reached(run, "tokens"), "{:,.0f}"),
        _Column("FLOPs, student", "flops", lambda run: run.flops()[0], "{:.3g}"),
        _Column("FLOPs, with teacher", "all_flops", lambda run: run.flops()[1], "{:.3g}"),
        _Column(
            f"FLOPs to {target}, student", "flops_to_target", lambda run: comparison.reached(run, "flops"), "{:.3g}"
        ),
        _Column(
            f"FLOPs to {target}, with teacher",
            "all_flops_to_target",
            lambda run: comparison.reached(run, "all_flops"),
            "{:.3g}",
        ),
    ]
    known = [any(group.spread(column.value) for group in comparison.groups) for column in columns]
    return columns[:1] + [column for column, is_known in zip(columns[1:], known[1:]) if is_known]


def markdown(comparison: Comparison) -> str:
    """The table as Markdown, a line for each group, and the notes below it."""
    columns = _columns(comparison)
    by = "bits per byte" if comparison.metric == "bits_per_byte" else "loss"
    titles = ["run", columns[0].title, f"{by} less {comparison.base.label}", *(column.title for column in columns[1:])]
    rows = []
    for group in comparison.groups:
        cells = [column.text(group) for column in columns]
        label = group.label if len(group.runs) == 1 else f"{group.label}, {len(group.runs)} runs"
        rows.append([label, cells[0], _difference(comparison.difference(group)), *cells[1:]])
    lines = text_table.markdown(titles, rows, aligned=False)
    if comparison.target is not None:
        lines += ["", f"Counted up to a {UNITS[comparison.metric]}, of {comparison.target:.4f}; empty: not reached."]
    if any(len(group.runs) > 1 for group in comparison.groups):
        lines += ["", "Means ± standard deviation over runs; differences over the n seeds that both groups have."]
    return "\n".join([*lines, *([""] if comparison.notes else []), *(f"- {note}" for note in comparison.notes)])


def _difference(found: tuple[Spread, bool] | None) -> str:
    if found is None:
        return ""
    change, by_seed = found
    text = f"{change.mean:+.4f}" + ("" if change.sd is None else f" ± {change.sd:.4f}")
    if not by_seed:
        return f"{text} (of means)"
    return text if change.n == 1 else f"{text} (n = {change.n})"


def as_csv(comparison: Comparison) -> str:
    """The table as CSV, a line for each group: each figure, its standard deviation in NAME_sd; unknown ones empty."""
    columns, buffer = _columns(comparison), io.StringIO()
    names = [part for column in columns for part in (column.name, f"{column.name}_sd")]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["label", "runs", "difference", "difference_sd", "common_seeds", *names])
    for group in comparison.groups:
        change = comparison.difference(group)
        row: list[Any] = [group.label, len(group.runs)]
        row += [None, None, None] if change is None else [change[0].mean, change[0].sd, change[0].n]
        for column in columns:
            found = group.spread(column.value)
            row += [None, None] if found is None else [found.mean, found.sd]
        writer.writerow(["" if cell is None else cell for cell in row])
    return buffer.getvalue()


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All figures and curves as plain data."""
    columns = _columns(comparison)
    groups = []
    for group in comparison.groups:
        change = comparison.difference(group)
        figures = {column.name: found for column in columns if (found := group.spread(column.value)) is not None}
        groups.append(
            {
                "label": group.label,
                "difference": None if change is None else {**asdict(change[0]), "by_seed": change[1]},
                "figures": {name: asdict(found) for name, found in figures.items()},
                "runs": [_run_as_dict(run, columns) for run in group.runs],
            }
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "baseline": comparison.base.label,
        "metric": comparison.metric,
        "target": comparison.target,
        "groups": groups,
        "notes": list(comparison.notes),
    }


def _run_as_dict(run: Run, columns: Sequence[_Column]) -> dict[str, Any]:
    figures = {column.name: found for column in columns if (found := column.value(run)) is not None}
    return {
        "folder": str(run.name.folder),
        "evaluation": None if run.name.evaluation is None else str(run.name.evaluation),
        "seed": run.seed,
        "steps": run.record.steps[-1].step if run.record.steps else 0,
        "held_out": None if run.key is None else asdict(run.key),
        "figures": figures,
        "curve": [asdict(point) for point in run.curve],
    }
