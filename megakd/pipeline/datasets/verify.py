"""``megakd verify``: compare the files of artefacts with their hashes; ``--adopt``: write a missing manifest."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from megakd.model.huggingface.exported import MANIFEST as EXPORTED
from megakd.model.huggingface.folder import FORM, describe_folder, is_hf_folder
from megakd.model.proxy.artefact import MANIFEST as PROXY
from megakd.work.progress import ByteProgress

HELP = "hash the files of an artefact and compare them with its manifest"
_IN_FOLDERS = ("manifest.json", SCORES, SELECTION, STORE, PROXY, EXPORTED)
_SHOWN = 8
_TOKENS_AT_ONCE = 1 << 22

_Look = Callable[[], tuple[Manifest, list[str]]]


@dataclass(frozen=True)
class VerifyConfig:
    """Flags of ``megakd verify``."""

    artefact: list[str] = option(
        ...,
        "dataset prefix, folder of scores, a selection, a logits store, a journal of logits, a checkpoint, the "
        "checkpoints of a run …, an exported Hugging Face folder, or any manifest",
        positional=True,
    )
    adopt: bool = option(
        False,
        "check a dataset, or a checkpoint of Megatron-LM, that has no manifest, and write one; add the tokenizer that "
        "is given to the manifest of a dataset that records none",
        common=True,
    )
    drop_damaged: bool = option(
        False,
        "remove damaged shards of a logits store, and store.json; the capture that made the store then makes them anew",
        common=True,
    )
    tokenizer_type: TokenizerType | None = option(None, "tokenizer to record, with --adopt", common=True)
    tokenizer_model: str | None = option(None, "file or folder of the tokenizer", common=True)
    vocab_size: int | None = option(
        None, "size of the vocabulary, with --adopt: token ids from it on are refused", common=True
    )
    model_config: str | None = option(
        None, "YAML that describes the model as a run's student, with --adopt, for a checkpoint without a description"
    )

    def validate(self) -> None:
        """Raise UsageError for flags of ``--adopt`` without it."""
        adopted = (self.vocab_size, self.tokenizer_type, self.tokenizer_model, self.model_config)
        if not self.adopt and adopted != (None, None, None, None):
            raise UsageError(
                "--vocab-size, --tokenizer-type and --model-config go with --adopt; a manifest tells them: megakd show"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns status 5 where any artefact is damaged, with a line for each damaged file and block."""
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
    """Artefacts under one name, each with the function that verifies it, or adopts it."""
    bare, paths = bare_checkpoints(Path(name)) if config.adopt else [], existing_manifests(name)
    if bare and config.vocab_size is not None and tokenizer is None:
        raise UsageError(f"{name}: a checkpoint's vocabulary is its tokenizer's: add --tokenizer-type")
    for path in bare:
        yield str(path), partial(_adopt_checkpoint, path, config.model_config, tokenizer)
    if config.adopt and not paths and is_hf_folder(Path(name)):
        if tokenizer is not None or config.model_config is not None:
            raise UsageError(f"{name}: a Hugging Face folder tells its model and its tokenizer: leave the flags out")
        yield name, partial(_adopt_folder, Path(name))
        return
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
    """Find the manifests of ``name`` as `existing_manifests` does. Raises UsageError where there is none."""
    paths = existing_manifests(name)
    if not paths:
        if is_hf_folder(Path(name)):
            hint = f"`megakd verify --adopt {name}` writes one, with the hashes of its tensors"
            raise UsageError(f"{name}: a Hugging Face folder without a manifest; {hint}")
        if checkpoints := bare_checkpoints(Path(name)):
            hint = f"`megakd verify --adopt {name}` checks the checkpoint and writes one"
            raise UsageError(f"{checkpoints[0]}: a checkpoint without a manifest; {hint}")
        if Path(name).is_dir():
            raise UsageError(f"{name}: no manifest in this folder ({', '.join(_IN_FOLDERS)}){_inside(Path(name))}")
        if idx_path(name).exists() or without_ending(name) is not None:
            hint = f"`megakd verify --adopt {name}` checks the dataset and writes one"
            raise UsageError(f"{name}: a dataset without a manifest; {hint}")
        places = f"{manifest_path(name)}, {name}.json and the folder {name}"
        raise UsageError(f"{name}: no manifest: looked for {places}")
    return paths


def _inside(folder: Path) -> str:
    """Hint for messages: artefacts that lie in a folder which is none itself."""
    if not any(folder.iterdir()):
        return "; it is empty"
    if (folder / "report.html").is_file():
        return "; a report lies there, report.html: nothing reads it back, so it has none"
    if prefixes := prefixes_in(folder):
        return f"; `megakd verify --adopt {prefixes[0]}` checks the dataset in it and writes one"
    inside = [path for path in sorted(folder.glob("*/")) if any((path / name).is_file() for name in _IN_FOLDERS)]
    more = ", ..." if len(inside) > _SHOWN else ""
    return f"; artefacts lie in {', '.join(map(str, inside[:_SHOWN]))}{more}" if inside else ""


def existing_manifests(name: str) -> list[Path]:
    """Find the manifests of ``name``: a prefix, a folder, a manifest, or a manifest without its ``.json``.

    There are several where a folder holds several artefacts, such as scores and a selection, the checkpoints of a run,
    or a journal of logits; else one or none.
    """
    path = Path(name)
    if manifest_path(name).is_file():
        return [manifest_path(name)]
    if path.is_dir():
        inside = _manifests_in(path)
        inside += [folder / CHECKPOINT for folder in checkpoint_folders(path) if (folder / CHECKPOINT).is_file()]
        inside += [file for folder in (path, *sorted(path.glob("*/"))) for file in journal.manifest_paths(folder)]
        if inside or not prefixes_in(path):
            return inside
    if path.is_dir() or without_ending(path) is not None:
        return [manifest for manifest in [manifest_path(find_prefix(path))] if manifest.is_file()]
    beside = [] if idx_path(name).exists() else [Path(f"{name}.json")]  # such as PREFIX.sentence-1024.json
    files = [file for file in (path, *beside) if file.is_file()][:1]
    if files and files[0].suffix != ".json":
        meant = f"; it lies in an artefact: give its folder, {path.parent}" if _manifests_in(path.parent) else ""
        raise UsageError(f"{name}: not an artefact, nor a manifest (.json) of one{meant}")
    return files


def _manifests_in(folder: Path) -> list[Path]:
    return [folder / name for name in _IN_FOLDERS if (folder / name).is_file()]


def verify(path: Path) -> tuple[Manifest, list[str]]:
    """Hash all files of the manifest at ``path``, and check a dataset's index; returns the faults, a line each."""
    manifest = read_manifest(path)
    with ByteProgress(_size_bytes(manifest), what=f"verify {path.name}") as bar:
        if manifest.format == logits.FORMAT:
            faults = verify_store(path.parent, progress=bar.update)
        elif manifest.format == journal.FORMAT:
            by_segment = journal.faults_of_segments(manifest, progress=bar.update)
            faults = [f"segment {name}: {fault}" for name, several in by_segment.items() for fault in several]
        else:
            faults = verify_files(path, progress=bar.update)
    if manifest.format == CHECKPOINT_FORMAT and manifest.parameters.get("form") != FORM:
        faults += [f"{name}: the manifest does not name it" for name in unlisted_files(manifest)]
    if not faults and manifest.format == FORMAT:
        dataset = IndexedDataset(str(path).removesuffix(".manifest.json"))
        dataset.check()
        _ = dataset.text_bytes  # their number, and their sum
    return manifest, faults


def bare_checkpoints(path: Path) -> list[Path]:
    """Checkpoints without a manifest: ``path`` itself, or those in a folder of Megatron-LM's."""
    folders = [path] if is_checkpoint(path) else [*checkpoint_folders(path), path / "release"]
    return [folder for folder in folders if is_checkpoint(folder) and not (folder / CHECKPOINT).exists()]


def _adopt_checkpoint(path: Path, model_config: str | None, tokenizer: Tokenizer | None) -> tuple[Manifest, list[str]]:
    """Write the manifest of a checkpoint of Megatron-LM.

    model_config: YAML of the model's shape, for a checkpoint that does not describe it. tokenizer: recorded; its
    vocabulary is the model's.

    Raises MismatchError for a tokenizer with more ids than the model's embedding.
    """
    shape = None if model_config is None else read_shape(model_config, "--model-config")
    described = describe_foreign(path, role="--adopt", given=shape)
    rows = int(described.parameters["vocab_size"])
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise MismatchError(f"{path}: an embedding of {rows} rows, the tokenizer has {tokenizer.vocab_size} entries")
    known = {} if tokenizer is None else {"vocab_size": tokenizer.vocab_size}
    manifest = write_manifest(
        described.path,
        format=described.format,
        version=described.version,
        parameters={**described.parameters, **known},
        parents={},
        tokenizer=None if tokenizer is None else tokenizer.describe(),
        files=described.files,
    )
    return manifest, []


def _adopt_folder(path: Path) -> tuple[Manifest, list[str]]:
    """Write the manifest of a Hugging Face folder into it, so that its tensors are compared with their hashes later."""
    described = describe_folder(path, "--adopt")
    manifest = write_manifest(
        described.path,
        format=described.format,
        version=described.version,
        parameters=described.parameters,
        parents={},
        tokenizer=described.tokenizer,
        files=described.files,
    )
    return manifest, []


def _record_tokenizer(path: Path, tokenizer: Tokenizer) -> tuple[Manifest, list[str]]:
    """Verify a dataset, and record the tokenizer in its manifest if that records none.

    Raises MismatchError where it records another one, or where the dataset has ids beyond the tokenizer's.
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
    """Total bytes of the artefact, including the shards of a store or the segments of a journal."""
    parts: list[list[int]] = []
    if manifest.format == logits.FORMAT:
        parts = [shard[1:] for shard in manifest.parameters["shards"] if shard]
    elif manifest.format == journal.FORMAT:
        parts = [segment[2:] for segment in manifest.parameters["segments"]]
    return sum(record.size_bytes for record in manifest.files) + sum(map(sum, parts))


def adopt(prefix: Path, *, vocab_size: int | None = None, tokenizer: Tokenizer | None = None) -> Manifest:
    """Check the index and the ids of a dataset that has no manifest, and write its manifest.

    tokenizer: recorded; ids must lie in its vocabulary. vocab_size: bound on the ids where there is no tokenizer.

    Raises CorruptError for a broken index, UsageError for an id below 0 or outside the vocabulary.
    """
    prefix = find_prefix(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that there is no manifest
        dataset = IndexedDataset(prefix)
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    limit, largest = 2**63 if vocab_size is None else vocab_size, -1
    with ByteProgress(2 * dataset.tokens.nbytes, what=f"adopt {prefix.name}") as bar:
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
