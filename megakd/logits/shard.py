"""One shard of a logits store: the records of a fixed range of samples, with their offsets and hashes.

``NAME.rows`` holds the records one after the other, ``NAME.index`` offsets, hashes and code lengths, ``NAME.json`` the
manifest, written last. See docs/formats.md.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter, hash_file
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.codec import (
    CODE_LENGTHS,
    READ_AHEAD,
    ROWS_FOR_CODES,
    RowDecoder,
    RowEncoder,
    RowFormat,
    Rows,
    empty_rows,
)

FORMAT, VERSION, READABLE = "megakd-logits-shard", 2, (1, 2)
REPAIR = "restore the file, or `megakd verify --drop-damaged STORE` and the capture's command again"


class ShardWriter:
    """Writer of one shard, ``folder/NAME.*``. Equal samples give equal bytes, whoever writes them.

    samples: first sample, and the one after the last. They are added in rising order; those left out have no targets.
    parameters, parents, tokenizer: recorded in the manifest.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        samples: tuple[int, int],
        row_format: RowFormat,
        frequency_ranks: NDArray[np.int32],
        parameters: Mapping[str, Any],
        parents: Mapping[str, str],
        tokenizer: Mapping[str, Any] | None,
        rows_for_codes: int = ROWS_FOR_CODES,
    ) -> None:
        self._folder, self._name = folder, name
        self._first, self._stop = samples
        self._next = self._first
        self._parameters, self._parents, self._tokenizer = parameters, parents, tokenizer
        self._encoder = RowEncoder(row_format, frequency_ranks, rows_for_codes=rows_for_codes)
        self._context_hashes = np.zeros(self._stop - self._first, np.uint64)
        self._num_rows = self._num_samples = 0

    def add(self, sample_id: int, input_ids: NDArray[Any], rows: Rows) -> None:
        """Add the rows of a sample, one for each of its input ids: row *j* is about the token after token *j*.

        Raises UsageError for samples out of order or rows that cannot be stored; then nothing was taken.
        """
        if not self._next <= sample_id < self._stop:
            raise UsageError(
                f"sample {sample_id}: shard {self._name} has samples {self._first} to {self._stop - 1}, in rising "
                f"order, and stands at {self._next}"
            )
        if len(input_ids) != rows.num_rows:
            raise UsageError(f"sample {sample_id}: {rows.num_rows} rows for {len(input_ids)} input ids")
        while self._next < sample_id:
            self._add_without_targets()
        try:
            self._encoder.add(rows)
        except UsageError as error:
            raise UsageError(f"sample {sample_id}: {error}") from error
        self._context_hashes[sample_id - self._first] = context_hash(input_ids)
        self._next += 1
        self._num_rows += rows.num_rows
        self._num_samples += 1

    def commit(self) -> Manifest:
        """Make the shard durable under its name.

        Raises NoSpaceError if the disk is full, UsageError if another process writes the shard.
        """
        while self._next < self._stop:
            self._add_without_targets()
        encoded = self._encoder.finish()
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest_path = self._folder / f"{self._name}.json"
        manifest_path.unlink(missing_ok=True)
        with HashingWriter(self._folder / f"{self._name}.rows") as writer:
            writer.write(encoded.payload.data)
            files = [writer.commit()]
        offsets = encoded.offsets.tolist()
        hashes = [xxhash.xxh3_64_intdigest(encoded.payload[a:b].data) for a, b in itertools.pairwise(offsets)]
        with HashingWriter(self._folder / f"{self._name}.index") as writer:
            for array in (encoded.offsets, np.array(hashes, np.uint64), self._context_hashes):
                writer.write(array.astype("<u8").data)
            writer.write(encoded.code_lengths.data)
            files.append(writer.commit())
        counts = {"rows": self._num_rows, "samples_with_targets": self._num_samples}
        return write_manifest(
            manifest_path,
            format=FORMAT,
            version=VERSION,
            parameters={**self._parameters, "samples": [self._first, self._stop], **counts},
            parents=self._parents,
            tokenizer=self._tokenizer,
            files=files,
        )

    def _add_without_targets(self) -> None:
        self._encoder.add(None)
        self._next += 1


class Shard:
    """A shard open for reading, from any number of threads.

    path: its manifest. ids_of_ranks: int32 ``[V]``, the id of each frequency rank. repair: advice for messages about
    damage.

    Raises CorruptError for files that are missing, cut or damaged (records are checked when they are read),
    MismatchError for another format.
    """

    def __init__(
        self, path: Path, row_format: RowFormat, ids_of_ranks: NDArray[np.int32], *, repair: str = REPAIR
    ) -> None:
        self.path, self._repair = path, repair
        self.manifest = read_manifest(path, format=FORMAT, version=READABLE)
        self._first, stop = (int(bound) for bound in self.manifest.parameters["samples"])
        count = stop - self._first
        rows_file, index_file = self.manifest.files
        index_path = path.parent / index_file.name
        index_bytes = 8 * (3 * count + 1) + CODE_LENGTHS
        if count < 0 or index_file.size_bytes != index_bytes or rows_file.size_bytes < READ_AHEAD:
            raise CorruptError(f"{index_path}: {index_file.size_bytes} bytes, {count} samples take {index_bytes}")
        if hash_file(index_path).xxh3_128 != index_file.xxh3_128:
            raise CorruptError(f"{index_path}: it is not what was written: {repair}")
        arrays = np.fromfile(index_path, "<u8", 3 * count + 1)
        self._offsets, hashes = arrays[: count + 1], arrays[count + 1 :]
        self._record_hashes, self._context_hashes = hashes[:count].tolist(), hashes[count:].tolist()
        code_lengths = np.fromfile(index_path, np.uint8, offset=8 * (3 * count + 1))
        # Read, not mapped: a page fault would hold up every thread of the process, and a file that is cut while it is
        # mapped would kill the process.
        self._rows = open(path.parent / rows_file.name, "rb", buffering=0)
        self._rows_bytes = rows_file.size_bytes
        self._decoder = RowDecoder(row_format, ids_of_ranks, code_lengths)

    def record(self, sample_id: int) -> NDArray[np.uint8] | None:
        """Read the bytes of a sample's record and ``READ_AHEAD`` more; None if it has no targets.

        Raises CorruptError if the bytes are not those that were written.
        """
        at = sample_id - self._first
        begin, end = int(self._offsets[at]), int(self._offsets[at + 1])
        if begin == end:
            return None
        if not begin < end <= self._rows_bytes - READ_AHEAD:
            raise CorruptError(f"{self.path}: sample {sample_id} is said to be in bytes {begin} to {end}")
        record = np.frombuffer(os.pread(self._rows.fileno(), end - begin + READ_AHEAD, begin), np.uint8)
        if xxhash.xxh3_64_intdigest(record[: end - begin].data) != self._record_hashes[at]:
            raise CorruptError(
                f"{self._rows.name}: the record of sample {sample_id} (bytes {begin} to {end}) is not what was "
                f"written: {self._repair}"
            )
        return record

    def size(self, record: NDArray[np.uint8]) -> tuple[int, int]:
        """Read the number of rows of a record, and the largest number of ids in a row."""
        return self._decoder.size(record)

    def decode(self, sample_id: int, record: NDArray[np.uint8], input_ids: NDArray[Any], out: Rows) -> None:
        """Decode the rows of a sample into arrays with room for them, if the student's context is the teacher's.

        input_ids: the ids that the student sees; those after the end of the sample may be any.

        Raises MismatchError for another context, CorruptError for a damaged record.
        """
        num_rows, _ = self.size(record)
        actual = context_hash(input_ids[:num_rows])
        expected = self._context_hashes[sample_id - self._first]
        if actual != expected:
            raise MismatchError(
                f"{self.path}: sample {sample_id} was captured with other input ids (the {num_rows} hash to "
                f"{expected:016x}, those {min(len(input_ids), num_rows)} read now to {actual:016x}): this store is of "
                "another dataset or packing"
            )
        try:
            self._decoder.decode_into(record, out)
        except CorruptError as error:
            raise CorruptError(f"{self._rows.name}: sample {sample_id}: {error}") from error

    def read(self, sample_id: int, input_ids: NDArray[Any]) -> Rows | None:
        """Read the rows of a sample; None if it has no targets. Raises as `record` and `decode` do."""
        record = self.record(sample_id)
        if record is None:
            return None
        num_rows, most_ids = self.size(record)
        rows = empty_rows((num_rows,), most_ids)
        self.decode(sample_id, record, input_ids, rows)
        return rows

    def has_targets(self, sample_id: int) -> bool:
        """Return whether the sample has targets."""
        at = sample_id - self._first
        return bool(self._offsets[at] != self._offsets[at + 1])


def context_hash(input_ids: NDArray[Any]) -> int:
    """XXH3-64 hash of input ids as little-endian int32."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(input_ids, dtype="<i4").data)
