"""``megakd import-miniplm``: MiniPLM's shards as a dataset, and its scores of them.

MiniPLM's index differs from Megatron's in two things: documents are never closed (the document indices are ``[0]``),
so that Megatron refuses it, and the dtype codes 6 and 7 are swapped. Its sequences are instances that are cut already:
each becomes a document, and a sample under the packing ``document``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakd.artefacts.durable_files import hash_file
from megakd.artefacts.manifest import Manifest, say_complete
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import option, parse
from megakd.data.indexed.concatenate import TokenFile, concatenate, write_lengths
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.finished import find_dataset
from megakd.data.indexed.idx_format import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    bin_path,
    check_arrays,
    check_ends,
    idx_path,
)
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer
from megakd.data.tokenizers.recorded import recorded_tokenizer
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.pipeline.miniplm.scores import MaskPolicy, import_scores
from megakd.work.console import tell
from megakd.work.progress import ByteProgress

HELP = "turn MiniPLM's shards and scores into a dataset and scores"
_FLOATS = {6: "float32", 7: "float64"}


@dataclass(frozen=True)
class ImportConfig:
    """The shards to import, or scores of a dataset that was imported before, or both."""

    output_prefix: str = option(
        ..., "prefix of the dataset, without .bin or .idx: written from --input-prefix, else read"
    )
    input_prefix: str | None = option(
        None, "prefix of the shards: DIR/SPLIT for DIR/SPLIT_0.bin, DIR/SPLIT_0.idx, ...", common=True
    )
    tokenizer_type: TokenizerType | None = option(None, "the tokenizer of the shards, to record it", common=True)
    tokenizer_model: str | None = option(None, "file or folder of the tokenizer", common=True)
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer, its end of document not counted")
    scores: str | None = option(None, "folder with scores_0.pt, scores_1.pt, ..., or one .pt file", common=True)
    scores_output: str | None = option(None, "folder to write these scores to", common=True)
    scores_mask_policy: MaskPolicy = option(
        "skip_after_eod", "scored positions: all, or all but those behind an end of document", common=True
    )
    seq_length: int = option(1024, "tokens of one sample: MiniPLM's max_length less one", common=True)
    eod: int | None = option(None, "end-of-document id, if no tokenizer is recorded")

    def validate(self) -> None:
        """Raise UsageError for flags that do not go together."""
        if self.input_prefix is None and self.scores is None:
            raise UsageError("nothing to import: give --input-prefix DIR/SPLIT, or --scores DIR, or both")
        if (self.scores is None) != (self.scores_output is None):
            raise UsageError("--scores and --scores-output go together")
        if self.input_prefix is None and self.tokenizer_type is not None:
            raise UsageError("--tokenizer-type is recorded with shards, and there is no --input-prefix")
        if self.seq_length < 1:
            raise UsageError(f"--seq-length {self.seq_length}: expected at least 1")
        if self.eod is not None and self.eod < 0:
            raise UsageError(f"--eod {self.eod}: expected a token id, 0 or more; without one, --scores-mask-policy all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(ImportConfig, argv, prog="megakd import-miniplm", description=HELP)
    output = Path(config.output_prefix)
    if config.input_prefix is not None:
        tokenizer = None
        if config.tokenizer_type is not None:
            tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model, vocab_size=config.vocab_size)
        manifest = import_shards(Path(config.input_prefix), output, tokenizer)
        counts = manifest.parameters["dataset"]
        tell(
            f"{output}: {len(manifest.parents)} shards, {counts['num_documents']} instances, {counts['num_tokens']} "
            f"tokens, fingerprint {manifest.fingerprint}",
            on="stdout",
        )
    if config.scores is not None and config.scores_output is not None:
        dataset = IndexedDataset(output)
        eod = config.eod if config.eod is not None else (recorded_tokenizer(dataset) or {}).get("eod")
        manifest = import_scores(
            Path(config.scores),
            dataset,
            Path(config.scores_output),
            seq_length=config.seq_length,
            mask_policy=config.scores_mask_policy,
            eod=eod,
        )
        tell(
            f"{config.scores_output}: {manifest.parameters['num_samples']} scores, fingerprint {manifest.fingerprint}",
            on="stdout",
        )
    return ExitStatus.COMPLETE


def import_shards(source: Path, output: Path, tokenizer: Tokenizer | None) -> Manifest:
    """Join the shards ``<source>_0``, ``<source>_1``, ... into one dataset whose documents are the instances.

    Raises UsageError if there are no shards, CorruptError for a missing or damaged one, MismatchError for ids beyond
    the tokenizer's.
    """
    prefixes = _find_shards(source)
    if output.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise UsageError(f"{output}: the output is one of the shards")
    with (
        RunLock(Path(f"{output}.lock")),
        tempfile.TemporaryDirectory(prefix=f"{output.name}.work-", dir=output.parent) as folder,
    ):
        opened = [_open_shard(prefix, Path(folder)) for prefix in prefixes]
        dtypes = {dtype for _, dtype in opened}
        if len(dtypes) > 1:
            listing = "\n".join(f"  {prefix}: {dtype}" for prefix, (_, dtype) in zip(prefixes, opened))
            raise MismatchError(f"shards of different token dtypes:\n{listing}")
        dtype = dtypes.pop()
        parameters = {"imported_from": "MiniPLM"}
        parents = {f"shard {i}": f"idx:{hash_file(idx_path(p)).xxh3_128}" for i, p in enumerate(prefixes)}
        described = None if tokenizer is None else tokenizer.describe()
        num_bytes = sum(part.bin_path.stat().st_size for part, _ in opened)
        done = find_dataset(
            output,
            parameters=parameters,
            parents=parents,
            tokenizer=described,
            flag="--output-prefix",
            unfinished=bin_path(output).exists() and bin_path(output).stat().st_size == num_bytes,
        )
        if done is not None:
            say_complete(output)
            return done
        with ByteProgress(num_bytes, what="import") as bar:
            return concatenate(
                [part for part, _ in opened],
                output,
                dtype=dtype,
                parameters=parameters,
                parents=parents,
                tokenizer=described,
                progress=bar.update,
            )


def _find_shards(source: Path) -> list[Path]:
    """Prefixes of the shards from number 0 on. A gap is an error: MiniPLM's reader drops the shards behind it."""
    if not source.parent.is_dir():
        raise UsageError(f"--input-prefix {source}: no folder {source.parent}")
    pattern = re.compile(re.escape(source.name) + r"_(\d+)\.(bin|idx)")
    matches = [match for path in source.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    numbers = sorted({int(match[1]) for match in matches})
    prefixes = [source.with_name(f"{source.name}_{number}") for number in numbers]
    # MiniPLM's builder leaves an empty .bin without an index behind if the last shard is exactly full.
    if prefixes and not idx_path(prefixes[-1]).exists() and bin_path(prefixes[-1]).stat().st_size == 0:
        del prefixes[-1], numbers[-1]
    if not prefixes:
        raise UsageError(f"--input-prefix {source}: no {source.name}_0.bin and {source.name}_0.idx")
    for number in range(numbers[-1] + 1):
        for path in (idx_path, bin_path):
            file = path(source.with_name(f"{source.name}_{number}"))
            if not file.is_file():
                raise CorruptError(
                    f"{file}: missing; there are shards up to number {numbers[-1]}, so the corpus has a hole"
                )
    return prefixes


def _open_shard(prefix: Path, folder: Path) -> tuple[TokenFile, np.dtype[Any]]:
    """Check a shard's index, and write its lengths to ``folder`` for `concatenate`."""
    path = idx_path(prefix)
    size_bytes = path.stat().st_size
    if size_bytes < HEADER.size:
        raise CorruptError(f"{path}: {size_bytes} bytes, the header alone has {HEADER.size}")
    index = np.memmap(path, np.uint8, "r")
    magic, version, code, num_sequences, num_document_indices = HEADER.unpack(index[: HEADER.size].tobytes())
    if (magic, version) != (MAGIC, VERSION):
        raise CorruptError(f"{path}: starts with {magic!r}, version {version}: expected {MAGIC!r}, {VERSION}")
    if code in _FLOATS:
        raise UsageError(f"{path}: dtype code {code} is MiniPLM's {_FLOATS[code]}; token ids are integers")
    if code not in CODES:
        raise CorruptError(f"{path}: dtype code {code}, expected one of {sorted(CODES)}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_document_indices
    if size_bytes != expected or num_document_indices not in (1, num_sequences + 1):
        raise CorruptError(
            f"{path}: {size_bytes} bytes; {num_sequences} sequences and {num_document_indices} document indices make "
            f"{expected}, and MiniPLM has 1 of the latter"
        )
    dtype = CODES[code]
    lengths = np.frombuffer(index, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(index, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    whole = np.array([0, num_sequences], dtype=np.int64)
    check_ends(path, dtype, lengths, pointers, whole, bin_path(prefix).stat().st_size)
    check_arrays(path, dtype, lengths, pointers, whole)
    part = TokenFile(bin_path(prefix), folder / f"{prefix.name}.lengths.npy")
    write_lengths(part.lengths_path, lengths)
    return part, dtype
