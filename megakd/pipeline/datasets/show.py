"""``megakd show``: descriptions of datasets, in numbers and in text, and of other artefacts and runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.config.tree import option, parse
from megakd.data.indexed.data_path import prefixes_in
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.idx_format import idx_path
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer, same_tokenizer
from megakd.data.tokenizers.recorded import end_as_recorded
from megakd.errors import ExitStatus, MismatchError, UsageError
from megakd.model.checkpoint.damage import MANIFEST as CHECKPOINT
from megakd.pipeline.datasets.describe import describe_artefact, flat, nested
from megakd.pipeline.datasets.show_run import describe_run
from megakd.pipeline.datasets.verify import existing_manifests, find_manifests
from megakd.run_folder.record import is_run

HELP = "print what a dataset, scores, a selection, a training run or another artefact holds"
_BAR = 40
_TOKENS_SHOWN = 64


@dataclass(frozen=True)
class ShowConfig:
    """Flags of ``megakd show``."""

    prefix: str = option(
        ...,
        "dataset prefix, folder of scores, a selection, a logits store, a training run, any manifest",
        positional=True,
    )
    documents: int = option(0, "number of documents of which the first tokens are printed", common=True)

    tokenizer_type: TokenizerType | None = option(None, "tokenizer by which documents are shown as text", common=True)
    tokenizer_model: str | None = option(None, "file or folder of the tokenizer", common=True)
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer", common=True)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if self.documents < 0:
            raise UsageError(f"--documents {self.documents}: expected at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(ShowConfig, argv, prog="megakd show", description=HELP)
    manifests = [] if idx_path(config.prefix).exists() else existing_manifests(config.prefix)
    run = is_run(Path(config.prefix))
    if not manifests and not run and Path(config.prefix).is_dir() and not prefixes_in(config.prefix):
        find_manifests(config.prefix)  # raises an error that names what could lie there
    shown = [path for path in manifests if path.name == "manifest.json" or not path.name.endswith(".manifest.json")]
    if run:  # its description has a line for its checkpoints
        shown = [path for path in shown if path.name != CHECKPOINT]
    if shown or run:
        if config.documents or config.tokenizer_type is not None:
            raise UsageError(f"{config.prefix}: --documents and --tokenizer-type show a dataset, which this is not")
        lines = describe_run(Path(config.prefix)) if run else []
        print("\n".join([*lines, *(line for path in shown for line in describe_artefact(path))]))
        return ExitStatus.COMPLETE
    dataset = IndexedDataset(config.prefix)
    tokenizer = None
    if config.tokenizer_type is not None:
        tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model, vocab_size=config.vocab_size)
        _check_tokenizer(dataset, tokenizer)
    print("\n".join(describe(dataset)))
    for document in range(min(config.documents, dataset.num_documents)):
        print(f"document {document}: {preview(dataset.document(document), tokenizer)}")
    return ExitStatus.COMPLETE


def describe(dataset: IndexedDataset) -> list[str]:
    """Describe a dataset: counts, provenance and the distribution of document lengths, a line each."""
    manifest = dataset.manifest
    rows: list[tuple[str, object]] = [
        ("documents", dataset.num_documents),
        ("sequences", dataset.num_sequences),
        ("tokens", dataset.num_tokens),
        ("dtype", dataset.dtype.name),
        ("largest token id", "not recorded" if dataset.max_token_id is None else dataset.max_token_id),
        ("bytes of text", _text_bytes(dataset)),
        ("fingerprint", dataset.fingerprint),
    ]
    if manifest is not None:
        rows += [("tokenizer", flat(manifest.tokenizer) if manifest.tokenizer else "not recorded")]
        rows += [(f"parent {name}", fingerprint) for name, fingerprint in manifest.parents.items()]
        for name, value in manifest.parameters.items():
            rows += nested(name, value) if name != "dataset" else ()
    lines = [f"{name:<18} {value}" for name, value in rows]
    return lines + histogram(document_lengths(dataset))


def _text_bytes(dataset: IndexedDataset) -> str:
    sizes = dataset.text_bytes
    if sizes is None:
        return "not recorded"
    total = int(sizes.sum())
    return f"{total} ({total / max(dataset.num_tokens, 1):.2f} a token, {total / max(len(sizes), 1):.1f} a document)"


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """``[num_documents]`` int64: tokens per document."""
    ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])
    return np.diff(ends[dataset.document_indices])


def histogram(lengths: NDArray[np.int64]) -> list[str]:
    """Histogram of document lengths by powers of two, empty documents apart, a line for each class that occurs."""
    if not len(lengths):
        return []
    lines = [
        "tokens a document:",
        f"  least {lengths.min()}, median {int(np.median(lengths))}, mean {lengths.mean():.1f}, most {lengths.max()}",
    ]
    # frexp's exponent of n is the number of its binary digits, exactly, for every int32.
    classes = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    for digits in np.flatnonzero(classes).tolist():
        low, high = (0, 0) if digits == 0 else (1 << (digits - 1), (1 << digits) - 1)
        share = classes[digits] / len(lengths)
        lines.append(f"  {low:>10} to {high:<10} {classes[digits]:>12}  {'#' * round(_BAR * share)}")
    return lines


def preview(tokens: NDArray[Any], tokenizer: Tokenizer | None) -> str:
    """The beginning of a document, as text where there is a tokenizer, else as ids."""
    ids = tokens[:_TOKENS_SHOWN].tolist()
    text = repr(tokenizer.decode(ids)) if tokenizer is not None else " ".join(map(str, ids))
    return text + (f" ... ({len(tokens)} tokens)" if len(tokens) > _TOKENS_SHOWN else "")


def _check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    recorded = None if dataset.manifest is None else dataset.manifest.tokenizer
    end_as_recorded(tokenizer, recorded or {})
    if recorded is not None and not same_tokenizer(recorded, tokenizer):
        raise MismatchError(
            f"{dataset.prefix}: made with the tokenizer {flat(recorded)}; the one given is {flat(tokenizer.describe())}"
        )
    recorded_largest = dataset.max_token_id
    largest = int(dataset.tokens.max(initial=0)) if recorded_largest is None else recorded_largest
    if largest >= tokenizer.vocab_size:
        raise MismatchError(f"{dataset.prefix}: token id {largest}, the tokenizer has {tokenizer.vocab_size} entries")
