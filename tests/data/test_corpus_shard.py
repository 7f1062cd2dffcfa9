"""Shards of a corpus: whole once they have their manifest, and absent or made again otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megakd.data.corpus_shard import ShardCounts, ShardFormat, ShardWriter, write_quarantine


@dataclass
class Counts(ShardCounts):
    bad: int = 0


FORMAT = ShardFormat("a-shard", 3, Counts)
COLUMNS = ("0", "1")


def write_shard(prefix: Path, bad: list[bytes], *, last: bool | None = None, with_bytes: bool = True) -> None:
    with ShardWriter(prefix, COLUMNS, np.dtype(np.uint16), with_bytes=with_bytes) as out:
        sizes = (np.array([20, 30]), np.array([7])) if with_bytes else (None, None)
        for column in (0, 1):
            out.add(column, np.arange(5), np.array([2, 3], np.int32), sizes[0])
        out.add(1, np.arange(0), np.array([0], np.int32), sizes[1])
        out.commit(FORMAT, Counts(documents=3, tokens=10, bad=len(bad)), bad, last=last)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "7", [b"one\n", b"two\n"], last=True)
    shard = FORMAT.read(tmp_path / "7", COLUMNS, verify=True)
    assert shard is not None and shard.last and shard.counts == Counts(documents=3, tokens=10, bad=2)
    assert [np.fromfile(file.bin_path, np.uint16).tolist() for file in shard.token_files] == [[0, 1, 2, 3, 4]] * 2
    assert [np.load(file.lengths_path).tolist() for file in shard.token_files] == [[2, 3], [2, 3, 0]]
    sizes = [None if file.bytes_path is None else np.load(file.bytes_path).tolist() for file in shard.token_files]
    assert sizes == [[20, 30], [20, 30, 7]]
    assert list(shard.bad_lines()) == [b"one\n", b"two\n"]
    total = Counts(bad=1)
    total.add(shard.counts)
    assert total == Counts(documents=3, tokens=10, bad=3)


def test_without_bad_records_there_is_no_list(tmp_path: Path) -> None:
    write_shard(tmp_path / "7", [])
    shard = FORMAT.read(tmp_path / "7", COLUMNS, verify=True)
    assert shard is not None and not shard.last and shard.bad_path is None and list(shard.bad_lines()) == []
    assert not list(tmp_path.glob("*.bad.jsonl"))


def test_a_shard_that_does_not_know_the_bytes_has_no_file_of_them(tmp_path: Path) -> None:
    write_shard(tmp_path / "7", [], with_bytes=False)
    shard = FORMAT.read(tmp_path / "7", COLUMNS, verify=True)
    assert shard is not None and [file.bytes_path for file in shard.token_files] == [None, None]
    assert not list(tmp_path.glob("*.bytes.npy"))


def test_a_shard_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "7", COLUMNS, np.dtype(np.uint16)) as out:
        out.add(0, np.arange(5), np.array([5], np.int32), None)
        raise KeyError
    assert not list(tmp_path.iterdir()) and FORMAT.read(tmp_path / "7", COLUMNS, verify=False) is None


def test_a_damaged_shard_is_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "7", [])
    (tmp_path / "7.0.bin").write_bytes(b"\1" * 10)
    assert FORMAT.read(tmp_path / "7", COLUMNS, verify=False) is not None
    assert FORMAT.read(tmp_path / "7", COLUMNS, verify=True) is None
    (tmp_path / "7.0.bin").write_bytes(b"")
    assert FORMAT.read(tmp_path / "7", COLUMNS, verify=False) is None


def test_a_quarantine_without_lines_is_removed(tmp_path: Path) -> None:
    path = write_quarantine(str(tmp_path / "o"), [b"one\n"])
    assert path.read_bytes() == b"one\n" and path.name == "o.quarantine.jsonl"
    assert write_quarantine(str(tmp_path / "o"), []) == path and not path.exists()
