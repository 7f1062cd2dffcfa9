"""One run as ``megakd compare`` sees it: what it reached on held-out data, after how much work, how fast."""

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
    """One RUN of the command line. label: given by the user, or None. evaluation: whose held-out figures stand."""

    label: str | None
    folder: Path
    evaluation: Path | None


@dataclass(frozen=True)
class HeldOutKey:
    """What an evaluation was made on. data: a fingerprint, or of older records what the configuration tells, or None.

    recorded: whether it is a fingerprint. tokenizer: its hash; None where it is not known.
    """

    data: str | None
    recorded: bool
    num_tokens: int
    num_bytes: int | None
    tokenizer: str | None

    def same(self, other: HeldOutKey) -> bool:
        """Whether two evaluations were made on the same tokens, as far as the records tell."""
        if self.num_tokens != other.num_tokens:
            return False
        return self.data == other.data if self.recorded == other.recorded else True


@dataclass(frozen=True)
class Point:
    """One evaluation in the course of a run. flops: of the student alone. all_flops: with its teacher. None: not
    known."""

    tokens: int
    flops: float | None
    all_flops: float | None
    values: dict[str, float]


@dataclass(frozen=True)
class Run:
    """What a run came to.

    final: the held-out figures that stand in the table, None without an evaluation. key: of what they were made on.
    curve: evaluations of the run itself on the data of its last one; curve_key: what that is.
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
        """The median over the steps, the first of the process left out where there are others: it warms up."""
        return tokens_per_second(self.record.steps)

    @property
    def unfinished(self) -> str | None:
        """A phrase where the run has not done all of its steps."""
        asked, done = self.record.setting("training", "train_iters"), self.record.steps
        if asked is None or not done or done[-1].step >= asked:
            return None
        return f"is at step {done[-1].step} of {asked}"

    def flops(self) -> tuple[float | None, float | None]:
        """Of the student alone, and with its teacher."""
        if self.costs is None or not self.costs.student:
            return None, None
        return self.costs.student[-1], self.costs.whole(-1)


def parse_run_name(text: str) -> RunName:
    """Read ``[NAME=]FOLDER[+EVALUATION]``; a folder whose own name has these signs is taken as it is."""
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
    """The median over the steps, without the first where there are others; None where no time is recorded."""
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
    """Put together what a run's record tells. Raises MismatchError for an evaluation of another run's checkpoint."""
    own = _of_its_training(record)
    curve_key = held_out_key(own[-1], record) if own else None
    curve = [
        _point(evaluation, record, costs)
        for evaluation in own
        if curve_key is not None and held_out_key(evaluation, record).same(curve_key)
    ]
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
    """What an evaluation was made on: as it is recorded, or else as the run's configuration tells."""
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
    )


def reached(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """The x at which ``ys`` first falls to ``target``, linear between two points; None where it does not.

    Where the first point is there already it is that point's x, though it may have been reached before.
    """
    for index, (x, y) in enumerate(zip(xs, ys)):
        if y <= target:
            if index == 0:
                return x
            before_x, before_y = xs[index - 1], ys[index - 1]
            return before_x + (x - before_x) * (before_y - target) / (before_y - y)
    return None


def _of_its_training(record: RunRecord) -> list[Evaluation]:
    """The evaluations of a run's own course, in order of steps; of one step the later."""
    return [
        each for _, each in sorted({each.step: each for each in record.evaluations if each.checkpoint is None}.items())
    ]


def _point(evaluation: Evaluation, record: RunRecord, costs: Costs | None) -> Point:
    steps = record.steps
    index = next((number for number in range(len(steps) - 1, -1, -1) if steps[number].step <= evaluation.step), None)
    if index is None:
        return Point(0, 0.0, costs.before if costs is not None else None, dict(evaluation.values))
    flops = None if costs is None else costs.student[index]
    whole = None if costs is None else costs.whole(index)
    return Point(steps[index].tokens, flops, whole, dict(evaluation.values))


def _check_checkpoint(evaluation: Evaluation, name: RunName) -> None:
    """An evaluation that records what it was of must be of a checkpoint of this run, where any are left to tell."""
    found: dict[str, Any] = {
        read_manifest(checkpoint_path(name.folder, iteration) / MANIFEST, check_files=False).fingerprint: iteration
        for iteration in checkpoints(name.folder)
    }
    if evaluation.checkpoint is not None and found and evaluation.checkpoint not in found:
        raise MismatchError(
            f"{name.evaluation}: evaluates the checkpoint {evaluation.checkpoint}, which is none of {name.folder} "
            f"({', '.join(found)}); name the run that it was made of"
        )
