"""Preprocessing from end to end: inputs, engine, shards spread over workers, budget of bad records, dataset.

The dataset's bytes depend on the inputs and flags alone, neither on the number of workers nor on how often the run was
killed. Inputs that changed since an unfinished run have another fingerprint, hence another folder for unfinished work,
so the run starts afresh. Inputs that change during a run raise MismatchError.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megakd.artefacts.background_hashes import BackgroundHashes
from megakd.artefacts.manifest import Manifest, read_manifest, say_complete
from megakd.artefacts.run_lock import RunLock
from megakd.data.corpus_shard import MAX_SHARDS, QUARANTINE
from megakd.data.indexed.dataset import best_dtype, concatenate
from megakd.data.indexed.finished import find_dataset
from megakd.data.indexed.idx_format import manifest_path
from megakd.data.indexed.writer import WITHOUT_BYTES
from megakd.data.text.inputs import Input, check_unchanged, distinct_names, find_inputs, sample_texts
from megakd.data.tokenizer import build_tokenizer
from megakd.data.tokenizers.fast import Choice, choose_engine, give_back_memory
from megakd.errors import MismatchError, UsageError
from megakd.pipeline.preprocess.budget import Budget, check_budget, check_counts, list_bad_records
from megakd.pipeline.preprocess.config import PreprocessConfig
from megakd.pipeline.preprocess.shards import (
    SHARD_VERSION,
    TextCounts,
    TextSettings,
    TextShard,
    finished_shards,
)
from megakd.work.console import tell
from megakd.work.progress import DocumentProgress
from megakd.work.shard_run import run_shards
from megakd.work.stop import StopFlag
from megakd.work.unfinished import open_folder, remove_folder, work_fingerprint

_WORKER = "megakd.pipeline.preprocess.worker"
_ENGINES = ("tokenizers", "sentencepiece", "gigatoken")
# Memory of all workers together, which with this process stays below 400 MB; and the least that a worker needs.
_RESIDENT_BYTES, _LEAST_RESIDENT_BYTES = 304 << 20, 112 << 20


def preprocess(config: PreprocessConfig) -> list[Manifest]:
    """Tokenize the inputs; returns the manifest of each key's dataset. The same datasets, if they exist, are kept.

    Raises UsageError, DataBudgetError, MismatchError for inputs that change meanwhile and for different datasets in the
    place of these, CorruptError for a cut or damaged input, NoSpaceError, ChildProcessError for workers that keep
    dying, StoppedBySignal.
    """
    with StopFlag() as stop, RunLock(Path(config.output_prefix + ".lock")):
        inputs = find_inputs(config.input, own=config.output_prefix + QUARANTINE)
        tokenizer = build_tokenizer(
            config.tokenizer_type, config.tokenizer_model, vocab_size=config.vocab_size, eod_token=config.eod_token
        )
        if config.append_eod and tokenizer.eod is None:
            raise UsageError(
                f"--append-eod: {config.tokenizer_model} names no end-of-document token (eos_token): give --eod-token, "
                f"one of {', '.join(tokenizer.literals[:12]) or 'its special tokens, of which it has none'}"
            )
        tell(tokenizer.explain_eod() + ("" if config.append_eod else "; not appended, for lack of --append-eod"))
        for note in tokenizer.notes + tokenizer.eod_warnings:
            tell(f"warning: {note}")
        sample = sample_texts(inputs, config.json_keys)
        choice = choose_engine(tokenizer, sample, mode=config.tokenizer_engine, say=tell)
        tell(f"tokenizer engine: {choice.engine} ({choice.reason})")
        description, dtype = tokenizer.describe(), best_dtype(tokenizer.vocab_size)
        eod_text = tokenizer.eod_token
        eod_is_cut_out = eod_text is not None and tokenizer.eod in tokenizer.encode(eod_text)
        del tokenizer
        give_back_memory()

        root = Path(config.work_dir or config.output_prefix + ".work")
        folder = root / _fingerprint(config, inputs, choice, description)
        hashes = BackgroundHashes([Path(item.path) for item in inputs], stopped=stop.is_set)
        if done := _find_finished(config, inputs, description, hashes, unfinished=folder.is_dir()):
            remove_folder(root, folder)
            return done
        open_folder(root, folder.name)
        num_workers = config.workers or len(os.sched_getaffinity(0))
        settings = _settings(config, inputs, choice, description, eod_text, folder, num_workers)
        progress = _encode(config, settings, inputs, num_workers, stop)

        shards = _collect(settings)
        counts = TextCounts()
        for shard in (shard for per_file in shards for shard in per_file):
            counts.add(shard.counts)
        quarantine = list_bad_records(config, settings.paths, shards)
        check_budget(config, counts, settings.paths, shards, quarantine)
        parents = dict(zip(distinct_names(inputs), hashes.wait()))
        check_unchanged(inputs)
        manifests = []
        for column, key in enumerate(config.json_keys):
            manifests.append(
                concatenate(
                    [shard.token_files[column] for per_file in shards for shard in per_file],
                    dataset_prefix(config, key),
                    dtype=dtype,
                    parameters=_parameters(config, key, choice, counts, eod_text),
                    parents=parents,
                    tokenizer=description,
                    progress=lambda _: stop.check(),
                )
            )
        remove_folder(root, folder)
        if counts.documents_with_eod_text:
            effect = (
                "which is that id: each falls into several" if eod_is_cut_out else "which is text to this tokenizer"
            )
            tell(f"warning: {counts.documents_with_eod_text} documents have {eod_text} written out, {effect}")
        tell(
            f"{counts.documents} documents ({counts.empty_documents} empty), {counts.tokens} tokens, "
            f"{counts.bad_records} bad records, {counts.blank_lines} blank lines, "
            f"{counts.duplicate_keys} duplicate keys; {progress.summary()}"
        )
    return manifests


def dataset_prefix(config: PreprocessConfig, key: str) -> str:
    """Prefix of the dataset of a key."""
    return f"{config.output_prefix}_{key}_document"


def _find_finished(
    config: PreprocessConfig,
    inputs: list[Input],
    tokenizer: Mapping[str, Any],
    hashes: BackgroundHashes,
    *,
    unfinished: bool,
) -> list[Manifest] | None:
    """Read the manifests of the datasets, if all exist and are the ones that would be made now.

    Raises MismatchError for different ones: flags are compared first, then inputs, by the hashes of their content.
    """

    def find(key: str, parents: Mapping[str, str]) -> Manifest | None:
        return find_dataset(
            dataset_prefix(config, key),
            parameters={"json_key": key, "append_eod": config.append_eod, "max_doc_bytes": config.max_doc_bytes},
            parents=parents,
            tokenizer=tokenizer,
            flag="--output-prefix",
            unfinished=unfinished,
        )

    paths = [manifest_path(dataset_prefix(config, key)) for key in config.json_keys]
    recorded = [read_manifest(path, check_files=False).parents for path in paths if path.exists()]
    names = distinct_names(inputs)
    for parents in recorded or [{}]:  # flags and names, which need no reading
        same = set(parents) == set(names)
        for key in config.json_keys:
            find(key, parents if same else dict.fromkeys(names, "an input"))
    if not recorded:
        return None
    tell("comparing the inputs with those of the dataset that is there")
    parents = dict(zip(names, hashes.wait()))
    manifests = [find(key, parents) for key in config.json_keys]
    done = [manifest for manifest in manifests if manifest is not None]
    if len(done) < len(manifests):
        return None
    for key, manifest in zip(config.json_keys, done):
        say_complete(dataset_prefix(config, key))
        if manifest.version == WITHOUT_BYTES:
            tell(
                f"{dataset_prefix(config, key)}: an older version made it, without the bytes of its text, which "
                "evaluation needs for bits per byte: removed and made anew it has them, and another fingerprint"
            )
    check_counts(config, TextCounts(**{"tokens": 0, **done[0].parameters["counts"]}))
    return done


def _fingerprint(config: PreprocessConfig, inputs: list[Input], choice: Choice, tokenizer: Mapping[str, Any]) -> str:
    """Fingerprint of all that decides the bytes of a shard; inputs by size and time, as reading them takes long."""
    return work_fingerprint(
        {
            "versions": {name: _version(name) for name in _ENGINES} | {"shards": SHARD_VERSION},
            "inputs": [[os.path.abspath(item.path), item.kind, item.size_bytes, item.modified_ns] for item in inputs],
            "tokenizer": {key: value for key, value in tokenizer.items() if key != "path"},
            "choice": choice.as_dict(),
            "flags": [config.json_keys, config.append_eod, config.max_doc_bytes, config.shard_bytes],
        }
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _settings(
    config: PreprocessConfig,
    inputs: list[Input],
    choice: Choice,
    tokenizer: Mapping[str, Any],
    eod_text: str | None,
    folder: Path,
    num_workers: int,
) -> TextSettings:
    total = sum(item.size_bytes for item in inputs)
    return TextSettings(
        paths=[item.path for item in inputs],
        kinds=[item.kind for item in inputs],
        json_keys=config.json_keys,
        append_eod=config.append_eod,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
        eod_token=config.eod_token,
        num_ids=tokenizer["vocab_size"],
        eod=tokenizer["eod"],
        eod_text=eod_text,
        choice=choice.as_dict(),
        max_doc_bytes=config.max_doc_bytes,
        shard_bytes=config.shard_bytes or max(16 << 20, total // MAX_SHARDS),
        folder=str(folder),
        max_resident_bytes=max(_RESIDENT_BYTES // num_workers, _LEAST_RESIDENT_BYTES),
    )


def _encode(
    config: PreprocessConfig, settings: TextSettings, inputs: list[Input], num_workers: int, stop: StopFlag
) -> DocumentProgress:
    """Encode the shards that no earlier run has committed."""
    jobs = []
    done_bytes = 0
    budget = Budget(config, inputs, settings.shard_bytes)
    for file, item in enumerate(inputs):
        for shard, finished in enumerate(finished_shards(settings, file, verify=True)):
            stop.check()
            if finished is None:
                jobs.append({"file": file, "shard": shard})
                continue
            budget.add_finished(file, shard, finished.counts, ended=finished.last)
            if item.kind == "plain":
                done_bytes += min(settings.shard_bytes, item.size_bytes - shard * settings.shard_bytes)
            elif finished.last:
                done_bytes += item.size_bytes
    total = sum(item.size_bytes for item in inputs)
    if jobs:
        budget.check()
        tell(f"reading {len(inputs)} files, {total / 1e6:.1f} MB, with {num_workers} workers")
    progress = DocumentProgress(total, done_bytes=done_bytes, log_interval=config.log_interval)
    positions: dict[tuple[int, int], int] = {}

    def on_message(job: Mapping[str, Any], message: dict[str, Any]) -> None:
        where = (job["file"], job["shard"])
        before = positions.get(where, 0)
        positions[where] = max(before, message["position"])
        progress.add(
            num_bytes=positions[where] - before,
            documents=message["documents"],
            tokens=message["tokens"],
            bad=message["bad_records"],
        )
        budget.add(job, message)

    run_shards(_WORKER, asdict(settings), jobs, on_message, num_workers=num_workers, progress=progress, stop=stop)
    return progress


def _collect(settings: TextSettings) -> list[list[TextShard]]:
    """Read every shard of every file. Raises MismatchError where one is missing."""
    collected = []
    for file, path in enumerate(settings.paths):
        committed = list(finished_shards(settings, file, verify=False))
        shards = [shard for shard in committed if shard is not None]
        if len(shards) != len(committed) or settings.num_shards(file) not in (None, len(shards)):
            raise MismatchError(f"{path}: changed while it was read; run again when it is complete")
        collected.append(shards)
    return collected


def _parameters(
    config: PreprocessConfig, key: str, choice: Choice, counts: TextCounts, eod_text: str | None
) -> dict[str, Any]:
    named_counts = asdict(counts)
    del named_counts["tokens"]
    written_out = named_counts.pop("documents_with_eod_text")
    return {
        "json_key": key,
        "append_eod": config.append_eod,
        "eod_token": eod_text,
        "documents_with_eod_token": written_out,
        "max_doc_bytes": config.max_doc_bytes,
        "tokenizer_engine": choice.as_dict(),
        "counts": named_counts,
    }
