"""Compressed inputs that are sound are read to the byte: frames, members, windows and padding of any kind."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from megakd.data.text import decompress
from megakd.data.text.input_formats import kind_of
from megakd.data.text.records import Lines
from megakd.errors import CorruptError, UsageError

TEXT = b"".join(b'{"text": "line %d of some"}\n' % i for i in range(5000))


def skippable(size: int, *, number: int = 0) -> bytes:
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + size.to_bytes(4, "little") + b"\xfd" * size


def pack(data: bytes, **parameters: int | bool) -> bytes:
    """One frame whose header does not tell its size, as of a stream."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, **parameters)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(data) + packer.flush()


def read(path: Path) -> bytes:
    return b"".join(line or b"" for _, line in Lines(path, kind_of(path), max_line_bytes=1 << 20))


THIRD = TEXT[: TEXT.index(b"\n", len(TEXT) // 3) + 1]
REST = TEXT[len(THIRD) :]
SOUND = {
    "as pzstd writes": skippable(4) + pack(THIRD) + skippable(4) + pack(REST),
    "skippable frames of all kinds ahead": b"".join(skippable(i * 3000, number=i) for i in range(16)) + pack(TEXT),
    "skippable frames between, and at the end": pack(THIRD) + skippable(0) * 3 + pack(REST) + skippable(90_000),
    "empty frames": pack(b"") * 3 + pack(TEXT) + pack(b""),
    "a frame for each line": b"".join(pack(line) for line in TEXT.splitlines(keepends=True)),
    "a checksum": pack(TEXT, write_checksum=True),
    "one segment": zstandard.compress(TEXT),
    "a line over two frames": pack(TEXT[:12345]) + skippable(1) + pack(TEXT[12345:]),
    **{f"a window of 2^{log}": pack(TEXT, window_log=log, enable_ldm=True) for log in (10, 27, 28, 31)},
}


@pytest.mark.parametrize("name", SOUND)
def test_every_frame_of_zstandard(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / "a.jsonl.zst", tmp_path / "a.jsonl"):  # known by its content as well
        path.write_bytes(SOUND[name])
        assert kind_of(path) == "zstd"
        assert read(path) == TEXT


def test_windows_are_what_they_say() -> None:
    for log in (10, 27, 28, 31):
        assert zstandard.get_frame_parameters(SOUND[f"a window of 2^{log}"]).window_size == 1 << log


@pytest.mark.parametrize("content", [skippable(7), skippable(0) * 5, pack(b"")])
def test_frames_without_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    assert read(path) == b""


@pytest.mark.parametrize(
    "content",
    [
        pack(TEXT)[:-1],
        pack(THIRD) + pack(REST)[:3],
        skippable(100)[:-1],
        pack(TEXT) + skippable(9)[:6],
        pack(TEXT) + b"more",
        skippable(4) + TEXT,
    ],
)
def test_frames_without_their_end(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="cut or damaged"):
        read(path)


def test_a_dictionary_is_named(tmp_path: Path) -> None:
    dictionary = zstandard.train_dictionary(2000, [TEXT[i : i + 300] for i in range(0, len(TEXT), 300)])
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable(3) + zstandard.ZstdCompressor(dict_data=dictionary).compress(TEXT))
    with pytest.raises(UsageError, match=f"zstandard dictionary {dictionary.dict_id()}.*zstd -dc -D"):
        read(path)


def test_memory_that_is_refused_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(SOUND["a window of 2^31"])

    class Refused:
        eof, unused_data = False, b""

        def decompress(self, data: bytes) -> bytes:
            raise zstandard.ZstdError("zstd decompressor error: Allocation error : not enough memory")

    class Decompressor:
        def __init__(self, *, max_window_size: int) -> None:
            assert max_window_size == decompress.LARGEST_WINDOW_BYTES

        def decompressobj(self) -> Refused:
            return Refused()

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    with pytest.raises(UsageError, match="a window of 2048 MiB .* fewer --workers"):
        read(path)


@pytest.mark.parametrize("padding", [b"", bytes(1), bytes(511), bytes(100_000)])
def test_members_of_gzip_and_zeros_behind_them(padding: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(THIRD) + gzip.compress(b"") + gzip.compress(REST) + padding)
    assert read(path) == TEXT
