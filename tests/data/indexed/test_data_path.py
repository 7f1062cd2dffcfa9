"""Data paths: a dataset's prefix, one of its files, the folder in which it is the only dataset."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megakd.__main__ import main
from megakd.artefacts.manifest import as_json, present_names, printable, read_manifest
from megakd.data.indexed.data_path import find_prefix
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.samples.sentences import open_sentences
from megakd.data.tokenizer import ByteTokenizer, build_tokenizer
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import ExitStatus, UsageError


def write(prefix: Path, seed: int = 0) -> IndexedDataset:
    tokenizer = ByteTokenizer()
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in ("hello world.", "x" * (50 + seed), "one. two. three."):
            writer.add_documents(np.array(tokenizer.encode(text)), np.array([len(text)], np.int32))
        writer.finish(parameters={"append_eod": False}, tokenizer=tokenizer.describe())
    return IndexedDataset(prefix)


def test_files_and_folders_stand_for_their_dataset(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a" / "d.v1") if (tmp_path / "a").mkdir() is None else None
    assert dataset is not None
    for given in ("a/d.v1", "a/d.v1.bin", "a/d.v1.idx", "a/d.v1.manifest.json", "a", "a/"):
        assert find_prefix(tmp_path / given) == tmp_path / "a" / "d.v1"
        assert IndexedDataset(f"{tmp_path}/{given}").fingerprint == dataset.fingerprint
    assert main(["show", str(tmp_path / "a" / "d.v1.bin")]) == main(["verify", str(tmp_path / "a")]) == 0


def test_a_prefix_that_ends_like_a_file_is_that_dataset(tmp_path: Path) -> None:
    plain, odd = write(tmp_path / "d"), write(tmp_path / "d.bin", seed=1)
    (tmp_path / "d.idx.idx").write_bytes(b"")  # a file of nothing
    assert IndexedDataset(tmp_path / "d.bin").fingerprint == odd.fingerprint != plain.fingerprint


def test_what_is_meant_is_named_where_it_is_not_clear(tmp_path: Path) -> None:
    for name in ("b_text", "a_text"):
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"2 datasets: give the prefix of one: {tmp_path}/a_text, {tmp_path}/b_text"):
        find_prefix(tmp_path)
    with pytest.raises(UsageError, match="no dataset in this folder"):
        find_prefix(tmp_path / "empty")
    with pytest.raises(UsageError, match=f"a.bin: no such file; .*there are {tmp_path}/a_text"):
        find_prefix(tmp_path / "a")
    (tmp_path / "a_text.bin").unlink()
    with pytest.raises(UsageError, match=r"a_text\.bin: no such file"):
        find_prefix(tmp_path / "a_text.idx")


def test_stray_things_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "d")
    for name, content in (("notes.txt", "hi"), ("a.json", '{"a": 1}'), ("list.json", "[1]")):
        (tmp_path / name).write_text(content)
    for name, hint in (
        ("empty", "it is empty"),
        ("notes.txt", "not an artefact"),
        ("a.json", "JSON, but not a manifest of megakd's: it holds a"),
        ("list.json", "it holds a list"),
        ("nowhere", "nowhere"),
    ):
        for verb in ("show", "verify"):
            assert main([verb, str(tmp_path / name)]) == ExitStatus.USAGE
            error = capsys.readouterr().err
            assert hint in error and error.count("\n") == 1


def test_a_dataset_that_was_moved_and_renamed_is_the_same_with_its_packing(tmp_path: Path) -> None:
    before = write(tmp_path / "old")
    packing = open_sentences(before, 16, ByteTokenizer)
    (tmp_path / "else").mkdir()
    for path in list(tmp_path.glob("old.*")):
        path.rename(tmp_path / "else" / path.name.replace("old", "new"))
    after = IndexedDataset(tmp_path / "else" / "new", expect_fingerprint=before.fingerprint)

    def closed() -> ByteTokenizer:
        raise AssertionError("the packing is there: it needs no tokenizer")

    again = open_sentences(after, 16, closed)
    assert again.manifest.fingerprint == packing.manifest.fingerprint
    assert main(["verify", f"{after.prefix}", f"{after.prefix}.sentence-16"]) == 0
    assert present_names(Path("x/new.manifest.json"), ["old.v1.bin", "old.v1.idx"]) == ["new.bin", "new.idx"]
    apart = ["tokenizer.json", "tokenizer_config.json"]  # no files of one prefix
    assert present_names(Path("x/tokenizer.manifest.json"), apart) == apart
    for name in ("x/manifest.json", "a.json"):
        assert present_names(Path(name), ["old.bin"]) == ["old.bin"]


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    prefix = folder / os.fsdecode(b"d\xff")
    dataset = write(prefix)
    assert read_manifest(f"{prefix}.manifest.json").files[0].name == prefix.name + ".bin"
    assert b"d\\\\udcff.bin" in Path(f"{prefix}.manifest.json").read_bytes()  # as text; a name is as its manifest's is
    for words in (["show", f"{prefix}", "--documents", "1"], ["verify", f"{prefix}.bin"], ["show", f"{folder}"],
                  ["pack", f"{prefix}", "--seq-length", "16"], ["verify", f"{prefix}.sentence-16"],
                  ["merge", "--input-prefix", f"{prefix}", f"{prefix}", "--output-prefix", f"{folder}/m\udcfe"],
                  ["verify", f"{folder}/m\udcfe"]):  # fmt: skip
        assert main(words) == 0, capsys.readouterr().err
    assert main(["show", f"{folder}/none\udcff"]) == ExitStatus.USAGE
    assert IndexedDataset(prefix).fingerprint == dataset.fingerprint
    assert printable("a\udcffé") == "a\\udcffé"
    assert as_json({"a\udcff": ["b\udcff", 1, None], "c": ("d", 2.5)}) == {
        "a\\udcff": ["b\\udcff", 1, None],
        "c": ["d", 2.5],
    }


def test_a_tokenizer_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One beside the dataset is moved with it; another is found by its absolute path; an old, relative record where
    the run was started."""
    from tokenizer_models import train_byte_bpe

    for place in ("data/tokenizer", "tokenizer"):
        folder = tmp_path / place.replace("/", "-")
        (folder / "data").mkdir(parents=True)
        monkeypatch.chdir(folder)
        tokenizer = build_tokenizer("HuggingFaceTokenizer", train_byte_bpe(Path(place)))
        with IndexedWriter("data/d", np.uint16) as writer:
            writer.add_documents(np.array([1, 2, 3]), np.array([3], np.int32))
            writer.finish(tokenizer=tokenizer.describe())
        monkeypatch.chdir(tmp_path)
        assert open_tokenizer(IndexedDataset(folder / "data" / "d")).hash == tokenizer.hash
        (folder / "data").rename(folder / "moved")
        assert open_tokenizer(IndexedDataset(folder / "moved" / "d")).hash == tokenizer.hash
