"""One or two scorings of the same samples, and the samples that are kept, read in blocks for a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.scores.sources import Source, open_sources
from megakd.data.selection import Selection
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.report.config import ReportConfig
from megakd.pipeline.select.domains import read_ranges
from megakd.pipeline.select.keys import DomainRange, Keys, Rule, share_of

TEACHER, REFERENCE, SCORE, OTHER = "NLL of the teacher", "NLL of the reference", "score", "other score"
_AT_ONCE = 1 << 18
_SHOWN = 5


@dataclass(frozen=True)
class Block:
    """Some of the candidates, samples with scored tokens that are not excluded, by ascending id."""

    ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    columns: dict[str, NDArray[np.float32]]
    """Values ``[n]`` under TEACHER, REFERENCE, SCORE and, with a second scoring, OTHER."""


@dataclass(frozen=True)
class Scoring:
    """Scores opened and checked against each other, and the rule that makes one score of them."""

    source: Source
    selection: Selection | None
    ranges: list[DomainRange]
    """Ranges of samples, in order, each of one domain."""
    keys: dict[str, Keys]
    """Keys under SCORE and, with a second scoring, OTHER."""
    teacher_scale: float
    normalise: str
    ratio: float
    seed: int

    def blocks(self) -> Iterator[Block]:
        """Read all candidates, in order.

        Raises CorruptError where a score is not finite, with the first sample ids; UsageError if the weight of the
        teacher alone makes it infinite.
        """
        for begin in range(0, self.source.num_samples, _AT_ONCE):
            end = min(begin + _AT_ONCE, self.source.num_samples)
            counts = np.asarray(self.source.counts[begin:end])
            candidate = counts > 0
            first, last = np.searchsorted(self.source.excluded, (begin, end))
            candidate[np.asarray(self.source.excluded[first:last]) - begin] = False
            places = np.flatnonzero(candidate)
            divisor = self.source.divisor
            divisors = np.float32(divisor) if isinstance(divisor, int) else divisor[begin:end][places].astype("f4")
            columns = {}
            with np.errstate(all="ignore"):  # what is not finite is refused below
                for column, model in ((TEACHER, "teacher"), (REFERENCE, "reference")):
                    columns[column] = -self.source.scores[model].log_probs[begin:end][places] / divisors
            columns |= {column: keys.scores(0, begin, end)[places] for column, keys in self.keys.items()}
            for column, values in columns.items():
                if not np.isfinite(values).all():
                    self._refuse(column, begin + places[~np.isfinite(values)])
            yield Block(begin + places, counts[places].astype(np.int64), columns)

    def kept(self, block: Block, threshold: int | None, column: str = SCORE) -> NDArray[np.bool_]:
        """``[n]``: True for the samples of a block that the selection keeps, or, with a threshold, that reach it."""
        mask = np.zeros(len(block.ids), np.bool_)
        if not len(block.ids):
            return mask
        begin, end = int(block.ids[0]), int(block.ids[-1]) + 1
        parts: list[NDArray[np.int64]] = []
        if threshold is not None:
            self.keys[column].keep(DomainRange(0, begin, end, ""), threshold, parts.append)
        elif self.selection is not None:
            first, last = np.searchsorted(self.selection.ids, (begin, end))
            parts.append(np.asarray(self.selection.ids[first:last]))
        ids = np.concatenate([np.zeros(0, np.int64), *parts])
        places = np.searchsorted(block.ids, ids)
        mask[places[block.ids[np.minimum(places, len(mask) - 1)] == ids]] = True
        return mask

    def threshold(self, num_candidates: int, column: str = SCORE) -> int:
        """The key above which the ratio of all candidates lies."""
        whole = [DomainRange(0, 0, self.source.num_samples, "")]
        return self.keys[column].threshold(whole, share_of(self.ratio, num_candidates), by_tokens=False)

    def _refuse(self, column: str, ids: NDArray[np.int64]) -> None:
        folders = " and ".join(str(scores.folder) for scores in self.source.scores.values())
        shown = ", ".join(map(str, ids[:_SHOWN].tolist())) + (", ..." if len(ids) > _SHOWN else "")
        if all(np.isfinite(scores.log_probs[ids]).all() for scores in self.source.scores.values()):
            raise UsageError(
                f"--teacher-scale {self.teacher_scale:g}: it takes the {column} of samples beyond what float32 holds, "
                f"ids {shown}; their log-probabilities are finite: give a smaller one"
            )
        raise CorruptError(
            f"{folders}: the {column} of {len(ids)} or more samples is not finite: ids {shown}; score them anew, or "
            "leave them out with --exclude-ids FILE"
        )


def open_scoring(config: ReportConfig) -> Scoring:
    """Open the scores, the selection and the dataset that the flags name.

    Raises MismatchError, with both values, for scores, a selection or a dataset that do not belong together.
    """
    folders = {"teacher": config.teacher_scores, "reference": config.reference_scores}
    others = {}  # model -> name of its scores in the second scoring; those of the first are opened once
    for model, folder in (("teacher", config.other_teacher_scores), ("reference", config.other_reference_scores)):
        others[model] = model
        if folder is not None and os.path.realpath(folder) != os.path.realpath(folders[model]):
            others[model] = f"other {model}"
            folders[others[model]] = folder
    selection = None if config.selection is None else Selection(config.selection)
    normalise = config.normalise or _recorded(selection, "normalise", "token")
    if normalise == "byte" and not config.data_path:
        raise UsageError(f"{config.selection}: selected per byte, for which the dataset is read: add --data-path")
    (source,) = open_sources(
        {name: [folder] for name, folder in folders.items()},
        outputs=[_domain(selection)],
        data_path=[] if config.data_path is None else [config.data_path],
        normalise=normalise,
        exclude_ids=config.exclude_ids,
        tokenizer_model=config.tokenizer_model,
    )
    names = {} if selection is None else _check_selection(selection, source)
    scale = config.teacher_scale if config.teacher_scale is not None else _recorded_scale(selection, names)
    seed = config.seed if config.seed is not None else int(_recorded(selection, "seed", 1234))
    rules = {SCORE: {"reference": 1.0, "teacher": -scale}}
    if config.compares:
        rules[OTHER] = {others["reference"]: 1.0, others["teacher"]: -scale}
    return Scoring(
        source=source,
        selection=selection,
        ranges=read_ranges(config.domains, [source]),
        # One thread: reading scores is the small part of a report.
        keys={column: Keys([source], Rule(weights, seed), threads=1) for column, weights in rules.items()},
        teacher_scale=scale,
        normalise=normalise,
        ratio=config.ratio if config.ratio is not None else float(_recorded(selection, "ratio", 0.5)),
        seed=seed,
    )


def _domain(selection: Selection | None) -> str:
    """The name of the whole dataset as a domain: that of the selection's folder, or the name it had when made."""
    if selection is None:
        return "all"
    name, known = os.path.basename(os.path.abspath(selection.folder)), list(_recorded(selection, "domains", {}))
    return known[0] if name not in known and len(known) == 1 else name


def _recorded(selection: Selection | None, key: str, default: Any) -> Any:
    return default if selection is None else selection.manifest.parameters["rule"].get(key, default)


def _recorded_scale(selection: Selection | None, names: Mapping[str, str]) -> float:
    """Lambda of the selection's rule; 1 where there is none."""
    if selection is None:
        return 1.0
    weights: Mapping[str, float] = _recorded(selection, "weights", {})
    teacher, reference = (weights.get(names[model], 0.0) for model in ("teacher", "reference"))
    return -teacher / reference if reference > 0 else 1.0


def _check_selection(selection: Selection, source: Source) -> dict[str, str]:
    """Teacher and reference -> the selection's names of them. Refuses a selection made from other scores."""
    scores = source.any_scores
    for key, recorded, expected in (
        ("dataset", selection.dataset, source.dataset),
        ("packing", selection.packing, scores.manifest.parameters["packing"]),
        ("seq_length", selection.seq_length, int(scores.manifest.parameters["seq_length"])),
        ("number of samples", selection.num_samples, source.num_samples),
    ):
        if recorded != expected:
            raise MismatchError(
                f"{selection.folder}: a selection with {key} {recorded}, {scores.folder} scored {key} {expected}: give "
                "the scores that it was made from, or select anew"
            )
    made_from = {value: key for key, value in selection.manifest.parents.items() if key.startswith("scores ")}
    names = {}
    for model in ("teacher", "reference"):
        scores = source.scores[model]
        if scores.fingerprint not in made_from:
            listing = ", ".join(f"{key.removeprefix('scores ')} {value}" for value, key in made_from.items())
            raise MismatchError(
                f"{scores.folder}: scores with fingerprint {scores.fingerprint}; {selection.folder} was selected by "
                f"{listing}: give those, or select anew by these"
            )
        names[model] = made_from[scores.fingerprint].removeprefix("scores ")
    return names
