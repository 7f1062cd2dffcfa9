"""``megakd retokenize``: a dataset, document by document, into the ids of another tokenizer, no text lost.

A refined corpus is made once and trains students of any family. The work is cut into shards of documents by the
dataset alone and each is committed on its own: the dataset's bytes depend neither on the number of workers nor on how
often the run was killed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from megakd import __version__
from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.finished import say_complete
from megakd.artefacts.manifest import Manifest
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import option, parse
from megakd.data.indexed.dataset import IndexedDataset, best_dtype, concatenate
from megakd.data.indexed.finished import find_dataset
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer
from megakd.data.tokenizers.fast import Choice, EngineMode, choose_engine, give_back_memory
from megakd.errors import DataBudgetError, ExitStatus, StoppedBySignal, UsageError
from megakd.pipeline.retokenize.shards import Counts, Settings, Shard, document_ranges, read_shard
from megakd.work.console import tell
from megakd.work.progress import DocumentProgress
from megakd.work.stop import StopFlag
from megakd.work.unfinished import LISTED, WORTH_STOPPING_BYTES, open_folder, remove_folder
from megakd.work.worker_pool import WorkerPool

HELP = "turn a dataset into another tokenizer's, document by document"
QUARANTINE = ".quarantine.jsonl"
_WORKER = "megakd.pipeline.retokenize.worker"
_MAX_SHARDS = 4096
_LEAST_SHARD_TOKENS = 1 << 22
_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 200, 2048
_RESIDENT_BYTES = 512 << 20


@dataclass(frozen=True)
class RetokenizeConfig:
    """What ``megakd retokenize`` is asked to do."""

    input_prefix: str = option(..., "dataset to read, without .bin or .idx")
    output_prefix: str = option(..., "dataset to write, without .bin or .idx")
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"] = option(
        ..., "Megatron's name of the new tokenizer"
    )
    tokenizer_model: str | None = option(None, "local .model file, tokenizer.json, or folder with one", common=True)
    source_tokenizer_type: TokenizerType | None = option(None, "the old tokenizer (default: as recorded)", common=True)
    source_tokenizer_model: str | None = option(None, "its file, or folder (default: as recorded)", common=True)
    source_vocab_size: int | None = option(None, "ids of an old NullTokenizer, its end of document not counted")
    append_eod: bool = option(True, "end each document with the end-of-document id, where it does not", common=True)
    eod_token: str | None = option(
        None, "the new end-of-document token as it is written (default: what the model's files name)", common=True
    )
    workers: int = option(0, "worker processes; 0: one for each core", common=True)
    log_interval: int = option(10000, "documents between progress lines, where stderr is no terminal", common=True)
    max_bad_fraction: float = option(
        0.001, "more documents than this fraction whose text does not survive: exit status 3", common=True
    )
    strict: bool = option(False, "no such document at all", common=True)
    tokenizer_engine: EngineMode = option(
        "auto", "auto: the fast engine where it gives the reference engine's ids", common=True
    )
    shard_tokens: int = option(0, "tokens per shard, what a killed run repeats; 0: 4 Mi, or a 4096th of the dataset")
    work_dir: str | None = option(None, "folder for unfinished work (default: PREFIX.work)")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if min(self.workers, self.shard_tokens) < 0 or self.log_interval < 1:
            raise UsageError(
                f"--workers {self.workers}, --shard-tokens {self.shard_tokens}: expected 0 or more; "
                f"--log-interval {self.log_interval}: expected at least 1"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"--max-bad-fraction {self.max_bad_fraction}: expected a fraction from 0 to 1")
        if not os.path.basename(self.output_prefix):
            raise UsageError(f"--output-prefix '{self.output_prefix}': expected FOLDER/NAME")
        if not os.path.isdir(os.path.dirname(self.output_prefix) or "."):
            raise UsageError(f"--output-prefix {self.output_prefix}: its folder does not exist")
        if os.path.realpath(self.output_prefix) == os.path.realpath(self.input_prefix):
            raise UsageError(f"--output-prefix {self.output_prefix}: the output is the input")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(RetokenizeConfig, argv, prog="megakd retokenize", description=HELP)
    try:
        retokenize(config)
    except StoppedBySignal as stop:
        tell(f"{stop}; finished shards are kept: the same command continues")
        return ExitStatus.STOPPED
    return ExitStatus.COMPLETE


def retokenize(config: RetokenizeConfig) -> Manifest:
    """Retokenize; returns the new dataset's manifest.

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
        shard_tokens = config.shard_tokens or max(_LEAST_SHARD_TOKENS, dataset.num_tokens // _MAX_SHARDS)
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
            _check_counts(config, Counts(**{"tokens": 0, **done.parameters["counts"]}))
            return done
        folder = open_folder(root, fingerprint)
        settings = Settings(**{**asdict(settings), "choice": choice.as_dict(), "folder": str(folder)})
        ranges = document_ranges(dataset, shard_tokens)
        progress = _encode(config, settings, dataset, ranges, num_workers, stop)
        shards = [_require(read_shard(settings.folder, number, verify=False), number) for number in range(len(ranges))]
        counts = Counts()
        for shard in shards:
            counts.add(shard.counts)
        _check_budget(config, counts, _write_quarantine(config, shards))
        manifest = concatenate(
            [shard.part for shard in shards],
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


def _settings(config: RetokenizeConfig, fingerprint: str, num_workers: int) -> Settings:
    return Settings(
        prefix=config.input_prefix,
        fingerprint=fingerprint,
        source_type=config.source_tokenizer_type,
        source_model=config.source_tokenizer_model,
        source_vocab_size=config.source_vocab_size,
        target_type=config.tokenizer_type,
        target_model=config.tokenizer_model,
        target_eod_token=config.eod_token,
        append_eod=config.append_eod,
        choice={},
        folder="",
        max_resident_bytes=max(_RESIDENT_BYTES // num_workers, _RESIDENT_BYTES // 4),
    )


def _sample_texts(dataset: IndexedDataset, source: Tokenizer) -> list[str]:
    """The beginnings of some documents, spread over the dataset."""
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
    """Of all that decides the bytes of a shard."""
    content = {
        "megakd": __version__,
        "dataset": dataset.fingerprint,
        "tokenizers": [{key: value for key, value in each.items() if key != "path"} for each in (old, new)],
        "choice": choice.as_dict(),
        "flags": [config.append_eod, shard_tokens],
    }
    return xxhash.xxh3_128_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def _encode(
    config: RetokenizeConfig,
    settings: Settings,
    dataset: IndexedDataset,
    ranges: Sequence[tuple[int, int]],
    num_workers: int,
    stop: StopFlag,
) -> DocumentProgress:
    """Do the shards that an earlier run has not."""
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
            _check_still_possible(config, settings, dataset, bad + progress.bad, num_shards=len(ranges))

    def stopped() -> bool:
        progress.tick()
        return stop.is_set()

    try:
        with WorkerPool(_WORKER, asdict(settings), num_workers, stopped=stopped) as pool:
            pool.run(jobs, on_message)
    finally:
        progress.close()
    return progress


def _require(shard: Shard | None, number: int) -> Shard:
    if shard is None:
        raise UsageError(f"shard {number} was removed while the run went on; run again")
    return shard


def _write_quarantine(config: RetokenizeConfig, shards: Sequence[Shard]) -> Path:
    """List the documents whose text did not survive, in their order; without any, no such file is left."""
    path = Path(config.output_prefix + QUARANTINE)
    if not any(shard.bad_path for shard in shards):
        path.unlink(missing_ok=True)
        return path
    with HashingWriter(path) as out:
        for line in itertools.islice(_bad_lines(shards), LISTED):
            out.write(line)
        out.commit()
    return path


def _bad_lines(shards: Sequence[Shard]) -> Iterator[bytes]:
    for shard in shards:
        if shard.bad_path is not None:
            with open(shard.bad_path, "rb") as stream:
                yield from stream


def _check_still_possible(
    config: RetokenizeConfig, settings: Settings, dataset: IndexedDataset, num_bad: int, *, num_shards: int
) -> None:
    """Raise DataBudgetError once more documents are bad than are allowed of all that there are."""
    if num_bad <= (0.0 if config.strict else config.max_bad_fraction) * dataset.num_documents:
        return
    done = [read_shard(settings.folder, number, verify=False) for number in range(num_shards)]
    path = _write_quarantine(config, [shard for shard in done if shard is not None])
    listed = f"; some are in {path}" if path.exists() else ""
    raise DataBudgetError(
        f"the text of {num_bad} documents did not survive so far, more than {_allowance(config)} allows of the "
        f"{dataset.num_documents} that there are{listed}. Is it the tokenizer that made them "
        "(--source-tokenizer-model)? With a larger budget the same command continues from what is done"
    )


def _allowance(config: RetokenizeConfig) -> str:
    return "--strict" if config.strict else f"--max-bad-fraction {config.max_bad_fraction}"


def _check_counts(config: RetokenizeConfig, counts: Counts) -> None:
    """Raise DataBudgetError where a finished dataset has more than is allowed now."""
    if counts.bad_documents > (0.0 if config.strict else config.max_bad_fraction) * counts.documents:
        raise DataBudgetError(
            f"{config.output_prefix}: the text of {counts.bad_documents} of {counts.documents} documents did not "
            "survive when it was made, more than is allowed now"
        )


def _check_budget(config: RetokenizeConfig, counts: Counts, quarantine: Path) -> None:
    budget = 0.0 if config.strict else config.max_bad_fraction
    if counts.bad_documents > budget * counts.documents:
        with open(quarantine, "rb") as stream:
            first = orjson.loads(stream.readline())
        listed = "all" if counts.bad_documents <= LISTED else f"the first {LISTED}"
        raise DataBudgetError(
            f"the text of {counts.bad_documents} of {counts.documents} documents does not survive, more than "
            f"{_allowance(config)} allows: {counts.undecodable} were not all text, {counts.normalised} are normalised "
            f"by the new tokenizer; {listed} are in {quarantine}; the first is document {first['document']}: "
            f"{first['reason']} {first['detail']}. With a larger budget the same command finishes from what is done"
        )
