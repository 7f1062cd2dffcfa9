"""The manifest: what it accepts, what it refuses, and the writers that make a file whole or absent."""

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import xxhash

from megakd.artefacts import durable_files as durable
from megakd.artefacts.durable_files import HashingWriter, atomic_write, commit_file, explain_no_space, hash_file
from megakd.artefacts.manifest import read_manifest, verify_files, write_manifest
from megakd.errors import CorruptError, ExitStatus, MismatchError, NoSpaceError, UsageError

TOKENIZER = {"type": "bpe", "hash": "00ff", "vocab_size": 7, "eod": 0, "path": "/here"}


def write_artefact(folder: Path, name="a.bin", content=b"0123456789", **changes):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    defaults = {"format": "thing", "version": 3, "parameters": {"x": [1, 2.5]}, "parents": {"p": "ab"}}
    return write_manifest(
        folder / "a.manifest.json", **{**defaults, "tokenizer": TOKENIZER, **changes}, files=[hash_file(folder / name)]
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(durable, "BLOCK_BYTES", 13)
    monkeypatch.setattr("megakd.artefacts.manifest.BLOCK_BYTES", 13)
    monkeypatch.setattr(durable, "_READ_BYTES", 5)


def test_round_trip(tmp_path):
    written = write_artefact(tmp_path)
    assert read_manifest(written.path, format="thing", version=3) == written
    assert verify_files(written.path) == []


def test_fingerprint_is_of_the_content_alone(tmp_path):
    base = write_artefact(tmp_path / "1").fingerprint
    assert write_artefact(tmp_path / "2", name="other.bin").fingerprint == base
    assert write_artefact(tmp_path / "3", tokenizer={**TOKENIZER, "path": "/elsewhere"}).fingerprint == base
    for change in (
        {"content": b"0123456780"},
        {"version": 4},
        {"parameters": {"x": [1, 2.25]}},
        {"parents": {"p": "ac"}},
        {"tokenizer": {**TOKENIZER, "hash": "00fe"}},
        {"tokenizer": None},
    ):
        assert write_artefact(tmp_path / "4", **change).fingerprint != base, change


def test_manifest_bytes_repeat(tmp_path):
    first = write_artefact(tmp_path).path.read_bytes()
    assert write_artefact(tmp_path).path.read_bytes() == first


@pytest.mark.parametrize("size", [0, 1, 12, 13, 14, 26, 40])
def test_hashes_equal_the_slow_twin(tmp_path, small_blocks, size):
    content = bytes(range(size))
    with HashingWriter(tmp_path / "f") as writer:
        for start in range(0, size, 7):
            writer.write(content[start : start + 7])
        record = writer.commit()
    twin = tuple(xxhash.xxh3_128_hexdigest(content[i : i + 13]) for i in range(0, size, 13))
    assert (record.name, record.size_bytes, record.xxh3_128, record.blocks) == (
        "f", size, xxhash.xxh3_128_hexdigest(content), twin,
    )  # fmt: skip
    assert hash_file(tmp_path / "f") == record


def test_every_flipped_bit_is_found_with_its_block(tmp_path, small_blocks):
    content = bytes(range(30))
    manifest = write_artefact(tmp_path, content=content)
    for position in range(30):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            (tmp_path / "a.bin").write_bytes(changed)
            (fault,) = verify_files(manifest.path)
            assert "a.bin" in fault and f"block {position // 13} " in fault


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path):
    path = write_artefact(tmp_path).path
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CorruptError, match=r"a\.manifest\.json"):
            read_manifest(path)
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError):
            read_manifest(path)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_wrong_size_is_refused_with_both_values(tmp_path, size):
    path = write_artefact(tmp_path).path
    (tmp_path / "a.bin").write_bytes(b"x" * size)
    with pytest.raises(CorruptError, match=rf"{size} bytes on disk, 10 "):
        read_manifest(path)
    assert any(f"{size} bytes" in fault for fault in verify_files(path))


def test_missing_things(tmp_path):
    with pytest.raises(UsageError, match="no manifest here"):
        read_manifest(tmp_path / "none.json")
    path = write_artefact(tmp_path).path
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CorruptError, match="missing"):
        read_manifest(path)
    assert len(verify_files(path)) == 1


def test_another_format_or_version_is_refused(tmp_path):
    path = write_artefact(tmp_path).path
    with pytest.raises(MismatchError, match=r"'thing'.*'store'"):
        read_manifest(path, format="store", version=3)
    with pytest.raises(MismatchError, match=r"version 3.*reads version 2"):
        read_manifest(path, format="thing", version=2)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "x/../../secret", "", "a\0b", ".."])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "in"
    record = write_artefact(folder).files[0]
    (tmp_path / "secret").write_bytes(b"0123456789")
    path = write_manifest(
        folder / "m.json", format="f", version=1, parameters={}, parents={},
        files=[durable.FileRecord(name, record.size_bytes, record.xxh3_128, record.blocks)],
    ).path  # fmt: skip
    with pytest.raises(CorruptError):
        read_manifest(path)
    assert len(verify_files(path)) == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = write_artefact(tmp_path / "in").path
    (tmp_path / "in" / "a.bin").rename(tmp_path / "a.bin")
    (tmp_path / "in" / "a.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(CorruptError, match="outside"):
        read_manifest(path)


def test_parameters_that_json_would_change_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_artefact(tmp_path, parameters={"x": float("nan")})


def test_a_writer_left_early_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), HashingWriter(tmp_path / "f") as writer:
        writer.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_reader_keeps_its_file_while_it_is_replaced(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with open(tmp_path / "f", "rb") as reader, HashingWriter(tmp_path / "f") as writer:
        writer.write(b"new content")
        writer.commit()
        assert reader.read() == b"old"
    assert (tmp_path / "f").read_bytes() == b"new content"


def test_two_writers_of_one_output(tmp_path):
    with HashingWriter(tmp_path / "f") as first:
        first.write(b"first")
        with pytest.raises(UsageError, match="another process"):
            HashingWriter(tmp_path / "f")
        first.commit()
    assert (tmp_path / "f").read_bytes() == b"first"


def _write_and_die(path):
    HashingWriter(path).write(b"x" * 100)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_no_obstacle(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path / "f",))
    child.start()
    child.join(200)
    assert not (tmp_path / "f").exists()
    with HashingWriter(tmp_path / "f") as writer:
        writer.write(b"short")
        writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"short"


def test_a_full_disk_is_a_no_space_error_and_keeps_the_old_file(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NoSpaceError, match=r"f\.tmp") as raised, HashingWriter(tmp_path / "f") as writer:
            writer.write(b"x" * 2000)
        with pytest.raises(NoSpaceError, match="2000 more bytes"):
            atomic_write(tmp_path / "f", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.status == ExitStatus.NO_SPACE
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_other_os_errors_pass(tmp_path):
    with pytest.raises(PermissionError), explain_no_space(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_commit_file_and_atomic_write(tmp_path):
    (tmp_path / "t").write_bytes(b"1")
    commit_file(tmp_path / "t", tmp_path / "f")
    atomic_write(tmp_path / "g", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g"]
