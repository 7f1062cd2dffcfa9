"""Description, line by line, of an artefact other than a dataset: scores, a selection, a store, any manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.data import selection
from megakd.data.scores import artefact as scores
from megakd.data.scores.artefact import Scores
from megakd.data.selection import Selection
from megakd.logits import journal
from megakd.logits import spec as logits
from megakd.logits.store import LogitsStore

_AT_ONCE = 1 << 20
_LINE = 120  # characters of a mapping that is shown on one line
Rows = Iterator[tuple[str, object]]


def describe_artefact(path: Path) -> list[str]:
    """Describe the artefact of the manifest at ``path``, with figures of its arrays, a line each.

    Raises CorruptError for files that are not whole, MismatchError for scores or a selection of another version.
    """
    manifest = read_manifest(path)
    rows = [("artefact", f"{manifest.format}, version {manifest.version}"), ("fingerprint", manifest.fingerprint)]
    kinds = {scores.FORMAT: _scores, selection.FORMAT: _selection, logits.FORMAT: _store, journal.FORMAT: _journal}
    rows_of_kind = kinds.get(manifest.format, _parameters)
    return [f"{name:<18} {value}" for name, value in (*rows, *rows_of_kind(manifest), *_provenance(manifest))]


def flat(mapping: Mapping[str, Any]) -> str:
    """Names and values on one line."""
    return ", ".join(f"{key} {value}" for key, value in mapping.items())


def nested(name: str, value: object) -> Rows:
    """Yield a row for a value; a mapping that is too long for a line has a row for each of its values."""
    if isinstance(value, Mapping) and len(line := flat(value)) <= _LINE:
        yield name, line
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from nested(f"{name} {key}", inner)
    elif isinstance(value, list | tuple) and not any(isinstance(entry, Mapping) for entry in value):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, value


def _scores(manifest: Manifest) -> Rows:
    artefact = Scores(manifest.path.parent)
    total = mean_sum = 0.0
    scored = tokens = bad = 0
    for start in range(0, artefact.num_samples, _AT_ONCE):
        counts = np.asarray(artefact.counts[start : start + _AT_ONCE])
        sums = artefact.log_probs[start : start + _AT_ONCE].astype(np.float64)
        good = (counts > 0) & np.isfinite(sums)
        bad += int(np.count_nonzero((counts > 0) & ~good))
        scored, tokens = scored + int(np.count_nonzero(good)), tokens + int(counts[good].sum(dtype=np.int64))
        total -= float(sums[good].sum())
        mean_sum -= float((sums[good] / counts[good]).sum())
    yield "samples", artefact.num_samples
    why = "have nothing to score" if artefact.sampled is None else "were not sampled, or have nothing to score"
    yield "scored samples", f"{scored} ({artefact.num_samples - scored - bad} {why})"
    if bad:
        yield "not finite", f"{bad} samples"
    yield "scored tokens", tokens
    if tokens:
        yield "mean NLL", f"{total / tokens:.4f} nats a token, {mean_sum / scored:.4f} as the mean of samples"
    yield "files", ", ".join(record.name for record in manifest.files)
    yield from _parameters(manifest, without=("num_samples", "computed"))
    for number, computed in enumerate(manifest.parameters.get("computed", ())):
        yield f"computed {number}", flat(computed)


def _selection(manifest: Manifest) -> Rows:
    selected = Selection(manifest.path.parent)
    rule = manifest.parameters["rule"]
    yield "samples", selected.num_samples
    yield "kept", f"{len(selected)} ({100 * len(selected) / max(selected.num_samples, 1):.2f} %)"
    yield from _parameters(manifest, without=("num_samples", "num_kept", "rule"))
    yield from ((f"rule {name}", value) for name, value in rule.items() if name != "domains")
    for name, domain in rule.get("domains", {}).items():
        kept, candidates, threshold = domain["kept"], domain["candidates"], domain["threshold"]
        least = "" if threshold is None else f", scores from {threshold:.6g} on"
        yield (
            f"domain {name}",
            f"{kept} of {candidates} candidates kept ({100 * kept / max(candidates, 1):.2f} %), "
            f"{domain['kept_tokens']} of {domain['candidate_tokens']} tokens{least}",
        )


def _store(manifest: Manifest) -> Rows:
    LogitsStore(manifest.path.parent)  # checks the size of every file
    shards = [shard for shard in manifest.parameters["shards"] if shard]
    rows, total = int(manifest.parameters["rows"]), sum(sum(shard[1:]) for shard in shards)
    have, samples = manifest.parameters["samples_with_targets"], manifest.parameters["num_samples"]
    yield "samples", f"{have} of {samples} have targets"
    yield "rows", f"{rows}, {total} bytes, {total / max(rows, 1):.1f} bytes a token"
    yield "shards", f"{len(shards)} of {len(manifest.parameters['shards'])} ranges"
    yield from _parameters(manifest, without=("shards", "rows", "samples_with_targets", "num_samples"))


def _journal(manifest: Manifest) -> Rows:
    segments = manifest.parameters["segments"]
    yield "segments", f"{len(segments)}, {sum(sum(segment[2:]) for segment in segments)} bytes"
    yield from _parameters(manifest, without=("segments",))


def _parameters(manifest: Manifest, without: tuple[str, ...] = ()) -> Rows:
    for name, value in manifest.parameters.items():
        if name not in without:
            yield from nested(name, value)


def _provenance(manifest: Manifest) -> Rows:
    yield "tokenizer", flat(manifest.tokenizer) if manifest.tokenizer else "not recorded"
    yield from ((f"parent {name}", fingerprint) for name, fingerprint in manifest.parents.items())
