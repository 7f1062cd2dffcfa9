"""``megakd merge``: join indexed datasets into one, in bounded memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.artefacts.durable_files import make_parent
from megakd.artefacts.manifest import Manifest, say_complete
from megakd.config.tree import option, parse
from megakd.data.indexed.dataset import IndexedDataset, concatenate
from megakd.data.indexed.finished import find_dataset
from megakd.data.indexed.idx_format import bin_path, bytes_path, idx_path
from megakd.errors import ExitStatus, MismatchError, NoSpaceError, UsageError
from megakd.work.console import tell
from megakd.work.progress import ByteProgress

HELP = "join indexed datasets into one"


@dataclass(frozen=True)
class MergeConfig:
    """Flags of ``megakd merge``."""

    output_prefix: str = option(..., "dataset to write, without .bin or .idx", common=True)
    input: str | None = option(None, "folder whose datasets are joined, in the order of their names", common=True)
    input_prefix: list[str] | None = option(None, "datasets to join, in this order", common=True)

    def validate(self) -> None:
        """Raise UsageError unless the inputs are named in exactly one way."""
        if (self.input is None) == (self.input_prefix is None):
            raise UsageError("give either --input DIR or --input-prefix PREFIX...")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(MergeConfig, argv, prog="megakd merge", description=HELP)
    output = Path(config.output_prefix)
    inputs = [Path(p) for p in config.input_prefix or []] if config.input is None else _list(Path(config.input), output)
    manifest = merge(inputs, output)
    counts = manifest.parameters["dataset"]
    tell(
        f"{output}: {len(inputs)} datasets, {counts['num_documents']} documents, {counts['num_tokens']} tokens, "
        f"fingerprint {manifest.fingerprint}",
        on="stdout",
    )
    return ExitStatus.COMPLETE


def merge(inputs: Sequence[Path], output: Path) -> Manifest:
    """Join the datasets at the prefixes ``inputs`` in this order.

    Raises UsageError, MismatchError or CorruptError for inputs that cannot be joined, MismatchError for a different
    dataset at ``output``, NoSpaceError, before anything is written, where the disk has too little room.
    """
    if output.resolve() in [prefix.resolve() for prefix in inputs]:
        raise UsageError(f"{output}: the output is one of the inputs")
    make_parent(output)
    datasets = [IndexedDataset(prefix) for prefix in inputs]
    inputs = [dataset.prefix for dataset in datasets]
    for dataset in datasets:
        dataset.check()
    if len({dataset.dtype for dataset in datasets}) > 1:
        listing = "\n".join(f"  {dataset.prefix}: {dataset.dtype}" for dataset in datasets)
        raise MismatchError(f"datasets of different token dtypes:\n{listing}")
    parents = {f"input {number}": dataset.fingerprint for number, dataset in enumerate(datasets)}
    tokenizer = _common_tokenizer(datasets)
    num_bytes = sum(bin_path(prefix).stat().st_size for prefix in inputs)
    killed = bin_path(output).exists() and bin_path(output).stat().st_size == num_bytes
    done = find_dataset(
        output, parameters={}, parents=parents, tokenizer=tokenizer, flag="--output-prefix", unfinished=killed
    )
    if done is not None:
        say_complete(output)
        return done
    needed = sum(path(prefix).stat().st_size for prefix in inputs for path in (bin_path, idx_path))
    without = [str(dataset.prefix) for dataset in datasets if not dataset.has_text_bytes]
    if 0 < len(without) < len(datasets):
        tell(
            f"warning: {', '.join(without[:4])}{', ...' if len(without) > 4 else ''}: no bytes of text are recorded, "
            f"so {output} records none: evaluation leaves bits per byte out"
        )
    elif not without:
        needed += sum(bytes_path(prefix).stat().st_size for prefix in inputs)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise NoSpaceError(f"{output}: the joined dataset takes {needed} bytes, {free} are free")
    with ByteProgress(num_bytes, what="merge") as bar:
        return concatenate(
            inputs,
            output,
            parents=parents,
            tokenizer=tokenizer,
            progress=bar.update,
        )


def _list(folder: Path, output: Path) -> list[Path]:
    """The prefixes of the datasets in a folder, sorted, without the output of an earlier run."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    prefixes = sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in (".bin", ".idx")})
    prefixes = [prefix for prefix in prefixes if prefix.resolve() != output.resolve()]
    if not prefixes:
        raise UsageError(f"{folder}: no .bin and .idx files")
    return prefixes


def _common_tokenizer(datasets: Sequence[IndexedDataset]) -> Mapping[str, Any] | None:
    """The tokenizer of all the datasets; None unless every one records it."""
    tokenizers = [None if dataset.manifest is None else dataset.manifest.tokenizer for dataset in datasets]
    known = {tokenizer["hash"]: dataset for tokenizer, dataset in zip(tokenizers, datasets) if tokenizer is not None}
    if len(known) > 1:
        listing = "\n".join(f"  {dataset.prefix}: tokenizer {hashed}" for hashed, dataset in known.items())
        raise MismatchError(f"datasets made with different tokenizers:\n{listing}")
    return tokenizers[0] if tokenizers and None not in tokenizers else None
