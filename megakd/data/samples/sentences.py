"""Sentence packing: samples cut back to the last end of a sentence, their starts an artefact beside the dataset.

MiniPLM's instances (arXiv 2410.17215): of the next ``seq_length + 1`` tokens, a sample is those up to the last one that
ends a sentence, and the rest belongs to what follows. A sentence ends with

- the end-of-document token, and a token with a line break;
- a token with one of ``. ! ? ;`` and no bracket left open, if it decodes, together with the next token, to text with a
  space in it.

Where no sentence ends in the window behind its first token, the whole window is the sample. What is left at the end
of the stream, no more than a window, is the last sample; of a single token, which would have no label, it is none.
Samples do not overlap: the first token of each is no label.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd import _csrc
from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.file_lock import NoLocksError, lock_stream, open_to_lock
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.ranges import RangeSamples
from megakd.data.tokenizer import Tokenizer, same_tokenizer
from megakd.data.tokenizers.recorded import recorded_tokenizer
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.work.console import tell

FORMAT, VERSION = "megakd-packing", 1
# The bits of a token's class, as in csrc/data/sentence_cuts.h.
ENDS_ALWAYS, ENDS_IF_SPACE, BRINGS_SPACE = 1, 2, 4
_MARKS = frozenset(".!?;")
_BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))
_CHUNK = 1 << 16


class SentenceSamples(RangeSamples):
    """The samples of a dataset whose packing was written by `write_sentences`, read from its mapped file.

    Raises UsageError where there is none, CorruptError for files that are not whole, MismatchError for the packing of
    another dataset.
    """

    packing = "sentence"

    def __init__(self, dataset: IndexedDataset, seq_length: int) -> None:
        path = manifest_path(dataset, seq_length)
        if not path.exists():
            raise UsageError(
                f"{path}: no sentence packing of seq_length {seq_length}; "
                f"`megakd pack {dataset.prefix} --seq-length {seq_length}` writes it"
            )
        self.manifest = read_manifest(path, format=FORMAT, version=VERSION)
        if self.manifest.parents["dataset"] != dataset.fingerprint:
            raise MismatchError(
                f"{path}: packing of dataset {self.manifest.parents['dataset']}, this is dataset "
                f"{dataset.fingerprint}; `megakd pack {dataset.prefix} --seq-length {seq_length}` writes it anew"
            )
        super().__init__(dataset, seq_length, int(self.manifest.parameters["num_samples"]))
        self._bounds: NDArray[np.int64] = np.memmap(_starts_path(path), "<i8", "r", shape=(self.num_samples + 1,))
        if self._bounds[0] != 0 or not 0 < self._bounds[-1] <= dataset.num_tokens:
            raise CorruptError(
                f"{_starts_path(path)}: samples from token {self._bounds[0]} to {self._bounds[-1]} of "
                f"{dataset.num_tokens}; delete {path} and write it anew"
            )

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self._bounds[self._checked(sample_ids)])

    def ends(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self._bounds[self._checked(sample_ids) + 1])


def open_sentences(
    dataset: IndexedDataset, seq_length: int, open_tokenizer: Callable[[], Tokenizer]
) -> SentenceSamples:
    """The samples, whose packing is written now where there is none, or that of what the dataset was before.

    Any number of processes may ask at once: one writes, the others wait for it. open_tokenizer: called by that one.
    """
    if samples := _try_open(dataset, seq_length):
        return samples
    path = manifest_path(dataset, seq_length)
    lock = path.with_suffix(".lock")
    with open_to_lock(lock) as stream:
        # Without locks all write the same, and the last one stays; who removed the file has written the packing.
        with contextlib.suppress(NoLocksError, FileNotFoundError):
            lock_stream(stream, lock, wait=True)
        if samples := _try_open(dataset, seq_length):
            return samples
        try:
            tokenizer = open_tokenizer()
            tell(f"writing the sentence packing {path}")
            write_sentences(dataset, seq_length, tokenizer)
        finally:
            lock.unlink(missing_ok=True)  # whoever still waits for it finds the packing, or fails as we did
    return SentenceSamples(dataset, seq_length)


def write_sentences(dataset: IndexedDataset, seq_length: int, tokenizer: Tokenizer) -> Manifest:
    """Cut the whole dataset, in constant memory; a pure function of the dataset, the tokenizer and ``seq_length``.

    Raises UsageError where there is no sample in the dataset, MismatchError for a tokenizer that is not its.
    """
    if not 1 <= seq_length < 1 << 31:
        raise UsageError(f"seq_length {seq_length}: expected at least 1 and less than 2^31")
    recorded = recorded_tokenizer(dataset)
    if recorded is not None and not same_tokenizer(recorded, tokenizer):
        raise MismatchError(f"{dataset.prefix}: made with tokenizer {recorded['hash']}, this one is {tokenizer.hash}")
    if dataset.num_tokens < 2:
        raise UsageError(f"{dataset.prefix}: {dataset.num_tokens} tokens do not make a sample; it takes 2")
    path = manifest_path(dataset, seq_length)
    path.unlink(missing_ok=True)
    num_samples, position = 0, 0
    classes = token_classes(tokenizer)
    with HashingWriter(_starts_path(path)) as writer:
        writer.write(np.zeros(1, dtype="<i8").data)
        bounds = np.zeros(_CHUNK, dtype=np.int64)
        while position < dataset.num_tokens:
            bounds[0] = position
            try:
                filled = _csrc.sentence_cuts(dataset.tokens, classes, seq_length + 1, bounds)
            except IndexError as error:
                raise MismatchError(f"{dataset.prefix}: {error}; it was made with another tokenizer") from error
            position = int(bounds[filled - 1])
            if position - bounds[filled - 2] < 2:
                filled -= 1  # the last token of the stream, alone
            writer.write(bounds[1:filled].astype("<i8").data)
            num_samples += filled - 1
        record = writer.commit()
    return write_manifest(
        path,
        format=FORMAT,
        version=VERSION,
        parameters={"packing": "sentence", "seq_length": seq_length, "num_samples": num_samples},
        parents={"dataset": dataset.fingerprint},
        tokenizer=tokenizer.describe(),
        files=[record],
    )


def token_classes(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """``[vocab_size]`` uint8: what each id is to a cut, bits as above, found by decoding every id.

    Two tokens decode to their two texts one after the other, except that the first one may lose a leading space.
    """
    classes = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
    probe = None
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if i == tokenizer.eod or "\n" in text:
            classes[i] = ENDS_ALWAYS
        elif not _MARKS.isdisjoint(text) and not _leaves_bracket_open(text):
            classes[i] = ENDS_ALWAYS if " " in text else ENDS_IF_SPACE
            if " " not in text:
                probe = i
    if probe is not None:
        for i in range(tokenizer.vocab_size):
            if " " in tokenizer.decode([probe, i]):
                classes[i] |= BRINGS_SPACE
    return classes


def manifest_path(dataset: IndexedDataset, seq_length: int) -> Path:
    """``<prefix>.sentence-<seq_length>.json``."""
    return Path(f"{os.fspath(dataset.prefix)}.sentence-{seq_length}.json")


def _starts_path(manifest: Path) -> Path:
    return manifest.with_suffix(".i64")


def _try_open(dataset: IndexedDataset, seq_length: int) -> SentenceSamples | None:
    try:
        return SentenceSamples(dataset, seq_length) if manifest_path(dataset, seq_length).exists() else None
    except MismatchError:
        return None


def _leaves_bracket_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in _BRACKETS)
