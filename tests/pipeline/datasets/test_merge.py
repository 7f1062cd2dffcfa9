"""``merge``: the joined dataset is its inputs one after the other, and what does not belong together is refused."""

import multiprocessing
import time

import numpy as np
import pytest

from megakd.__main__ import run
from megakd.artefacts.manifest import verify_files
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.errors import ExitStatus, UsageError
from megakd.pipeline.datasets import merge

TOKENIZER = {"type": "bpe", "hash": "aa", "vocab_size": 300, "eod": 0, "path": "/t"}

pytestmark = pytest.mark.filterwarnings("ignore:.*no manifest")


def write(prefix, seed, dtype=np.uint16, tokenizer=TOKENIZER):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 13).astype(np.int32)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(rng.integers(0, 300, lengths.sum()), lengths)
        writer.finish(tokenizer=tokenizer)
    return IndexedDataset(prefix)


def run_merge(*arguments):
    return run(merge.main, [str(argument) for argument in arguments])


def test_a_folder_is_joined_in_the_order_of_its_names(tmp_path):
    inputs = [write(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "c.d"))]
    for _ in range(2):  # the second run must not take the first one's output for an input
        assert run_merge("--input", tmp_path, "--output-prefix", tmp_path / "all") == ExitStatus.COMPLETE
    joined = IndexedDataset(tmp_path / "all")
    assert [d.tolist() for d in joined] == [d.tolist() for dataset in inputs for d in dataset]
    assert dict(joined.manifest.parents) == {f"input {i}": d.fingerprint for i, d in enumerate(inputs)}
    assert joined.manifest.tokenizer == TOKENIZER
    assert joined.max_token_id == max(d.max_token_id for d in inputs)


def test_prefixes_are_joined_in_the_order_given(tmp_path):
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    prefixes = (tmp_path / "b", tmp_path / "a", tmp_path / "b")
    assert run_merge("--input-prefix", *prefixes, "--output-prefix", tmp_path / "o") == ExitStatus.COMPLETE
    joined = IndexedDataset(tmp_path / "o")
    assert joined.tokens.tolist() == [*b.tokens.tolist(), *a.tokens.tolist(), *b.tokens.tolist()]


def test_megatron_merges_to_the_same_bytes(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in "ab":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    builder.data_file.close()
    assert run_merge("--input-prefix", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "ours") == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_a_dataset_without_a_manifest_may_be_joined_but_its_tokenizer_is_unknown(tmp_path):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    (tmp_path / "b.manifest.json").unlink()
    assert run_merge("--input", tmp_path, "--output-prefix", tmp_path / "o") == ExitStatus.COMPLETE
    manifest = IndexedDataset(tmp_path / "o").manifest
    assert manifest.tokenizer is None
    assert manifest.parents["input 1"].startswith("unverified:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": np.int32}, "uint16"), ({"tokenizer": {**TOKENIZER, "hash": "bb"}}, "tokenizer bb")],
)
def test_datasets_that_do_not_belong_together(tmp_path, capsys, changes, message):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, **changes)
    assert run_merge("--input", tmp_path, "--output-prefix", tmp_path / "o") == ExitStatus.MISMATCH
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output-prefix", "o"],
        ["--input", "{}", "--input-prefix", "{}/a", "--output-prefix", "{}/o"],
        ["--input", "{}/none", "--output-prefix", "{}/o"],
        ["--input", "{}/empty", "--output-prefix", "{}/o"],
        ["--input-prefix", "{}/a", "--output-prefix", "{}/a"],
        ["--input-prefix", "{}/a", "--output-prefix", "{}/half.bin/o"],
        ["--input-prefix", "{}/half", "--output-prefix", "{}/o"],
        ["--input-prefix", "{}/a"],
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments):
    write(tmp_path / "a", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.bin").write_bytes(b"12")
    assert run_merge(*(argument.format(tmp_path) for argument in arguments)) == ExitStatus.USAGE
    assert capsys.readouterr().err.startswith("error: ")


def test_a_corrupt_input_stops_it_before_it_writes(tmp_path):
    write(tmp_path / "a", 1)
    with open(tmp_path / "a.bin", "ab") as stream:
        stream.write(b"1")
    assert run_merge("--input", tmp_path, "--output-prefix", tmp_path / "o") == ExitStatus.CORRUPT
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_moment_it_leaves_a_whole_dataset_or_none(tmp_path, existing):
    for seed, name in enumerate("ab"):
        lengths = np.full(200_000, 5, dtype=np.int32)
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.random.default_rng(seed).integers(0, 300, lengths.sum()), lengths)
            writer.finish()
    inputs, output = [tmp_path / "a", tmp_path / "b"], tmp_path / "o"
    start = time.monotonic()
    whole = merge.merge(inputs, output).fingerprint
    duration = time.monotonic() - start
    for delay in np.linspace(0, duration * 1.2, 12):
        for path in tmp_path.glob("o.*"):
            path.unlink()
        if existing:  # the half of it, whose manifest another program has lost
            merge.merge(inputs[:1], output)
            (tmp_path / "o.manifest.json").unlink()
            (tmp_path / "o.idx").unlink()
        child = multiprocessing.get_context("fork").Process(target=merge.merge, args=(inputs, output))
        child.start()
        time.sleep(delay)
        child.kill()
        child.join(200)
        if (tmp_path / "o.manifest.json").exists():
            assert verify_files(tmp_path / "o.manifest.json") == []
            assert IndexedDataset(output).fingerprint == whole
        elif (tmp_path / "o.idx").exists():  # its manifest is yet to come
            found = IndexedDataset(output)
            joined = [IndexedDataset(prefix).tokens for prefix in inputs[: found.num_documents // 200_000]]
            assert np.array_equal(found.tokens, np.concatenate(joined))
        else:
            with pytest.raises(UsageError):
                IndexedDataset(output)
    assert merge.merge(inputs, output).fingerprint == whole
    assert not list(tmp_path.glob("*.tmp"))


def test_too_little_room_is_said_before_it_writes(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a", 1)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert run_merge("--input", tmp_path, "--output-prefix", tmp_path / "o") == ExitStatus.NO_SPACE
    assert "10 are free" in capsys.readouterr().err
