"""``megakd verify``: hash every file of an artefact again; ``--adopt``: write the manifest of a bare one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megakd.artefacts.manifest import Manifest, hash_file, read_manifest, unlisted_files, verify_files, write_manifest
from megakd.config.tree import option, parse
from megakd.data.indexed.data_path import find_prefix, prefixes_in, without_ending
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.idx_format import bin_path, idx_path, manifest_path
from megakd.data.indexed.writer import FORMAT, write_dataset_manifest
from megakd.data.scores.artefact import MANIFEST as SCORES
from megakd.data.selection import MANIFEST as SELECTION
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer, name_tokenizer, same_tokenizer
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.logits import journal
from megakd.logits import spec as logits
from megakd.logits.spec import MANIFEST as STORE
from megakd.logits.store import drop_damaged, verify_store
from megakd.model.checkpoint.damage import FORMAT as CHECKPOINT_FORMAT
from megakd.model.checkpoint.damage import MANIFEST as CHECKPOINT
from megakd.model.checkpoint.damage import checkpoint_folders
from megakd.model.checkpoint.foreign import describe_foreign, is_checkpoint, read_shape
from megakd.model.proxy.artefact import MANIFEST as PROXY

HELP = "hash the files of an artefact and compare them with its manifest"
_IN_FOLDERS = ("manifest.json", SCORES, SELECTION, STORE, PROXY)
_SHOWN = 8
_TOKENS_AT_ONCE = 1 << 22

_Look = Callable[[], tuple[Manifest, list[str]]]


@dataclass(frozen=True)
class VerifyConfig:
    """What to verify."""

    artefact: list[str] = option(
        ...,
        "dataset prefix, folder of scores, a selection, a logits store, a journal of logits, a checkpoint or the "
        "checkpoints of a run …, or any manifest",
        positional=True,
    )
    adopt: bool = option(
        False,
        "check a dataset, or a checkpoint of Megatron-LM, that has no manifest and write it one; of a dataset whose "
        "manifest tells no tokenizer, record the one that is given",
        common=True,
    )
    drop_damaged: bool = option(
        False,
        "of logits stores: remove damaged shards and store.json; the capture that made the store then makes them anew",
        common=True,
    )
    tokenizer_type: TokenizerType | None = option(None, "with --adopt: the tokenizer to record", common=True)
    tokenizer_model: str | None = option(None, "its file, or folder", common=True)
    vocab_size: int | None = option(None, "with --adopt: refuse token ids from this one on", common=True)
    model_config: str | None = option(
        None, "with --adopt: YAML that describes the model of a checkpoint that does not, as a run's student"
    )

    def validate(self) -> None:
        """The vocabulary is looked at only when ids are."""
        given = (self.vocab_size, self.tokenizer_type, self.tokenizer_model, self.model_config)
        if not self.adopt and given != (None, None, None, None):
            raise UsageError(
                "--vocab-size, --tokenizer-type and --model-config go with --adopt; a manifest tells them: megakd show"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb: status 5 where any artefact is at fault, with a line for each file and block."""
    config = parse(VerifyConfig, argv, prog="megakd verify", description=HELP)
    status, tokenizer = ExitStatus.COMPLETE, None
    if config.tokenizer_type is not None:
        tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model, vocab_size=config.vocab_size)
    for name in config.artefact:
        for what, look in _looks(name, config, tokenizer):
            faults: list[str] = []
            try:
                manifest, faults = look()
            except CorruptError as error:
                faults = [str(error)]
            if faults:
                status = ExitStatus.CORRUPT
                print("\n".join(f"{what}: CORRUPT: {fault}" for fault in faults), file=sys.stderr)
            else:
                size_bytes = _size_bytes(manifest)
                print(f"{what}: whole: {manifest.format}, {size_bytes} bytes, fingerprint {manifest.fingerprint}")
    return status


def _looks(name: str, config: VerifyConfig, tokenizer: Tokenizer | None) -> Iterator[tuple[str, _Look]]:
    """What there is to look at under one name, each with what looks at it: verifies, or adopts and verifies."""
    bare, paths = bare_checkpoints(Path(name)) if config.adopt else [], existing_manifests(name)
    if bare and config.vocab_size is not None and tokenizer is None:
        raise UsageError(f"{name}: a checkpoint's vocabulary is its tokenizer's: add --tokenizer-type")
    for path in bare:
        yield str(path), partial(_adopt_checkpoint, path, config.model_config, tokenizer)
    if config.adopt and not paths and not bare:
        yield name, lambda: (adopt(Path(name), vocab_size=config.vocab_size, tokenizer=tokenizer), [])
        return
    for path in paths if bare else find_manifests(name):
        inside = path.parent.parent == Path(name) and path.name == CHECKPOINT
        what = str(path.parent) if inside else name
        if config.adopt and tokenizer is not None and path == manifest_path(name):
            yield what, partial(_record_tokenizer, path, tokenizer)
        else:
            yield what, partial(_verify_or_drop, path, config.drop_damaged)


def _verify_or_drop(path: Path, drop: bool) -> tuple[Manifest, list[str]]:
    manifest, faults = verify(path)
    if drop and faults and manifest.format == logits.FORMAT:
        faults += [f"{name} was removed" for name in drop_damaged(path.parent)]
    return manifest, faults


def find_manifests(name: str) -> list[Path]:
    """`existing_manifests`, of which there must be one. Raises UsageError."""
    paths = existing_manifests(name)
    if not paths:
        if checkpoints := bare_checkpoints(Path(name)):
            hint = f"`megakd verify --adopt {name}` checks the checkpoint and writes one"
            raise UsageError(f"{checkpoints[0]}: a checkpoint without a manifest; {hint}")
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

    Several where a folder holds several artefacts, such as scores and a selection, the checkpoints of a run, or a
    journal of logits; else one, or none.
    """
    path = Path(name)
    if manifest_path(name).is_file():
        return [manifest_path(name)]
    if path.is_dir():
        own = [path / each for each in _IN_FOLDERS if (path / each).is_file()]
        own += [each / CHECKPOINT for each in checkpoint_folders(path) if (each / CHECKPOINT).is_file()]
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
    if manifest.format == CHECKPOINT_FORMAT:
        faults += [f"{name}: the manifest does not name it" for name in unlisted_files(manifest)]
    if not faults and manifest.format == FORMAT:
        IndexedDataset(str(path).removesuffix(".manifest.json")).check()
    return manifest, faults


def bare_checkpoints(path: Path) -> list[Path]:
    """Checkpoints that have no manifest: ``path`` itself, or those in a folder of Megatron-LM's."""
    found = [path] if is_checkpoint(path) else [*checkpoint_folders(path), path / "release"]
    return [each for each in found if is_checkpoint(each) and not (each / CHECKPOINT).exists()]


def _adopt_checkpoint(path: Path, model_config: str | None, tokenizer: Tokenizer | None) -> tuple[Manifest, list[str]]:
    """Write the manifest of a checkpoint of Megatron-LM. tokenizer: recorded; its vocabulary is the model's."""
    shape = None if model_config is None else read_shape(model_config, "--model-config")
    found = describe_foreign(path, role="--adopt", given=shape)
    rows = int(found.parameters["vocab_size"])
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise MismatchError(f"{path}: an embedding of {rows} rows, the tokenizer has {tokenizer.vocab_size} entries")
    known = {} if tokenizer is None else {"vocab_size": tokenizer.vocab_size}
    manifest = write_manifest(
        found.path,
        format=found.format,
        version=found.version,
        parameters={**found.parameters, **known},
        parents={},
        tokenizer=None if tokenizer is None else tokenizer.describe(),
        files=found.files,
    )
    return manifest, []


def _record_tokenizer(path: Path, tokenizer: Tokenizer) -> tuple[Manifest, list[str]]:
    """Verify a dataset, and add to its manifest the tokenizer that this does not tell.

    Raises MismatchError where it tells another one, or where the dataset has ids that the tokenizer has not.
    """
    manifest, faults = verify(path)
    if manifest.tokenizer is not None and not same_tokenizer(manifest.tokenizer, tokenizer):
        raise MismatchError(
            f"{path}: made with the tokenizer {name_tokenizer(manifest.tokenizer)}; the one given is "
            f"{name_tokenizer(tokenizer)}"
        )
    if faults or manifest.tokenizer is not None:
        return manifest, faults
    largest = int(manifest.parameters["dataset"]["max_token_id"])
    if largest >= tokenizer.vocab_size:
        raise MismatchError(f"{path}: token id {largest}, the tokenizer has {tokenizer.vocab_size} entries")
    written = write_manifest(
        path,
        format=manifest.format,
        version=manifest.version,
        parameters=manifest.parameters,
        parents=manifest.parents,
        tokenizer=tokenizer.describe(),
        files=manifest.files,
    )
    return written, []


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
