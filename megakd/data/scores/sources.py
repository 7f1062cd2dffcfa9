"""Sources of a selection: scores of one dataset under several models that belong together, and the excluded ids."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import explain_no_space
from megakd.data.agreement import Side, one_tokenizer, tokenizer_of_flags
from megakd.data.indexed.dataset import NO_TEXT_BYTES, IndexedDataset
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.scores.artefact import COUNTS, Scores
from megakd.data.scores.sample_bytes import sample_bytes
from megakd.data.selection import MANIFEST as SELECTION
from megakd.data.selection import Selection
from megakd.data.tokenizers.recorded import open_tokenizer, recorded_tokenizer
from megakd.errors import MismatchError, UsageError

_AT_ONCE = 1 << 20


def read_excluded(
    exclude_ids: Sequence[str], datasets: set[str], scores: Scores
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """The sorted ids to leave out of the dataset of ``scores``, and the fingerprints of the selections that name them.

    exclude_ids: folders of selections, and files of sample ids. datasets: fingerprints of all datasets that are
    selected from; a selection from another one of them names no id of this one.

    Raises UsageError for a file without ids and for an id that no sample has, MismatchError for a selection from
    another dataset.
    """
    parts: list[NDArray[np.int64]] = []
    parents: dict[str, str] = {}
    for entry in exclude_ids:
        path = Path(entry)
        if (path / SELECTION).is_file():
            selection = Selection(path)
            if selection.dataset not in datasets:
                raise MismatchError(
                    f"--exclude-ids {path}: a selection from dataset {selection.dataset}, the scores are of "
                    f"{', '.join(sorted(datasets))}"
                )
            if selection.dataset != scores.manifest.parents["dataset"]:
                continue  # its ids are of another one of the datasets
            for key, selected in (("packing", selection.packing), ("seq_length", selection.seq_length)):
                if selected != scores.manifest.parameters[key]:
                    raise MismatchError(
                        f"--exclude-ids {path}: selected with {key} {selected}, the scores have "
                        f"{scores.manifest.parameters[key]}: its ids name other samples"
                    )
            parents[f"excluded {len(parents)}"] = selection.fingerprint
            parts.append(selection.ids)
        elif len(datasets) > 1:
            raise UsageError(f"--exclude-ids {path}: ids of which dataset? With several, exclude by selections")
        else:
            parts.append(_read_ids(path, scores.num_samples))
    return parts[0] if len(parts) == 1 else sort_unique(parts), parents


def sort_unique(pieces: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All values of the pieces, ascending and without duplicates, as a view of a temporary file."""
    with tempfile.TemporaryFile() as stream:
        count = 0
        with explain_no_space(Path(tempfile.gettempdir()) / "sorted ids"):
            for piece in pieces:
                for first in range(0, len(piece), _AT_ONCE):
                    stream.write(np.ascontiguousarray(piece[first : first + _AT_ONCE], "<i8").data)
                count += len(piece)
            stream.flush()
        if not count:
            return np.zeros(0, np.int64)
        ids: NDArray[np.int64] = np.memmap(stream, "<i8", "r+", shape=(count,))
    ids.sort()  # in place
    kept = 0
    for first in range(0, count, _AT_ONCE):
        piece = np.array(ids[first : first + _AT_ONCE])
        before = np.roll(piece, 1)
        before[0] = ids[kept - 1] if kept else ~piece[0]
        piece = piece[piece != before]
        ids[kept : kept + len(piece)] = piece
        kept += len(piece)
    return ids[:kept]


def _read_ids(path: Path, num_samples: int) -> NDArray[np.int64]:
    if not path.is_file():
        raise UsageError(f"--exclude-ids {path}: no such file, and no selection")
    try:
        ids = sort_unique(_npy_ids(path) if path.suffix == ".npy" else _text_ids(path))
    except (ValueError, OverflowError, EOFError) as error:
        raise UsageError(f"--exclude-ids {path}: {error}: expected one sample id in a line, or .npy") from error
    for place in (0, -1):
        if len(ids) and not 0 <= ids[place] < num_samples:
            raise UsageError(f"--exclude-ids {path}: sample id {ids[place]} of {num_samples} samples")
    return ids


def _npy_ids(path: Path) -> list[NDArray[Any]]:
    ids = np.load(path, mmap_mode="r")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"shape {ids.shape}, dtype {ids.dtype}: expected one axis of integers")
    return [ids]


def _text_ids(path: Path) -> Iterator[NDArray[np.int64]]:
    with open(path, "rb") as stream:
        while block := stream.read(_AT_ONCE):
            yield np.array((block + stream.readline()).split(), dtype=np.int64)


_SAMPLES_AT_ONCE = 1 << 12
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """The scores of one dataset's samples under every model."""

    output: Path
    scores: dict[str, Scores]
    samples: Samples | None
    """The dataset's samples; None without --data-path."""
    divisor: NDArray[np.int32] | int
    """``[num_samples]``, or one number for all: each NLL is divided by it."""
    excluded: NDArray[np.int64]
    """Sorted ids of samples that are never kept."""
    excluded_by: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the selections that exclude samples, by the names that a manifest gives them."""

    @property
    def any_scores(self) -> Scores:
        """The scores of one model, for everything that all of them share."""
        return next(iter(self.scores.values()))

    @property
    def dataset(self) -> str:
        """Fingerprint of the dataset."""
        return self.any_scores.manifest.parents["dataset"]

    @property
    def num_samples(self) -> int:
        return self.any_scores.num_samples

    @property
    def counts(self) -> NDArray[np.int32]:
        """``[num_samples]``: scored tokens, the same for every model."""
        return self.any_scores.counts


def open_sources(
    models: Mapping[str, Sequence[str]],
    *,
    outputs: Sequence[str],
    data_path: Sequence[str] = (),
    normalise: Literal["token", "sample", "byte"] = "token",
    exclude_ids: Sequence[str] = (),
    tokenizer_model: str | None = None,
) -> list[Source]:
    """Open the scores of every dataset under every model, in the order of the outputs.

    models: name -> folders of scores, one for each dataset; the first model's are in the order of the outputs.
    outputs: a name for each dataset. data_path: prefixes of the datasets in that order, or none. exclude_ids: folders
    of selections, or files of sample ids. tokenizer_model: the tokenizer's file, if it was moved since the dataset
    recorded its path.

    Raises MismatchError, with both values, for scores that do not belong together or to the datasets; UsageError for
    missing scores, and for two folders of one model and dataset.
    """
    opened = {name: [Scores(folder) for folder in folders] for name, folders in models.items()}
    for name, several in opened.items():
        if len(several) != len(outputs):
            raise UsageError(
                f"scores of {name}: {len(several)} folders, --output has {len(outputs)}: one for each dataset"
            )
        _check_one_model(name, several)
    _check_tokenizers(opened, data_path, tokenizer_model)
    first, *more = opened
    datasets = {scores.manifest.parents["dataset"] for scores in opened[first]}
    sources = []
    for index, output in enumerate(outputs):
        anchor = opened[first][index]
        dataset = anchor.manifest.parents["dataset"]
        scores = {first: anchor}
        for name in more:
            by_dataset = {several.manifest.parents["dataset"]: several for several in opened[name]}
            if dataset not in by_dataset:
                listing = ", ".join(f"{several.folder} of dataset {key}" for key, several in by_dataset.items())
                raise MismatchError(
                    f"no scores of {name} for dataset {dataset}, which {first} scored in {anchor.folder}; there are "
                    f"{listing}: score the same dataset with both"
                )
            scores[name] = by_dataset[dataset]
            _check_pair(anchor, scores[name])
        samples = _open_samples(data_path[index], anchor, tokenizer_model) if data_path else None
        excluded, excluded_by = read_excluded(exclude_ids, datasets, anchor)
        sources.append(
            Source(
                output=Path(output),
                scores=scores,
                samples=samples,
                divisor=_divisor(normalise, anchor, samples, tokenizer_model),
                excluded=excluded,
                excluded_by=excluded_by,
            )
        )
    return sources


def _check_one_model(name: str, several: Sequence[Scores]) -> None:
    """Refuse scores of several models under one name, and two folders of one dataset."""
    by_dataset: dict[str, Scores] = {}
    for scores in several:
        parents = scores.manifest.parents
        model = several[0].manifest.parents["model"]
        if parents["model"] != model:
            raise MismatchError(
                f"scores of {name} are of different models: {several[0].folder} of {model}, {scores.folder} of "
                f"{parents['model']}"
            )
        twin = by_dataset.setdefault(parents["dataset"], scores)
        if twin is not scores:
            raise UsageError(f"scores of {name}: {twin.folder} and {scores.folder} are of one dataset")


def _check_pair(left: Scores, right: Scores) -> None:
    """Refuse two models' scores that are not of the same tokens of the same samples."""
    for key in ("packing", "seq_length", "mask_policy", "boundaries", "num_samples", "sampled"):
        values = [scores.manifest.parameters.get(key) for scores in (left, right)]
        if values[0] != values[1]:
            raise MismatchError(
                f"{left.folder} (fingerprint {left.fingerprint}) has {key} {values[0]}, {right.folder} (fingerprint "
                f"{right.fingerprint}) has {values[1]}: score anew with the same"
            )
    vocabularies = _vocabulary(left), _vocabulary(right)
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise MismatchError(
            f"{left.folder} has log-probabilities over {vocabularies[0]} ids, {right.folder} over {vocabularies[1]}: "
            "they do not compare; score anew with one --vocab-size, the tokenizer's number of ids"
        )
    if left.fingerprint == right.fingerprint:
        raise UsageError(
            f"{left.folder} and {right.folder} are the same scores: their difference says nothing; give those of two "
            "models"
        )
    hashes = [next(f.xxh3_128 for f in scores.manifest.files if f.name == COUNTS) for scores in (left, right)]
    if hashes[0] != hashes[1]:
        raise MismatchError(
            f"{left.folder} and {right.folder} scored different tokens: {COUNTS} is {hashes[0]} and {hashes[1]}"
        )


def _vocabulary(scores: Scores) -> int | None:
    """The number of ids that log-probabilities are over, where it is recorded."""
    stated = scores.manifest.parameters.get("vocab_size", (scores.manifest.tokenizer or {}).get("vocab_size"))
    return None if stated is None else int(stated)


def _check_tokenizers(
    opened: Mapping[str, Sequence[Scores]], data_path: Sequence[str], tokenizer_model: str | None
) -> None:
    """Refuse scores, datasets and a ``--tokenizer-model`` whose tokenizers differ, as far as they are recorded."""
    sides = [
        Side(f"the scores {scores.folder}", scores.manifest.tokenizer)
        for several in opened.values()
        for scores in several
    ]
    for prefix in data_path:
        sides.append(Side(f"dataset {prefix}", recorded_tokenizer(IndexedDataset(prefix))))
    if one_tokenizer(sides) is None:
        return  # nothing that a file could be held against
    given = tokenizer_of_flags(None, tokenizer_model, sides)
    one_tokenizer(sides if given is None else [*sides, given])


def _open_samples(prefix: str, scores: Scores, tokenizer_model: str | None) -> Samples:
    manifest = scores.manifest
    dataset = IndexedDataset(prefix, expect_fingerprint=manifest.parents["dataset"])
    tokenizer = partial(open_tokenizer, dataset, tokenizer_model=tokenizer_model)
    samples = open_samples(manifest.parameters["packing"], dataset, int(manifest.parameters["seq_length"]), tokenizer)
    if samples.num_samples != scores.num_samples:
        raise MismatchError(
            f"{scores.folder}: scores of {scores.num_samples} samples, {dataset.prefix} has {samples.num_samples} with "
            f"{samples.packing} packing of {samples.seq_length} tokens"
        )
    return samples


def outdated(source: Source) -> str | None:
    """A warning if scores leave labels out by end-of-document ids alone, as older versions did; else None."""
    for scores in source.scores.values():
        policy = scores.manifest.parameters.get("mask_policy", "all")
        if policy != "all" and "boundaries" not in scores.manifest.parameters:
            return (
                f"{scores.folder}: mask policy {policy}, by end-of-document ids alone: where documents end without, "
                "nothing was left out; this version of 'megakd score' takes the documents' starts from the index"
            )
    return None


def decoded_bytes_warning(source: Source, normalise: str) -> str | None:
    """A warning if NLLs are per byte of what ids decode to, for lack of the bytes of the original text; else None."""
    if normalise != "byte" or source.samples is None or source.samples.dataset.has_text_bytes:
        return None
    return (
        f"{source.samples.dataset.prefix}: {NO_TEXT_BYTES}; NLLs are per byte of what ids decode to, which is less "
        "than the text where a tokenizer normalises, drops white space or does not know a letter"
    )


def _divisor(
    normalise: str, scores: Scores, samples: Samples | None, tokenizer_model: str | None
) -> NDArray[np.int32] | int:
    if normalise == "token":
        return scores.counts
    if normalise == "sample":
        return 1
    assert samples is not None  # byte needs --data-path
    tokenizer = open_tokenizer(samples.dataset, tokenizer_model=tokenizer_model)
    parameters = scores.manifest.parameters
    skipped = tokenizer.eod if parameters.get("mask_policy", "all") != "all" else None
    by_index = "boundaries" in parameters
    return sample_bytes(samples, tokenizer.token_bytes(), skip_after=skipped, skip_starts=by_index)
