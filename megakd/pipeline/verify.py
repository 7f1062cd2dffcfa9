"""``megakd verify``: hash every file of an artefact again; ``--adopt``: write the manifest of a bare dataset."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megakd.config import option, parse
from megakd.data.data_path import find_prefix, prefixes_in, without_ending
from megakd.data.idx_format import bin_path, idx_path, manifest_path
from megakd.data.indexed import IndexedDataset
from megakd.data.indexed_writer import FORMAT, write_dataset_manifest
from megakd.data.scores import MANIFEST as SCORES
from megakd.data.selection import MANIFEST as SELECTION
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer
from megakd.errors import CorruptError, ExitStatus, UsageError
from megakd.logits import journal
from megakd.logits import spec as logits
from megakd.logits.spec import MANIFEST as STORE
from megakd.logits.store import drop_damaged, verify_store
from megakd.manifest import Manifest, hash_file, read_manifest, verify_files
from megakd.pipeline.proxy_record import MANIFEST as PROXY

HELP = "hash the files of an artefact and compare them with its manifest"
_IN_FOLDERS = ("manifest.json", SCORES, SELECTION, STORE, PROXY)
_SHOWN = 8
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class VerifyConfig:
    """What to verify."""

    artefact: list[str] = option(
        ...,
        "dataset prefix, folder of scores, a selection, a logits store, a journal of logits …, or any manifest",
        positional=True,
    )
    adopt: bool = option(False, "check a dataset that has no manifest and write it one", common=True)
    drop_damaged: bool = option(
        False,
        "of logits stores: remove damaged shards and store.json; the capture that made the store then makes them anew",
        common=True,
    )
    tokenizer_type: TokenizerType | None = option(None, "with --adopt: the tokenizer to record", common=True)
    tokenizer_model: str | None = option(None, "its file, or folder", common=True)
    vocab_size: int | None = option(None, "with --adopt: refuse token ids from this one on", common=True)

    def validate(self) -> None:
        """The vocabulary is looked at only when ids are."""
        if not self.adopt and (self.vocab_size, self.tokenizer_type, self.tokenizer_model) != (None, None, None):
            raise UsageError("--vocab-size and --tokenizer-type go with --adopt; a manifest has both, see megakd show")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb: status 5 where any artefact is at fault, with a line for each file and block."""
    config = parse(VerifyConfig, argv, prog="megakd verify", description=HELP)
    status, tokenizer = ExitStatus.COMPLETE, None
    if config.tokenizer_type is not None:
        tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model, vocab_size=config.vocab_size)
    for name in config.artefact:
        adopts = config.adopt and not existing_manifests(name)
        for path in [manifest_path(name)] if adopts else find_manifests(name):
            faults: list[str] = []
            try:
                if adopts:
                    manifest = adopt(Path(name), vocab_size=config.vocab_size, tokenizer=tokenizer)
                else:
                    manifest, faults = verify(path)
                    if config.drop_damaged and faults and manifest.format == logits.FORMAT:
                        faults += [f"{name} was removed" for name in drop_damaged(path.parent)]
            except CorruptError as error:
                faults = [str(error)]
            if faults:
                status = ExitStatus.CORRUPT
                print("\n".join(f"{name}: CORRUPT: {fault}" for fault in faults), file=sys.stderr)
            else:
                size_bytes = _size_bytes(manifest)
                print(f"{name}: whole: {manifest.format}, {size_bytes} bytes, fingerprint {manifest.fingerprint}")
    return status


def find_manifests(name: str) -> list[Path]:
    """`existing_manifests`, of which there must be one. Raises UsageError."""
    paths = existing_manifests(name)
    if not paths:
        if Path(name).is_dir():
            raise UsageError(f"{name}: no manifest in this folder ({', '.join(_IN_FOLDERS)}){_inside(Path(name))}")
        if idx_path(name).exists() or without_ending(name) is not None:
            hint = f"`megakd verify --adopt {name}` checks the dataset and writes one"
            raise UsageError(f"{name}: a dataset without a manifest; {hint}")
        looked = f"{manifest_path(name)}, {name}.json and the folder {name}"
        raise UsageError(f"{name}: no manifest: looked for {looked}")
    return paths


def _inside(folder: Path) -> str:
    """What of a folder's content is an artefact by itself, for messages."""
    if not any(folder.iterdir()):
        return "; it is empty"
    if (folder / "report.html").is_file():
        return "; a report lies there, report.html: nothing reads it back, so it has none"
    if prefixes := prefixes_in(folder):
        return f"; `megakd verify --adopt {prefixes[0]}` checks the dataset in it and writes one"
    inside = [each for each in sorted(folder.glob("*/")) if any((each / own).is_file() for own in _IN_FOLDERS)]
    more = ", ..." if len(inside) > _SHOWN else ""
    return f"; artefacts lie in {', '.join(map(str, inside[:_SHOWN]))}{more}" if inside else ""


def existing_manifests(name: str) -> list[Path]:
    """The manifests of what is given by its prefix, its folder, its manifest, or its manifest's name without ``.json``.

    Several where a folder holds several artefacts, such as scores and a selection, or is a journal of logits; else one,
    or none.
    """
    path = Path(name)
    if manifest_path(name).is_file():
        return [manifest_path(name)]
    if path.is_dir():
        own = [path / each for each in _IN_FOLDERS if (path / each).is_file()]
        own += [each for folder in (path, *sorted(path.glob("*/"))) for each in journal.manifest_paths(folder)]
        if own or not prefixes_in(path):
            return own
    if path.is_dir() or without_ending(path) is not None:
        return [each for each in [manifest_path(find_prefix(path))] if each.is_file()]
    beside = [] if idx_path(name).exists() else [Path(f"{name}.json")]  # such as PREFIX.sentence-1024.json
    found = [each for each in (path, *beside) if each.is_file()][:1]
    if found and found[0].suffix != ".json":
        own = [path.parent / each for each in _IN_FOLDERS if (path.parent / each).is_file()]
        meant = f"; it lies in an artefact: give its folder, {path.parent}" if own else ""
        raise UsageError(f"{name}: not an artefact, nor a manifest (.json) of one{meant}")
    return found


def verify(path: Path) -> tuple[Manifest, list[str]]:
    """Hash everything that the manifest at ``path`` names, and check a dataset's index; returns the faults found."""
    manifest = read_manifest(path)
    with tqdm(total=_size_bytes(manifest), unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        if manifest.format == logits.FORMAT:
            faults = verify_store(path.parent, progress=bar.update)
        elif manifest.format == journal.FORMAT:
            found = journal.faults_of_segments(manifest, progress=bar.update)
            faults = [f"segment {name}: {fault}" for name, several in found.items() for fault in several]
        else:
            faults = verify_files(path, progress=bar.update)
    if not faults and manifest.format == FORMAT:
        IndexedDataset(str(path).removesuffix(".manifest.json")).check()
    return manifest, faults


def _size_bytes(manifest: Manifest) -> int:
    """Of everything that it names; a store names shards, a journal segments, which have manifests of their own."""
    parts: list[list[int]] = []
    if manifest.format == logits.FORMAT:
        parts = [shard[1:] for shard in manifest.parameters["shards"] if shard]
    elif manifest.format == journal.FORMAT:
        parts = [segment[2:] for segment in manifest.parameters["segments"]]
    return sum(record.size_bytes for record in manifest.files) + sum(map(sum, parts))


def adopt(prefix: Path, *, vocab_size: int | None = None, tokenizer: Tokenizer | None = None) -> Manifest:
    """Check a dataset that has no manifest, index and ids, and write the manifest that makes it an artefact.

    tokenizer: recorded; ids are held against its vocabulary, or else against ``vocab_size``.

    Raises CorruptError for a broken index, UsageError for an id below 0 or outside ``vocab_size``.
    """
    prefix = find_prefix(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the manifest is missing is why we are here
        dataset = IndexedDataset(prefix)
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    limit, largest = 2**63 if vocab_size is None else vocab_size, -1
    with tqdm(total=2 * dataset.tokens.nbytes, unit="B", unit_scale=True, desc=prefix.name, disable=None) as bar:
        for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
            piece = dataset.tokens[start : start + _TOKENS_AT_ONCE]
            if piece.min() < 0 or piece.max() >= limit:
                position = start + int(((piece < 0) | (piece >= limit)).argmax())
                raise UsageError(
                    f"{bin_path(prefix)}: token id {dataset.tokens[position]} at token position {position}; "
                    + ("ids are not negative" if vocab_size is None else f"the vocabulary has {vocab_size} entries")
                )
            largest = max(largest, int(piece.max()))
            bar.update(piece.nbytes)
        files = [hash_file(bin_path(prefix), progress=bar.update), hash_file(idx_path(prefix))]
    return write_dataset_manifest(
        prefix,
        files,
        dtype=dataset.dtype,
        num_documents=dataset.num_documents,
        num_sequences=dataset.num_sequences,
        max_token_id=largest,
        tokenizer=None if tokenizer is None else tokenizer.describe(),
    )
