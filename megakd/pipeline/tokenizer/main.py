"""``megakd tokenizer``: a tokenizer trained on the text that ``megakd preprocess`` is going to read.

The trainers, in `training`, run in one thread on a sample that depends on the inputs and ``--max-bytes`` alone, so the
same command gives the same file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megakd.artefacts.durable_files import HashingWriter, fsync_directory
from megakd.artefacts.manifest import read_manifest, write_manifest
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import option, parse
from megakd.data.text.inputs import Input, distinct_names, find_inputs
from megakd.data.text.records import Lines, RecordError, parse_texts
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import DataBudgetError, ExitStatus, StoppedBySignal, UsageError
from megakd.pipeline.tokenizer.training import TRAINERS, TrainerType
from megakd.work.console import tell
from megakd.work.stop import StopFlag

HELP = "train a tokenizer on JSON lines, for preprocess"
_FORMAT, _FORMAT_VERSION = "tokenizer", 1
_MANIFEST = "tokenizer.manifest.json"
_STRETCH_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerConfig:
    """Flags of ``megakd tokenizer``."""

    input: list[str] = option(..., "JSON lines files: plain, .gz or .zst; globs in quotes are expanded in sorted order")
    output: str = option(..., "folder to make, for --tokenizer-model: the model and its manifest")
    vocab_size: int = option(32000, "number of ids, special tokens included", common=True)
    type: TrainerType = option(
        "byte-bpe",
        "algorithm; byte-bpe makes a HuggingFaceTokenizer, the others a SentencePieceTokenizer",
        common=True,
    )
    json_keys: list[str] = option(["text"], "keys whose texts are learnt from", common=True)
    max_bytes: int = option(
        100 << 20, "bytes of text to learn from; longer inputs are sampled, in stretches all over them", common=True
    )
    eod_token: str = option("<|endoftext|>", "special token that ends a document", common=True)
    special_tokens: list[str] = option([], "more special tokens, which no text of a corpus becomes")
    split_digits: bool = option(False, "make each digit a token of its own", common=True)
    max_bad_fraction: float = option(
        0.001, "fraction of records that may be bad; with more, exit status 3", common=True
    )
    max_doc_bytes: int = option(4 << 20, "bytes of the longest line; a longer one is a bad record", common=True)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        specials = [self.eod_token, *self.special_tokens]
        if self.vocab_size < 256 + len(specials) + 1:
            raise UsageError(
                f"--vocab-size {self.vocab_size}: expected at least {257 + len(specials)}: 256 bytes, the special "
                "tokens and something to learn"
            )
        if len(set(specials)) != len(specials) or not all(specials):
            raise UsageError(
                f"--eod-token, --special-tokens {' '.join(specials)}: expected different texts, none empty"
            )
        if min(self.max_bytes, self.max_doc_bytes) < 1:
            raise UsageError(f"--max-bytes {self.max_bytes}, --max-doc-bytes {self.max_doc_bytes}: expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"--max-bad-fraction {self.max_bad_fraction}: expected a fraction from 0 to 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        TokenizerConfig,
        argv,
        prog="megakd tokenizer",
        description="Train a tokenizer that loses nothing: what is not in the vocabulary is written in bytes, and "
        "nothing is normalised. byte-bpe joins the commonest pairs of bytes inside words and cuts numbers into groups "
        "of three digits; sentencepiece-bpe and sentencepiece-unigram work on characters (to them U+2581 is a space). "
        "The inputs are those of 'megakd preprocess', which takes the result as --tokenizer-model FOLDER. The same "
        "command gives the same files, and leaves what is there alone.",
    )
    try:
        train(config)
    except StoppedBySignal as stop:
        tell(f"{stop}; nothing was written")
        return ExitStatus.STOPPED
    return ExitStatus.COMPLETE


def train(config: TokenizerConfig) -> Path:
    """Train the tokenizer; returns its folder, which is whole or absent.

    Raises UsageError, DataBudgetError for too many bad records, CorruptError for a damaged input, NoSpaceError,
    StoppedBySignal.
    """
    output = Path(os.path.abspath(config.output))
    with StopFlag() as stop, RunLock(output.with_name(output.name + ".lock")):
        inputs = find_inputs(config.input, own="")
        texts = _read_sample(config, inputs, stop)
        parameters = _parameters(config, inputs, texts)
        if _is_there(output, parameters):
            tell(f"{output} is there already, made from the same text with the same flags")
            return output
        num_bytes = parameters["sample"]["bytes"]
        tell(f"learning {config.vocab_size} ids from {len(texts)} texts, {num_bytes / 1e6:.1f} MB")
        trainer = TRAINERS[config.type]
        files = trainer.train(
            texts, config.vocab_size, [config.eod_token, *config.special_tokens], split_digits=config.split_digits
        )
        stop.check()
        _write(output, files, parameters)
        tokenizer = build_tokenizer(trainer.tokenizer_type, output)
        num_tokens = sum(len(ids) for ids in tokenizer.encode_arrays(texts[:200]))
        per_token = sum(len(text.encode()) for text in texts[:200]) / max(num_tokens, 1)
        tell(
            f"{output}: {tokenizer.vocab_size} ids, {per_token:.2f} bytes a token; {tokenizer.explain_eod()}\nnext: "
            f"megakd preprocess --tokenizer-type {trainer.tokenizer_type} --tokenizer-model {config.output} "
            "--append-eod --input ... --output-prefix ..."
        )
    return output


def _read_sample(config: TokenizerConfig, inputs: Sequence[Input], stop: StopFlag) -> list[str]:
    """Read the texts to learn from, stretch by stretch.

    Raises DataBudgetError for too many bad records, UsageError where there is no text.
    """
    texts: list[str] = []
    num_records = num_bad = 0
    first_bad = ""
    for item, start, size in _stretches(inputs, config.max_bytes):
        stop.check()
        lines = Lines(Path(item.path), item.kind, start=start, max_line_bytes=config.max_doc_bytes)
        for offset, line in lines:
            if offset >= start + size:
                break
            if line is not None and line.isspace():
                continue
            num_records += 1
            try:
                if line is None:
                    raise RecordError("too long", f"over --max-doc-bytes {config.max_doc_bytes}")
                texts += filter(None, parse_texts(line, config.json_keys))
            except RecordError as error:
                num_bad += 1
                first_bad = first_bad or f"{item.path} byte {offset}: {error.reason}: {error.detail[:200]}"
    if num_bad > config.max_bad_fraction * num_records:
        raise DataBudgetError(
            f"{num_bad} of {num_records} records are bad, more than --max-bad-fraction {config.max_bad_fraction} "
            f"allows; the first is {first_bad}"
        )
    if not texts:
        raise UsageError(f"--input {' '.join(config.input)[:200]}: no text in it")
    return texts


def _stretches(inputs: Sequence[Input], max_bytes: int) -> Iterator[tuple[Input, int, int]]:
    """Stretches to read: input, first byte and number of bytes.

    A small plain file is read whole, a large one in parts at equal distances, a compressed one, which cannot be entered
    elsewhere, from its beginning.
    """
    total = max(1, sum(item.size_bytes for item in inputs))
    for item in inputs:
        share = max(1, max_bytes * item.size_bytes // total)
        if item.kind != "plain" or share >= item.size_bytes:
            yield item, 0, share
            continue
        count = max(1, share // _STRETCH_BYTES)
        yield from ((item, number * item.size_bytes // count, share // count) for number in range(count))


def _parameters(config: TokenizerConfig, inputs: Sequence[Input], texts: Sequence[str]) -> dict[str, Any]:
    """Parameters that decide the result: the flags, and the text by its hash."""
    hashed, num_bytes = xxhash.xxh3_128(), 0
    for text in texts:
        data = text.encode()
        num_bytes += len(data)
        hashed.update(len(data).to_bytes(8, "little") + data)
    return {
        "type": config.type,
        "vocab_size": config.vocab_size,
        "eod_token": config.eod_token,
        "special_tokens": list(config.special_tokens),
        "split_digits": config.split_digits,
        "json_keys": list(config.json_keys),
        "max_bytes": config.max_bytes,
        "inputs": distinct_names(inputs),
        "sample": {"texts": len(texts), "bytes": num_bytes, "xxh3_128": hashed.hexdigest()},
    }


def _is_there(output: Path, parameters: dict[str, Any]) -> bool:
    """Return whether the folder holds the result. Raises UsageError where it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    refusal = f"--output {output}: is there already"
    if not (output / _MANIFEST).is_file():
        raise UsageError(f"{refusal}, and no tokenizer of this command; give another folder")
    manifest = read_manifest(output / _MANIFEST, format=_FORMAT, version=_FORMAT_VERSION)
    differences = manifest.differences(parameters, {}, None)
    if differences:
        raise UsageError(
            f"{refusal}, made otherwise: {'; '.join(differences)[:600]}; give another folder, or remove it"
        )
    return True


def _write(output: Path, files: dict[str, bytes], parameters: dict[str, Any]) -> None:
    """Make the folder under a temporary name, then rename it."""
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        records = []
        for name, content in files.items():
            with HashingWriter(unfinished / name) as out:
                out.write(content)
                records.append(out.commit())
        write_manifest(
            unfinished / _MANIFEST,
            format=_FORMAT,
            version=_FORMAT_VERSION,
            parameters=parameters,
            parents={},
            files=records,
        )
        if output.is_dir():
            output.rmdir()
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    fsync_directory(output.parent)
