"""Budget of bad records: a run that can no longer keep it stops, and says what is wrong with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import orjson

from megakd.artefacts.manifest import printable
from megakd.data.corpus_shard import LISTED, WORTH_STOPPING_BYTES, write_quarantine
from megakd.data.text.decompress import most_bytes
from megakd.data.text.inputs import Input
from megakd.errors import DataBudgetError, UsageError
from megakd.pipeline.preprocess.config import PreprocessConfig
from megakd.pipeline.preprocess.shards import TextCounts, TextShard

_ALL_BAD = 1000  # bad records without a good one, at which a run stops, whatever is still to come


class Budget:
    """Counts of good and bad records so far, compared with ``--max-bad-fraction`` or ``--strict``.

    The number of records to come is not known, only a bound: a plain file holds no more than its bytes do if each
    record is as short as possible, a compressed file no more than its largest permitted size does.
    """

    def __init__(self, config: PreprocessConfig, inputs: Sequence[Input], shard_bytes: int) -> None:
        self._config, self._inputs, self._shard_bytes = config, inputs, shard_bytes
        self._documents = self._bad = 0
        self._left = {i: item.size_bytes for i, item in enumerate(inputs)}  # bytes on disk, by input
        self._read: dict[tuple[int, int], int] = {}
        self._listed: list[tuple[int, int, dict[str, Any]]] = []  # file, byte, and the record as it is listed
        # The shortest record, such as {"text":""} and a line end: a key has a colon, two quotes, and a comma or brace.
        self._shortest = 2 + sum(len(orjson.dumps(key)) + 4 for key in config.json_keys)

    def add_finished(self, file: int, shard: int, counts: TextCounts, *, ended: bool) -> None:
        """Count a shard of an earlier run. ended: True if the file ends with it."""
        self._documents += counts.documents
        self._bad += counts.bad_records
        self._pass(file, shard, self._shard_bytes, ended=ended)

    def add(self, job: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Count the records that a worker reported. Raises DataBudgetError once the budget cannot be kept."""
        file, shard = job["file"], job["shard"]
        self._documents += message["documents"]
        self._bad += message["bad_records"]
        self._pass(file, shard, message["position"], ended=message["ended"])
        for record in message["bad"][: LISTED - len(self._listed)]:
            # The line number in the file is not known in a later shard before the shards ahead of it are done.
            line = record["line"] if shard == 0 else None
            shown = {"file": printable(self._inputs[file].path), **record, "line": line}
            self._listed.append((file, record["byte_offset"], shown))
        self.check()

    def check(self) -> None:
        """Raise DataBudgetError if the budget cannot be kept, whatever the rest of the inputs holds."""
        left = sum(self._left.values())
        fraction, records = self._config.bad_budget, self._documents + self._bad
        if fraction < 1 and self._documents == 0 and self._bad >= _ALL_BAD and left:
            self._stop(f"the first {self._bad} records are all bad")
        if left > WORTH_STOPPING_BYTES and self._bad > fraction * (records + self._most_to_come()):
            self._stop(
                f"{self._bad} of {records} records are bad so far, more than {self._config.allowance} allows whatever "
                f"the {left / 1e6:.0f} MB hold that are left to read",
                "With a larger budget the same command continues from what is done",
            )

    def _pass(self, file: int, shard: int, position: int, *, ended: bool) -> None:
        """Subtract the bytes that were read from those that are left."""
        if self._inputs[file].kind != "plain":
            if ended:
                self._left[file] = 0  # until then its size is not known
            return
        extent = min(self._shard_bytes, max(self._inputs[file].size_bytes - shard * self._shard_bytes, 0))
        before = self._read.get((file, shard), 0)
        self._read[file, shard] = min(max(before, position), extent)
        self._left[file] -= self._read[file, shard] - before

    def _most_to_come(self) -> int:
        sizes = [(item, self._left[i]) for i, item in enumerate(self._inputs) if self._left[i]]
        num_bytes = sum(left if item.kind == "plain" else most_bytes(item.size_bytes) for item, left in sizes)
        # A worker has read at most one line more than it has counted, and the last line of a file may have no end.
        return num_bytes // self._shortest + 2 * len(self._read) + len(sizes)

    def _stop(self, what: str, way_out: str = "") -> NoReturn:
        if self._listed:
            records = [record for _, _, record in sorted(self._listed, key=lambda entry: entry[:2])]
            lines = (orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
            path = write_quarantine(self._config.output_prefix, lines)
            what += f"; {len(records)} of them are in {path}; the first is {_describe(records[0])}"
        raise DataBudgetError(". ".join(filter(None, [what, way_out])))


def list_bad_records(config: PreprocessConfig, paths: Sequence[str], shards: Sequence[Sequence[TextShard]]) -> Path:
    """List the first bad records of all shards, in the order of the inputs; without any, no such file is left."""
    lines = itertools.chain.from_iterable(_bad_lines(file, per_file) for file, per_file in zip(paths, shards))
    return write_quarantine(config.output_prefix, lines)


def check_counts(config: PreprocessConfig, counts: TextCounts) -> None:
    """Raise DataBudgetError if a finished dataset has more bad records than are allowed now."""
    records = counts.documents + counts.bad_records
    if counts.bad_records > config.bad_budget * records:
        raise DataBudgetError(
            f"{config.output_prefix}: {counts.bad_records} of {records} records were bad when it was made, more than "
            f"{config.allowance} allows"
        )


def check_budget(
    config: PreprocessConfig,
    counts: TextCounts,
    paths: Sequence[str],
    shards: Sequence[Sequence[TextShard]],
    quarantine: Path,
) -> None:
    """Compare the counts of all shards with the budget. quarantine: the list of bad records, quoted in messages.

    Raises DataBudgetError for more bad records than are allowed, UsageError where there is no document.
    """
    records, first = counts.documents + counts.bad_records, ""
    if counts.bad_records:
        with open(quarantine, "rb") as stream:
            first = _describe(orjson.loads(stream.readline()))
    if counts.bad_records <= config.bad_budget * records:
        if counts.documents == 0:
            why = f"; the first bad one is {first}" if first else ""
            raise UsageError(f"--input {' '.join(config.input)[:200]}: no document in {counts.lines} lines{why}")
        return
    listed = "all" if counts.bad_records <= LISTED else f"the first {LISTED}"
    if counts.documents == 0:
        raise DataBudgetError(
            f"every one of the {records} records is bad; {listed} are in {quarantine}; the first is {first}"
        )
    whole = [
        path
        for path, per_file in zip(paths, shards)
        if not any(shard.counts.documents for shard in per_file) and any(shard.counts.bad_records for shard in per_file)
    ]
    of_files = f"; every record of {', '.join(whole[:3])} is bad ({len(whole)} files in all)" if whole else ""
    raise DataBudgetError(
        f"{counts.bad_records} of {records} records are bad, more than {config.allowance} allows; {listed} are in "
        f"{quarantine}; the first is {first}{of_files}. With a larger budget the same command finishes from what is "
        "done"
    )


def _describe(record: Mapping[str, Any]) -> str:
    line = "" if record["line"] is None else f" line {record['line']}"
    return f"{record['file']}{line} byte {record['byte_offset']}: {record['reason']}: {record['detail']}"


def _bad_lines(file: str, shards: Sequence[TextShard]) -> Iterator[bytes]:
    lines_before = 0
    for shard in shards:
        for line in shard.bad_lines():
            record = orjson.loads(line)
            record["line"] += lines_before
            yield orjson.dumps({"file": printable(file), **record}, option=orjson.OPT_APPEND_NEWLINE)
        lines_before += shard.counts.lines
