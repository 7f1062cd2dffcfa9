"""Figures of one run: losses on held-out data, the work up to them, and speed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import read_manifest
from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import MANIFEST, checkpoint_path
from megakd.run_folder.costs import Costs
from megakd.run_folder.record import Evaluation, RunRecord, Step, checkpoints, read_run


@dataclass(frozen=True)
class RunName:
    """One RUN of a command line. label: the user's, or None. evaluation: folder whose held-out figures are taken."""

    label: str | None
    folder: Path
    evaluation: Path | None


@dataclass(frozen=True)
class HeldOutKey:
    """Identity of held-out data. data: a fingerprint; for older records the configuration's paths, or None.

    recorded: True if ``data`` is a fingerprint. tokenizer: its hash; None if it is not known. bytes_of: rule by which
    ``num_bytes`` were counted: ``documents``, or ``tokens`` in records of versions that took what ids decode to for
    the text; None without bytes.
    """

    data: str | None
    recorded: bool
    num_tokens: int
    num_bytes: int | None
    tokenizer: str | None
    bytes_of: str | None = None

    def same(self, other: HeldOutKey) -> bool:
        """Return whether two evaluations were made on the same tokens, as far as the records tell."""
        if self.num_tokens != other.num_tokens:
            return False
        return self.data == other.data if self.recorded == other.recorded else True


@dataclass(frozen=True)
class Point:
    """One evaluation in the course of a run. flops: the student's so far. all_flops: with its teacher's. None: not
    known."""

    tokens: int
    flops: float | None
    all_flops: float | None
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """Figures of a run.

    final: the held-out figures, None without an evaluation. key: identity of their data. curve: evaluations in the
    course of training, on the data of the last one. curve_key: identity of that data.
    """

    name: RunName
    record: RunRecord
    costs: Costs | None
    final: dict[str, float] | None
    key: HeldOutKey | None
    curve: tuple[Point, ...]
    curve_key: HeldOutKey | None

    @property
    def seed(self) -> int | None:
        seed = self.record.setting("training", "seed")
        return None if seed is None else int(seed)

    @property
    def tokens(self) -> int:
        return self.record.steps[-1].tokens if self.record.steps else 0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps; without the first one, which warms up, if there are more."""
        return tokens_per_second(self.record.steps)

    @property
    def unfinished(self) -> str | None:
        """A phrase if the run has not done all of its steps; else None."""
        asked, done = self.record.setting("training", "train_iters"), self.record.steps
        if asked is None or not done or done[-1].step >= asked:
            return None
        return f"is at step {done[-1].step} of {asked}"

    def flops(self) -> tuple[float | None, float | None]:
        """FLOPs of the student alone, and with its teacher's; None if unknown."""
        if self.costs is None or not self.costs.student:
            return None, None
        return self.costs.student[-1], self.costs.whole(-1)


def parse_run_name(text: str) -> RunName:
    """Read ``[NAME=]FOLDER[+EVALUATION]``; an existing folder whose name has ``=`` or ``+`` is taken whole."""
    label, rest = None, text
    if "=" in text and not Path(text).is_dir():
        label, _, rest = text.partition("=")
        if not label.strip() or not rest:
            raise UsageError(f"{text}: expected [NAME=]FOLDER[+EVALUATION]")
    folder, evaluation = Path(rest), None
    if not folder.is_dir() and "+" in rest:
        first, _, second = rest.rpartition("+")
        folder, evaluation = Path(first), Path(second)
    return RunName(label, folder, evaluation)


def tokens_per_second(steps: Sequence[Step]) -> float | None:
    """Median over the steps, without the first if there are more; None if no time is recorded."""
    rates = [
        (step.tokens - before.tokens) / step.seconds
        for before, step in itertools.pairwise(steps)
        if step.seconds and step.tokens > before.tokens
    ]
    if rates:
        return statistics.median(rates)
    only = steps[0] if len(steps) == 1 else None
    return only.tokens / only.seconds if only is not None and only.step == 1 and only.seconds else None


def measure(name: RunName, record: RunRecord, costs: Costs | None) -> Run:
    """Compute a run's figures from its record. Raises MismatchError for an evaluation of another run's checkpoint."""
    evaluations = _in_training(record)
    curve_key = held_out_key(evaluations[-1], record) if evaluations else None
    curve = []
    for evaluation in evaluations:
        key = held_out_key(evaluation, record)
        if curve_key is not None and key.same(curve_key):
            curve.append(_point(evaluation, record, costs, with_bytes=key.bytes_of == curve_key.bytes_of))
    final, whose = (record.evaluations[-1], record) if record.evaluations else (None, record)
    if name.evaluation is not None:
        whose = read_run(name.evaluation, flag="")
        if not whose.evaluations:
            raise UsageError(f"{name.evaluation}: no evaluation there; 'megakd train --skip-train' writes one")
        final = whose.evaluations[-1]
        _check_checkpoint(final, name)
    return Run(
        name=name,
        record=record,
        costs=costs,
        final=None if final is None else dict(final.values),
        key=None if final is None else held_out_key(final, whose),
        curve=tuple(curve),
        curve_key=curve_key,
    )


def held_out_key(evaluation: Evaluation, run: RunRecord) -> HeldOutKey:
    """Identity of an evaluation's data: as recorded, or else as the run's configuration tells."""
    held_out = evaluation.held_out
    data: str | None = held_out.get("fingerprint")
    if data is None and run.setting("data", "valid_data_path"):
        names = ("valid_data_path", "valid_packing", "packing", "seq_length")
        data = str([run.setting("data", name) for name in names])
    return HeldOutKey(
        data=data,
        recorded="fingerprint" in held_out,
        num_tokens=int(evaluation.values.get("num_tokens", 0)),
        num_bytes=held_out.get("num_bytes"),
        tokenizer=held_out.get("tokenizer"),
        bytes_of=held_out.get("bytes_of", "tokens") if "num_bytes" in held_out else None,
    )


def reached(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """The x at which ``ys`` first falls to ``target``, linear between two points; None if it never does.

    If the first point lies at the target or below, its x is returned, though the target may have been reached earlier.
    """
    for index, (x, y) in enumerate(zip(xs, ys)):
        if y <= target:
            if index == 0:
                return x
            before_x, before_y = xs[index - 1], ys[index - 1]
            return before_x + (x - before_x) * (before_y - target) / (before_y - y)
    return None


def _in_training(record: RunRecord) -> list[Evaluation]:
    """Evaluations in the course of training, in order of steps; the later one if a step has two."""
    by_step = {evaluation.step: evaluation for evaluation in record.evaluations if evaluation.checkpoint is None}
    return [by_step[step] for step in sorted(by_step)]


def _point(evaluation: Evaluation, record: RunRecord, costs: Costs | None, *, with_bytes: bool) -> Point:
    """Point of a curve. with_bytes: False to leave out bits per byte, which were counted otherwise than the others'."""
    steps, values = record.steps, dict(evaluation.values)
    if not with_bytes:
        values.pop("bits_per_byte", None)
    index = next((number for number in range(len(steps) - 1, -1, -1) if steps[number].step <= evaluation.step), None)
    if index is None:
        return Point(0, 0.0, costs.before if costs is not None else None, values)
    flops = None if costs is None else costs.student[index]
    whole = None if costs is None else costs.whole(index)
    return Point(steps[index].tokens, flops, whole, values)


def _check_checkpoint(evaluation: Evaluation, name: RunName) -> None:
    """Refuse an evaluation that records a checkpoint which is none of this run's, if the run still has any."""
    fingerprints: dict[str, Any] = {
        read_manifest(checkpoint_path(name.folder, iteration) / MANIFEST, check_files=False).fingerprint: iteration
        for iteration in checkpoints(name.folder)
    }
    if evaluation.checkpoint is not None and fingerprints and evaluation.checkpoint not in fingerprints:
        raise MismatchError(
            f"{name.evaluation}: evaluates the checkpoint {evaluation.checkpoint}, which is none of {name.folder} "
            f"({', '.join(fingerprints)}); name the run that it was made of"
        )
