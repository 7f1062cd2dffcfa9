"""Retokenizing from end to end: engine, shards spread over workers, budget of bad documents, dataset.

A refined corpus is made once and trains students of any family. The dataset alone decides how the work is cut into
shards of documents, each committed on its own: the new dataset's bytes depend neither on the number of workers nor on
how often the run was killed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, say_complete
from megakd.artefacts.run_lock import RunLock
from megakd.data.corpus_shard import MAX_SHARDS, WORTH_STOPPING_BYTES
from megakd.data.indexed.dataset import IndexedDataset, best_dtype, concatenate
from megakd.data.indexed.finished import find_dataset
from megakd.data.tokenizer import Tokenizer, build_tokenizer
from megakd.data.tokenizers.fast import Choice, choose_engine, give_back_memory
from megakd.errors import UsageError
from megakd.pipeline.retokenize.budget import check_budget, check_counts, check_still_possible, list_bad_documents
from megakd.pipeline.retokenize.config import RetokenizeConfig
from megakd.pipeline.retokenize.shards import (
    SHARD_VERSION,
    RetokenizeCounts,
    RetokenizedShard,
    RetokenizeSettings,
    document_ranges,
    read_shard,
)
from megakd.work.console import tell
from megakd.work.progress import DocumentProgress
from megakd.work.shard_run import run_shards
from megakd.work.stop import StopFlag
from megakd.work.unfinished import open_folder, remove_folder, work_fingerprint

_WORKER = "megakd.pipeline.retokenize.worker"
_LEAST_SHARD_TOKENS = 1 << 22
_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 200, 2048
_RESIDENT_BYTES = 512 << 20


def retokenize(config: RetokenizeConfig) -> Manifest:
    """Retokenize a dataset; returns the new dataset's manifest. The same dataset, if it exists, is kept.

    Raises UsageError, MismatchError, DataBudgetError, CorruptError, NoSpaceError, ChildProcessError for workers that
    keep dying, StoppedBySignal.
    """
    with StopFlag() as stop, RunLock(Path(config.output_prefix + ".lock")):
        target = build_tokenizer(config.tokenizer_type, config.tokenizer_model, eod_token=config.eod_token)
        if target.eod is None:
            raise UsageError(
                f"--tokenizer-model {config.tokenizer_model}: it names no end-of-document token (eos_token): "
                "--eod-token does"
            )
        num_workers = config.workers or len(os.sched_getaffinity(0))
        settings = _settings(config, IndexedDataset(config.input_prefix).fingerprint, num_workers)
        dataset, source = settings.open_source()
        tell(target.explain_eod())
        for note in target.notes + target.eod_warnings:
            tell(f"warning: {note}")
        choice = choose_engine(target, _sample_texts(dataset, source), mode=config.tokenizer_engine, say=tell)
        tell(f"tokenizer engine: {choice.engine} ({choice.reason})")
        shard_tokens = config.shard_tokens or max(_LEAST_SHARD_TOKENS, dataset.num_tokens // MAX_SHARDS)
        old, new = source.describe(), target.describe()
        del source, target
        give_back_memory()

        root = Path(config.work_dir or config.output_prefix + ".work")
        fingerprint = _fingerprint(config, dataset, old, new, choice, shard_tokens)
        source_tokenizer = {key: value for key, value in old.items() if key != "path"}
        done = find_dataset(
            config.output_prefix,
            parameters={"append_eod": config.append_eod, "source_tokenizer": source_tokenizer},
            parents={"dataset": dataset.fingerprint},
            tokenizer=new,
            flag="--output-prefix",
            unfinished=(root / fingerprint).is_dir(),
        )
        if done is not None:
            say_complete(config.output_prefix)
            remove_folder(root, root / fingerprint)
            check_counts(config, RetokenizeCounts(**{"tokens": 0, **done.parameters["counts"]}))
            return done
        folder = open_folder(root, fingerprint)
        settings = RetokenizeSettings(**{**asdict(settings), "choice": choice.as_dict(), "folder": str(folder)})
        ranges = document_ranges(dataset, shard_tokens)
        progress = _encode(config, settings, dataset, ranges, num_workers, stop)
        shards = [_require(read_shard(settings.folder, number, verify=False), number) for number in range(len(ranges))]
        counts = RetokenizeCounts()
        for shard in shards:
            counts.add(shard.counts)
        check_budget(config, counts, list_bad_documents(config, shards))
        manifest = concatenate(
            [shard.token_files[0] for shard in shards],
            config.output_prefix,
            dtype=best_dtype(new["vocab_size"]),
            parameters={
                "append_eod": config.append_eod,
                "source_tokenizer": source_tokenizer,
                "tokenizer_engine": choice.as_dict(),
                "counts": {name: count for name, count in asdict(counts).items() if name != "tokens"},
            },
            parents={"dataset": dataset.fingerprint},
            tokenizer=new,
            progress=lambda _: stop.check(),
        )
        remove_folder(root, folder)
        tell(
            f"{counts.documents} documents ({counts.empty_documents} empty), {counts.source_bytes} bytes of text, "
            f"{counts.source_tokens} tokens -> {counts.tokens} tokens; the text of {counts.bad_documents} documents "
            f"did not survive ({counts.undecodable} were not all text, {counts.normalised} were normalised); "
            f"{progress.summary()}"
        )
    return manifest


def _settings(config: RetokenizeConfig, fingerprint: str, num_workers: int) -> RetokenizeSettings:
    return RetokenizeSettings(
        prefix=config.input_prefix,
        fingerprint=fingerprint,
        source_type=config.source_tokenizer_type,
        source_model=config.source_tokenizer_model,
        source_vocab_size=config.source_vocab_size,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=None,
        eod_token=config.eod_token,
        append_eod=config.append_eod,
        choice={},
        folder="",
        max_resident_bytes=max(_RESIDENT_BYTES // num_workers, _RESIDENT_BYTES // 4),
    )


def _sample_texts(dataset: IndexedDataset, source: Tokenizer) -> list[str]:
    """Texts of the beginnings of some documents, spread over the dataset."""
    step = max(1, dataset.num_documents // _SAMPLE_DOCUMENTS)
    heads = (dataset.document(number)[:_SAMPLE_TOKENS] for number in range(0, dataset.num_documents, step))
    return [source.decode(ids[ids < source.vocab_size].tolist()) for ids in heads]


def _fingerprint(
    config: RetokenizeConfig,
    dataset: IndexedDataset,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    choice: Choice,
    shard_tokens: int,
) -> str:
    """Fingerprint of all that decides the bytes of a shard."""
    return work_fingerprint(
        {
            "dataset": dataset.fingerprint,
            "shards": SHARD_VERSION,
            "tokenizers": [{key: value for key, value in record.items() if key != "path"} for record in (old, new)],
            "choice": choice.as_dict(),
            "flags": [config.append_eod, shard_tokens],
        }
    )


def _encode(
    config: RetokenizeConfig,
    settings: RetokenizeSettings,
    dataset: IndexedDataset,
    ranges: Sequence[tuple[int, int]],
    num_workers: int,
    stop: StopFlag,
) -> DocumentProgress:
    """Encode the shards that no earlier run has committed."""
    itemsize, done_tokens, jobs, bad = dataset.dtype.itemsize, 0, [], 0
    for number, (first, last) in enumerate(ranges):
        stop.check()
        finished = read_shard(settings.folder, number, verify=True)
        if finished is None:
            jobs.append({"shard": number, "first": first, "stop": last})
        else:
            done_tokens += finished.counts.source_tokens
            bad += finished.counts.bad_documents
    progress = DocumentProgress(
        dataset.num_tokens * itemsize, done_bytes=done_tokens * itemsize, log_interval=config.log_interval
    )

    def on_message(_: Mapping[str, Any], added: dict[str, Any]) -> None:
        progress.add(
            num_bytes=added["source_tokens"] * itemsize,
            documents=added["documents"],
            tokens=added["tokens"],
            bad=added["bad_documents"],
        )
        nonlocal done_tokens
        done_tokens += added["source_tokens"]
        if (dataset.num_tokens - done_tokens) * itemsize > WORTH_STOPPING_BYTES:
            check_still_possible(config, settings, dataset, bad + progress.bad, num_shards=len(ranges))

    run_shards(_WORKER, asdict(settings), jobs, on_message, num_workers=num_workers, progress=progress, stop=stop)
    return progress


def _require(shard: RetokenizedShard | None, number: int) -> RetokenizedShard:
    """The shard; UsageError where it is gone."""
    if shard is None:
        raise UsageError(f"shard {number} was removed while the run went on; run again")
    return shard
