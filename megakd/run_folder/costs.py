"""Floating-point operations of a run: its own training, and its teacher's forward passes, wherever they ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.data.scores.artefact import MANIFEST as SCORES
from megakd.data.selection import MANIFEST as SELECTION
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.spec import MANIFEST as STORE
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.run_folder.record import RunRecord, checkpoints

_UNREADABLE = (UsageError, MismatchError, CorruptError)
_BACKWARD = 2.0  # the backward pass, in forward passes


@dataclass
class Known:
    """Records that give the costs of captures and scorings.

    models: checkpoints by fingerprint. scores: manifests by fingerprint.
    """

    models: dict[str, CheckpointRecord] = field(default_factory=dict)
    scores: dict[str, Manifest] = field(default_factory=dict)

    def add_models(self, folders: Iterable[Path]) -> None:
        """Add every checkpoint in ``folders``. A folder without checkpoints adds none."""
        for folder in dict.fromkeys(folders):
            for iteration in checkpoints(folder):
                try:
                    record = read_record(folder, iteration)
                except _UNREADABLE:
                    continue  # its size is then unknown, which is reported if a cost needs it
                self.models[record.fingerprint] = record

    def add_scores(self, folders: Iterable[Path]) -> None:
        """Add the scores in ``folders``. Raises UsageError for a folder without scores, CorruptError if damaged."""
        for folder in folders:
            manifest = read_manifest(folder / SCORES, check_files=False)
            self.scores[manifest.fingerprint] = manifest


@dataclass(frozen=True)
class Costs:
    """FLOPs up to each recorded step, in order of the steps.

    student: its own forward and backward passes. teacher: forward passes beside it. before: captures and scorings that
    the run's targets and samples come from. missing: phrases that name uncounted work; the sums are then too small.
    """

    student: tuple[float, ...]
    teacher: tuple[float, ...]
    before: float
    missing: tuple[str, ...]

    def whole(self, index: int) -> float:
        """All FLOPs up to step number ``index`` of the record; -1 is the last."""
        return self.student[index] + self.teacher[index] + self.before


def count_costs(run: RunRecord, known: Known) -> Costs | None:
    """Count the FLOPs of a run; None if neither its record nor a checkpoint tells the model's size."""
    missing: list[str] = []
    student = _student(run)
    if student is None:
        return None
    before = _Passes(known, missing)
    for folder in run.setting("teacher", "logits_load_dir", []):
        before.add_store(Path(folder))
    for folder in run.setting("data", "selection", []):
        before.add_selection(Path(folder))
    return Costs(tuple(student), tuple(_teacher(run, missing)), before.flops(), tuple(missing))


def teacher_folders(runs: Iterable[RunRecord]) -> list[Path]:
    """Checkpoint folders of the models that run beside students."""
    return [Path(folder) for run in runs if (folder := run.setting("teacher", "load"))]


def _student(run: RunRecord) -> list[float] | None:
    """Cumulative FLOPs of the student; steps from before the record begins count as much a token as its first step."""
    if not run.steps:
        return []
    a_token = _per_token_flops(run)
    if a_token is None:
        return None
    total, done, sums = 0.0, 0, []
    for step in run.steps:
        total += (step.tokens - done) * a_token if step.flops is None or not done else step.flops
        done = step.tokens
        sums.append(total)
    return sums


def _per_token_flops(run: RunRecord) -> float | None:
    """FLOPs a token of a forward and a backward pass, from the record or from the run's checkpoint."""
    for before, step in zip(run.steps, run.steps[1:]):
        if step.flops is not None and step.tokens > before.tokens:
            return step.flops / (step.tokens - before.tokens)
    if run.steps[0].flops is not None and run.steps[0].step == 1:
        return run.steps[0].flops / run.steps[0].tokens
    try:
        record = read_record(run.folder)
    except _UNREADABLE:
        return None
    return (1 + _BACKWARD) * _forward(record, int(run.setting("data", "seq_length", record.seq_length)))


def _teacher(run: RunRecord, missing: list[str]) -> list[float]:
    """Cumulative FLOPs of the teacher that runs beside the student."""
    folder = run.setting("teacher", "load")
    if folder is None:
        return [0.0] * len(run.steps)
    recorded = any(step.flops is not None for step in run.steps)
    a_token = 0.0
    if not recorded:  # an older file: the model ran wherever there is a KD loss
        try:
            a_token = _forward(read_record(folder), int(run.setting("data", "seq_length")))
        except _UNREADABLE:
            missing.append(f"the teacher {folder}, which is not there")
    if run.steps and run.steps[0].step > 1:
        missing.append(f"the teacher before step {run.steps[0].step}, where the record begins")
    total, done, sums = 0.0, run.steps[0].tokens if run.steps and run.steps[0].step > 1 else 0, []
    for step in run.steps:
        if recorded:
            total += step.teacher_flops or 0.0
        elif step.kd_loss is not None:
            total += (step.tokens - done) * a_token
        done = step.tokens
        sums.append(total)
    return sums


@dataclass
class _Passes:
    """Forward passes over a corpus. A model's passes over the same data count once: one pass captures and scores."""

    known: Known
    missing: list[str]
    _flops: dict[tuple[str, str, str, int], float] = field(default_factory=dict)

    def flops(self) -> float:
        return sum(self._flops.values())

    def add_store(self, folder: Path) -> None:
        """Add the capture of a logits store."""
        if folder == Path("none"):
            return
        manifest = self._read(folder / STORE, "capturing")
        if manifest is None or manifest.parameters.get("details", {}).get("online"):
            return  # kept by a model in training, whose forward passes were those of its training
        self._add(manifest, int(manifest.parameters["samples_with_targets"]), f"capturing {folder}")

    def add_selection(self, folder: Path) -> None:
        """Add the scorings of the corpus that a selection was made from."""
        if folder == Path("all"):
            return
        manifest = self._read(folder / SELECTION, "scoring for")
        for name, fingerprint in () if manifest is None else manifest.parents.items():
            if not name.startswith("scores "):
                continue
            scores = self.known.scores.get(fingerprint)
            if scores is None:
                self.missing.append(f"scoring for {folder}: its {name} (--scores DIR)")
                continue
            sampled = scores.parameters.get("sampled") or {}
            samples = int(sampled.get("num_scored", scores.parameters["num_samples"]))
            self._add(scores, samples, f"scoring for {folder}")

    def _read(self, path: Path, what: str) -> Manifest | None:
        try:
            return read_manifest(path, check_files=False)
        except _UNREADABLE:
            self.missing.append(f"{what} {path.parent}, which is not there")
            return None

    def _add(self, manifest: Manifest, samples: int, what: str) -> None:
        fingerprint = manifest.parents.get("model", "")
        model = self.known.models.get(fingerprint)
        if model is None:
            self.missing.append(f"{what}: its model {fingerprint[:8]} is not among the folders given (--models DIR)")
            return
        packing, seq_length = str(manifest.parameters["packing"]), int(manifest.parameters["seq_length"])
        key = fingerprint, manifest.parents.get("dataset", ""), packing, seq_length
        flops = samples * seq_length * _forward(model, seq_length)
        self._flops[key] = max(self._flops.get(key, 0.0), flops)


def _forward(record: CheckpointRecord, seq_length: int) -> float:
    """FLOPs a token of one forward pass of a checkpoint's model."""
    return record.shape.flops_forward(seq_length=seq_length, vocab_size=record.vocab_size)
