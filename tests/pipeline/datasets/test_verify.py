"""``verify``: every flipped byte is named with its file; ``--adopt`` writes a manifest only for a sound dataset."""

import numpy as np
import pytest
from pipeline.select.select_twin import write as write_scores

from megakd.__main__ import run
from megakd.artefacts.manifest import hash_file, read_manifest, write_manifest
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter, write_idx
from megakd.data.selection import SelectionWriter
from megakd.errors import ExitStatus
from megakd.pipeline.datasets import pack, verify

pytestmark = pytest.mark.filterwarnings("ignore:.*no manifest")


@pytest.fixture
def prefix(tmp_path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 9, 13).astype(np.int32)
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_documents(rng.integers(0, 300, lengths.sum()), lengths)
        writer.finish()
    return tmp_path / "d"


def run_verify(*arguments):
    return run(verify.main, [str(argument) for argument in arguments])


def path_of(prefix, suffix):
    return prefix.with_name(f"{prefix.name}.{suffix}")


def test_whole(prefix, capsys):
    assert run_verify(prefix) == ExitStatus.COMPLETE
    assert run_verify(path_of(prefix, "manifest.json"), "--adopt") == ExitStatus.COMPLETE
    out = capsys.readouterr().out
    assert out.count(": whole: indexed-dataset") == 2 and IndexedDataset(prefix).fingerprint in out


@pytest.mark.parametrize("suffix", ["bin", "idx", "manifest.json"])
def test_every_flipped_byte_is_found(prefix, capsys, suffix):
    path = path_of(prefix, suffix)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 64]) + good[position + 1 :])
        assert run_verify(prefix) == ExitStatus.CORRUPT
        assert path.name in capsys.readouterr().err
    path.write_bytes(good)
    assert run_verify(prefix) == ExitStatus.COMPLETE


def test_all_artefacts_are_looked_at(prefix, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "rows").write_bytes(b"123")
    write_manifest(
        tmp_path / "store" / "manifest.json", format="other", version=9, parameters={}, parents={},
        files=[hash_file(tmp_path / "store" / "rows")],
    )  # fmt: skip
    path_of(prefix, "bin").write_bytes(b"")
    assert run_verify(prefix, tmp_path / "store") == ExitStatus.CORRUPT
    captured = capsys.readouterr()
    assert "d.bin" in captured.err and f"{tmp_path}/store: whole: other" in captured.out


def test_no_manifest_is_a_usage_error_that_tells_the_way(prefix, tmp_path, capsys):
    path_of(prefix, "manifest.json").unlink()
    assert run_verify(prefix) == ExitStatus.USAGE
    assert f"verify --adopt {prefix}" in capsys.readouterr().err
    assert run_verify(tmp_path / "nothing") == ExitStatus.USAGE


def test_adopt(prefix):
    written = IndexedDataset(prefix)
    path_of(prefix, "manifest.json").unlink()
    assert run_verify(prefix, "--adopt", "--vocab-size", 300) == ExitStatus.COMPLETE
    adopted = IndexedDataset(prefix)
    # The same files and nothing else known about them: the same artefact.
    assert adopted.fingerprint == written.fingerprint and adopted.max_token_id == written.max_token_id


def test_adopt_records_the_tokenizer(prefix):
    path_of(prefix, "manifest.json").unlink()
    assert run_verify(prefix, "--adopt", "--tokenizer-type", "NullTokenizer", "--vocab-size", 299) == 0
    tokenizer = read_manifest(path_of(prefix, "manifest.json")).tokenizer
    assert (tokenizer["type"], tokenizer["vocab_size"], tokenizer["eod"]) == ("NullTokenizer", 300, 299)


@pytest.mark.parametrize(
    ("bad", "flags"), [(-1, []), (300, ["--vocab-size", "300"]), (300, ["--tokenizer-type", "ByteTokenizer"])]
)
def test_adopt_refuses_ids(prefix, tmp_path, capsys, monkeypatch, bad, flags):
    monkeypatch.setattr(verify, "_TOKENS_AT_ONCE", 3)
    tokens = np.array([5, 6, 7, 8, bad, 9], dtype="<i4")
    tokens.tofile(tmp_path / "e.bin")
    write_idx(tmp_path / "e.idx", np.int32, np.array([6], dtype=np.int32))
    assert run_verify(tmp_path / "e", "--adopt", *flags) == ExitStatus.USAGE
    assert f"token id {bad} at token position 4" in capsys.readouterr().err
    assert not (tmp_path / "e.manifest.json").exists()


def test_adopt_refuses_a_broken_index(prefix):
    path_of(prefix, "manifest.json").unlink()
    path_of(prefix, "bin").write_bytes(path_of(prefix, "bin").read_bytes()[:-1])
    assert run_verify(prefix, "--adopt") == ExitStatus.CORRUPT
    assert not path_of(prefix, "manifest.json").exists()


def test_adopt_takes_an_empty_dataset(tmp_path):
    (tmp_path / "e.bin").write_bytes(b"")
    write_idx(tmp_path / "e.idx", np.uint16, np.zeros(0, dtype=np.int32))
    assert run_verify(tmp_path / "e", "--adopt") == ExitStatus.COMPLETE
    assert IndexedDataset(tmp_path / "e").max_token_id == -1


def test_vocab_size_without_adopt(prefix):
    assert run_verify(prefix, "--vocab-size", 3) == ExitStatus.USAGE


def test_scores_selections_and_packings_are_found_by_their_folder_or_name(tmp_path, prefix, capsys):
    write_scores(tmp_path / "scores", [-1.0, -2.0], [1, 2])
    with SelectionWriter(tmp_path / "scores") as writer:  # in one folder: both are looked at
        writer.append(np.array([1]))
        writer.finish(packing="concat", seq_length=7, num_samples=2, dataset="d0", rule={})
    assert (
        run(pack.main, [str(prefix), "--seq-length", "3", "--tokenizer-type", "NullTokenizer", "--vocab-size", "300"])
        == 0
    )
    for name in ("scores", "d.sentence-3", "d.sentence-3.json"):
        assert run_verify(tmp_path / name) == ExitStatus.COMPLETE
    out = capsys.readouterr().out
    assert out.count("megakd-scores,") == out.count("megakd-selection,") == 1 and out.count("megakd-packing,") == 2
    for file in ("scores/counts.i32", "scores/ids.i64", "d.sentence-3.i64"):
        path = tmp_path / file
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        assert run_verify(path.parent if "/" in file else tmp_path / "d.sentence-3") == ExitStatus.CORRUPT
        assert f"{path.name}: block 0" in capsys.readouterr().err


def test_a_json_beside_a_bare_dataset_is_not_its_manifest(prefix):
    path_of(prefix, "manifest.json").unlink()
    path_of(prefix, "json").write_text("{}")
    assert run_verify(prefix, "--adopt") == ExitStatus.COMPLETE and path_of(prefix, "manifest.json").exists()


def test_adopt_adds_the_tokenizer_that_a_manifest_does_not_tell(prefix, capsys):
    path_of(prefix, "manifest.json").unlink()
    assert run_verify(prefix, "--adopt") == ExitStatus.COMPLETE
    assert read_manifest(path_of(prefix, "manifest.json")).tokenizer is None
    small, fits = (["--tokenizer-type", "NullTokenizer", "--vocab-size", size] for size in (100, 299))
    assert run_verify(prefix, "--adopt", *small) == ExitStatus.MISMATCH
    assert run_verify(prefix, "--adopt", *fits) == run_verify(prefix, "--adopt", *fits) == ExitStatus.COMPLETE
    tokenizer = read_manifest(path_of(prefix, "manifest.json")).tokenizer
    assert (tokenizer["vocab_size"], IndexedDataset(prefix).manifest.tokenizer) == (300, tokenizer)
    assert run_verify(prefix, "--adopt", "--tokenizer-type", "ByteTokenizer") == ExitStatus.MISMATCH
    assert "made with the tokenizer NullTokenizer" in capsys.readouterr().err
    path_of(prefix, "bin").write_bytes(path_of(prefix, "bin").read_bytes()[:-1] + b"\xff")
    assert run_verify(prefix, "--adopt", *fits) == ExitStatus.CORRUPT
