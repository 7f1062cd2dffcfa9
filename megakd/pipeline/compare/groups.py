"""Runs that differ in their seed alone, as one group: their label, mean and spread, differences seed by seed."""

from __future__ import annotations

import copy
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.data.selection import MANIFEST as SELECTION
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.spec import MANIFEST as STORE
from megakd.model.checkpoint.record import read_record
from megakd.run_folder.figures import Run
from megakd.run_folder.record import RunRecord

_UNREADABLE = (UsageError, MismatchError, CorruptError)
# Settings that do not change what is trained. Held-out data is compared apart.
_IGNORED_GROUPS = ("checkpoint", "evaluate", "logging", "logits_save")
_IGNORED = (("training", "seed"), ("training", "exit_interval"), ("data", "tokenizer_model"))


@dataclass(frozen=True)
class Spread:
    """Mean of ``n`` values. sd: standard deviation over seeds (n - 1 in the denominator); None for one value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs of one setting. label: their name in tables and plots."""

    label: str
    runs: tuple[Run, ...]

    def spread(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Mean and deviation of a figure over the runs that have it; None if no run has."""
        return spread([figure for run in self.runs if (figure := value(run)) is not None])


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired(group: Group, base: Group, value: Callable[[Run], float | None]) -> tuple[Spread, bool] | None:
    """Difference of a figure, ``group`` less ``base``. Seed by seed over their common seeds, and True; without common
    seeds the difference of the means, and False. None if either group lacks the figure."""
    ours, theirs = _by_seed(group, value), _by_seed(base, value)
    common = [seed for seed in ours if seed is not None and seed in theirs]
    if common:
        differences = spread([ours[seed] - theirs[seed] for seed in common])
        return None if differences is None else (differences, True)
    mean, base_mean = group.spread(value), base.spread(value)
    return None if mean is None or base_mean is None else (Spread(mean.mean - base_mean.mean, None, 0), False)


def _by_seed(group: Group, value: Callable[[Run], float | None]) -> dict[int | None, float]:
    """Seed -> the figure, the mean of several runs with one seed."""
    by_seed: dict[int | None, list[float]] = {}
    for run in group.runs:
        if (figure := value(run)) is not None:
            by_seed.setdefault(run.seed, []).append(figure)
    return {seed: statistics.fmean(figures) for seed, figures in by_seed.items()}


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their label, or else by `setting`; groups are in the order of their first runs.

    Runs of one setting and one seed that read different folders do not repeat each other and stay apart, as do runs
    that were evaluated on different data.
    """
    keys: dict[int, str] = {}
    by_setting: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        if run.name.label is not None:
            keys[number] = f"label {run.name.label}"
        else:
            by_setting.setdefault(f"{setting(run.record)} {run.key}", []).append(number)
    for key, members in by_setting.items():
        seeds = Counter(runs[number].seed for number in members)
        for number in members:
            apart = max(seeds.values()) > 1
            keys[number] = f"{key} {_paths(runs[number].record)}" if apart else key
    together: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        together.setdefault(keys[number], []).append(run)
    labels = _labels(list(together.values()))
    return [Group(label, tuple(members)) for label, members in zip(labels, together.values())]


def setting(record: RunRecord) -> str:
    """Identity of a training without its seed: two runs of one setting are repetitions.

    Teachers, stores and selections enter by their content, as far as it can be read, and not by their paths, because
    each seed may have its own. A run without a configuration is a setting of its own.
    """
    tree: dict[str, Any] = copy.deepcopy(dict(record.config))
    if not tree:
        return f"folder {record.folder.resolve()}"
    for group in _IGNORED_GROUPS:
        tree.pop(group, None)
    for group, name in _IGNORED:
        tree.get(group, {}).pop(name, None)
    data, teacher = tree.get("data") or {}, tree.get("teacher") or {}
    for name in ("data_path", "valid_data_path"):
        data[name] = [_dataset(part) for part in data.get(name) or []]
    data["selection"] = [_selection(Path(folder)) for folder in data.get("selection") or []]
    for name in ("logits_load_dir", "valid_logits_load_dir"):
        teacher[name] = [_store(Path(folder)) for folder in teacher.get(name) or []]
    if teacher.get("load"):
        teacher["load"] = _model(Path(teacher["load"]), teacher.get("iteration"))
    return json.dumps(tree, sort_keys=True, default=str)


def _paths(record: RunRecord) -> str:
    """The folders that a run reads, as its configuration spells them."""
    teacher = [record.setting("teacher", name) for name in ("load", "logits_load_dir")]
    return json.dumps([*teacher, *(record.setting("data", name) for name in ("data_path", "selection"))], default=str)


def _dataset(part: Any) -> Any:
    manifest = _manifest(Path(f"{part}.manifest.json"))
    return str(part) if manifest is None else manifest.fingerprint


def _store(folder: Path) -> Any:
    manifest = _manifest(folder / STORE)
    if manifest is None:
        return folder.name
    counts = ("seed", "shards", "ranks", "rows", "samples_with_targets", "shard_samples")
    return {key: value for key, value in manifest.parameters.items() if key not in counts}


def _selection(folder: Path) -> Any:
    manifest = _manifest(folder / SELECTION)
    if manifest is None:
        return folder.name
    rule = manifest.parameters.get("rule", {})
    return {key: value for key, value in rule.items() if key not in ("seed", "domains", "datasets", "excluded_ids")}


def _model(folder: Path, iteration: int | None) -> Any:
    try:
        record = read_record(folder, iteration)
    except _UNREADABLE:
        return folder.name
    return {"shape": vars(record.shape), "iteration": record.iteration}


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path, check_files=False)
    except _UNREADABLE:
        return None


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Labels of groups: the user's, or the common part of the folders' names; with the path if two are equal."""
    labels = [_label(runs) for runs in groups]
    return [
        label if labels.count(label) == 1 else f"{label} ({runs[0].name.folder})" for label, runs in zip(labels, groups)
    ]


def _label(runs: Sequence[Run]) -> str:
    label = runs[0].name.label
    if label is not None:
        return label
    names = [_name(run.name.folder) for run in runs]
    if len(set(names)) == 1:
        return names[0]
    common = re.sub(r"([-_.]?(seed|s))?[-_.]*$", "", _common_beginning(names))
    return common or f"{names[0]} and {len(names) - 1} more"


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name


def _common_beginning(names: Sequence[str]) -> str:
    length = next((at for at, signs in enumerate(zip(*names)) if len(set(signs)) > 1), min(map(len, names)))
    return re.sub(r"\d+$", "", names[0][:length])


def find_group(groups: Iterable[Group], name: str) -> Group:
    """Find the group with a label, or with a run in the folder ``name``. Raises UsageError if there is none."""
    by_label: Mapping[str, Group] = {group.label: group for group in groups}
    if name in by_label:
        return by_label[name]
    for group in by_label.values():
        if any(Path(name).resolve() == run.name.folder.resolve() for run in group.runs):
            return group
    raise UsageError(f"--baseline {name}: no such run; expected one of {', '.join(by_label)}, or its folder")
