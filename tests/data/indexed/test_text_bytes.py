"""Bytes of the original text: beside the index, in every range of tokens, through joins, and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megakd.__main__ import run
from megakd.data.indexed.concatenate import TokenFile, concatenate, write_lengths, write_text_bytes
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.indexed.text_bytes import _bytes_before, bytes_of_ranges
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.pipeline.datasets import merge, show, verify

LENGTHS = [0, 0, 3, 1, 0, 7, 13, 0, 251, 2, 0]
SIZES = [5, 0, 10, 0, 4, 6, 100, 1, 1000, 2**33 + 1, 9]


def write(prefix: Path, lengths: list[int] = LENGTHS, sizes: list[int] | None = SIZES) -> IndexedDataset:
    with IndexedWriter(prefix, np.uint16) as writer:
        for first in range(0, len(lengths), 4):
            part = np.array(lengths[first : first + 4], np.int32)
            of_part = None if sizes is None else np.array(sizes[first : first + 4])
            writer.add_documents(np.arange(part.sum()), part, of_part)
        writer.finish()
    return IndexedDataset(prefix)


def slow_shares(lengths: list[int], sizes: list[int]) -> list[int]:
    """Bytes of every token, by the rule as it is written down, in Python's own integers."""
    shares: list[int] = []
    waiting = 0  # of documents without tokens in front of the first token
    for n, b in zip(lengths, sizes):
        if n == 0 and not shares:
            waiting += b
        elif n == 0:
            shares[-1] += b
        else:
            shares += [b * (i + 1) // n - b * i // n for i in range(n)]
            shares[0] += waiting
            waiting = 0
    return shares


def test_every_token_has_its_share(tmp_path: Path) -> None:
    dataset, shares = write(tmp_path / "d"), slow_shares(LENGTHS, SIZES)
    assert dataset.text_bytes is not None and dataset.text_bytes.tolist() == SIZES
    assert sum(shares) == sum(SIZES) and len(shares) == dataset.num_tokens
    positions = np.arange(dataset.num_tokens)
    assert bytes_of_ranges(dataset, positions, positions + 1).tolist() == shares
    for start in (0, 1, 3, 4, 11, 24, 274, 277):  # from a place alone: what lies in front of it is not read
        stops = np.arange(start, dataset.num_tokens + 1)
        found = bytes_of_ranges(dataset, np.full(len(stops), start), stops)
        assert found.tolist() == [sum(shares[start:stop]) for stop in stops.tolist()]
    none = np.zeros(0, np.int64)
    assert bytes_of_ranges(dataset, none, none).tolist() == []


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=9),
    cuts=st.lists(st.integers(0, 45), max_size=6),
)
def test_ranges_that_adjoin_add_up(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[int, int]], cuts: list[int]
) -> None:
    lengths, sizes = [n for n, _ in documents], [b for _, b in documents]
    dataset, total = write(tmp_path_factory.mktemp("d") / "d", lengths, sizes), sum(lengths)
    bounds = np.array(sorted({0, total, *(cut for cut in cuts if cut < total)}))
    found = bytes_of_ranges(dataset, bounds[:-1], bounds[1:])
    shares = slow_shares(lengths, sizes)
    assert found.tolist() == [sum(shares[a:b]) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist())]
    assert not total or found.sum() == sum(sizes)


def test_no_product_leaves_64_bits() -> None:
    n, b = 2**31 - 1, 2**42 + 12345
    positions: NDArray[np.int64] = np.array([1, 7, n // 3, n - 1, n, n + 1, n + 5])
    found = _bytes_before(positions, np.array([0, n, n + 5]), np.array([0, b, b + 3]))
    assert found.tolist() == [b * p // n if p <= n else b + 3 * (p - n) // 5 for p in positions.tolist()]


def test_a_dataset_without_bytes_is_what_it_was(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", sizes=None)
    assert dataset.manifest is not None and dataset.manifest.version == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]
    assert dataset.text_bytes is None and not dataset.has_text_bytes
    with pytest.raises(UsageError, match=r"/d: the dataset does not record the bytes of its text"):
        bytes_of_ranges(dataset, np.array([0]), np.array([1]))
    with_bytes = write(tmp_path / "e")
    assert with_bytes.manifest is not None and with_bytes.manifest.version == 2
    assert (tmp_path / "e.bytes").read_bytes() == np.array(SIZES, "<i8").tobytes()
    assert with_bytes.manifest.parameters["dataset"]["num_bytes"] == sum(SIZES)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"d{suffix}").read_bytes() == (tmp_path / f"e{suffix}").read_bytes()
    write(tmp_path / "e", sizes=None)  # replaced, with all of its files
    assert not (tmp_path / "e.bytes").exists()


def test_plain_megatron_opens_it(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    ours = write(tmp_path / "d")
    theirs = megatron.IndexedDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [document.tolist() for document in ours]


@pytest.mark.parametrize("sizes", [[1, 2, 3], [1, -1], [1]])
def test_bytes_that_cannot_be(tmp_path: Path, sizes: list[int]) -> None:
    with IndexedWriter(tmp_path / "d", np.uint16) as writer, pytest.raises(UsageError, match="expected those of 2"):
        writer.add_documents(np.arange(5), np.array([2, 3], np.int32), np.array(sizes))


def test_bytes_of_some_documents_alone(tmp_path: Path) -> None:
    for first, second in ((np.array([4]), None), (None, np.array([4]))):
        with IndexedWriter(tmp_path / "d", np.uint16) as writer:
            writer.add_documents(np.arange(5), np.array([5], np.int32), first)
            with pytest.raises(UsageError, match="of some documents and not of others"):
                writer.add_documents(np.arange(5), np.array([5], np.int32), second)


def test_damage_is_refused_by_reading_and_by_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d.bytes"
    whole = path.read_bytes()
    assert run(verify.main, [str(tmp_path / "d")]) == ExitStatus.COMPLETE
    for at in (0, 17, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"d\.bytes: block 0 .*make the dataset again"):
            _ = IndexedDataset(tmp_path / "d").text_bytes
        with pytest.raises(CorruptError, match=r"d\.bytes: block 0"):
            concatenate([tmp_path / "d"], tmp_path / "o")
        assert run(verify.main, [str(tmp_path / "d")]) == ExitStatus.CORRUPT
        assert "d.bytes: block 0" in capsys.readouterr().err
    path.write_bytes(whole[:-8])
    with pytest.raises(CorruptError, match=r"d\.bytes: 80 bytes on disk, 88 in"):
        IndexedDataset(tmp_path / "d")
    path.unlink()
    with pytest.raises(CorruptError, match=r"d\.bytes: missing"):
        IndexedDataset(tmp_path / "d")


def test_all_files_alike_are_renamed(tmp_path: Path) -> None:
    fingerprint = write(tmp_path / "d.x").fingerprint
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("d.x", "e.bytes"))
    dataset = IndexedDataset(tmp_path / "e.bytes")
    assert dataset.fingerprint == fingerprint and dataset.text_bytes is not None
    assert IndexedDataset(tmp_path / "e.bytes.bytes").fingerprint == fingerprint  # any of its files names it


def test_show_says_how_many_there_are(tmp_path: Path) -> None:
    rows = {line[:18].strip(): line[19:] for line in show.describe(write(tmp_path / "d", [3, 0, 5], [10, 2, 20]))}
    assert rows["bytes of text"] == "32 (4.00 a token, 10.7 a document)"
    rows = {line[:18].strip(): line[19:] for line in show.describe(write(tmp_path / "d", sizes=None))}
    assert rows["bytes of text"] == "not recorded"


def test_merge_keeps_them_if_every_input_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", [1, 2], [30, 40])
    write(tmp_path / "c", [1, 2], None)
    arguments: list[Any] = ["--output-prefix", tmp_path / "o", "--input-prefix"]
    names = [tmp_path / name for name in "aba"]
    assert run(merge.main, [str(word) for word in [*arguments, *names]]) == ExitStatus.COMPLETE
    joined = IndexedDataset(tmp_path / "o")
    assert joined.text_bytes is not None and joined.text_bytes.tolist() == [*SIZES, 30, 40, *SIZES]
    assert "warning" not in capsys.readouterr().err
    for suffix in ("bin", "idx", "bytes", "manifest.json"):
        (tmp_path / f"o.{suffix}").unlink()
    assert run(merge.main, [str(word) for word in [*arguments, *names, tmp_path / "c"]]) == ExitStatus.COMPLETE
    assert IndexedDataset(tmp_path / "o").text_bytes is None and not (tmp_path / "o.bytes").exists()
    assert f"{tmp_path}/c: no bytes of text are recorded" in capsys.readouterr().err


def test_token_files_that_disagree(tmp_path: Path) -> None:
    np.arange(5, dtype="<u2").tofile(tmp_path / "t.bin")
    write_lengths(tmp_path / "t.npy", np.array([2, 3], np.int32))
    write_text_bytes(tmp_path / "b.npy", np.array([2, 3, 4]))
    part = TokenFile(tmp_path / "t.bin", tmp_path / "t.npy", tmp_path / "b.npy")
    with pytest.raises(CorruptError, match=r"b\.npy: bytes of 3 documents, expected those of 2"):
        concatenate([part], tmp_path / "o", dtype=np.uint16)
    write_lengths(tmp_path / "b.npy", np.array([2, 3], np.int32))
    with pytest.raises(CorruptError, match=r"b\.npy: .*expected one axis of int64"):
        concatenate([part], tmp_path / "o", dtype=np.uint16)


def test_a_version_to_come_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakd.data.indexed.writer.WITH_BYTES", 3)
    with pytest.raises(MismatchError, match="format version 3, .* reads version 1, 2"):
        write(tmp_path / "d")
