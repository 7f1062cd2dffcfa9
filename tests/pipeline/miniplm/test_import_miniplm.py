"""``import-miniplm``: shards and scores written here as MiniPLM writes them become a dataset that Megatron opens."""

from __future__ import annotations

import resource
import struct

import numpy as np
import pytest
import torch

from megakd.__main__ import run
from megakd.artefacts.manifest import verify_files
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.packing import open_samples
from megakd.data.scores.artefact import Scores
from megakd.errors import ExitStatus
from megakd.pipeline.miniplm import main as import_miniplm

EOD = 50
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(EOD))  # its end of document is 50
THEIR_CODES = {np.dtype("u1"): 1, np.dtype("<i4"): 4, np.dtype("<f4"): 6, np.dtype("<f8"): 7, np.dtype("<u2"): 8}


def write_shard(prefix, instances, dtype="<u2", document_indices=(0,)):
    """MiniPLM's builder: no document is ever closed, float32 is 6 and float64 7."""
    dtype = np.dtype(dtype)
    tokens = np.array([i for ids in instances for i in ids], dtype=dtype)
    lengths = np.array([len(ids) for ids in instances], dtype="<i4")
    pointers = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[:-1].astype("<i8") * dtype.itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, THEIR_CODES[dtype], len(lengths), len(document_indices))
    prefix.parent.mkdir(exist_ok=True)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    index = header + lengths.tobytes() + pointers.tobytes() + np.array(document_indices, "<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


def make_instances(seed, count=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOD + 1, rng.integers(1, 14)).tolist() for _ in range(count)]


@pytest.fixture
def shards(tmp_path):
    instances = [make_instances(seed) for seed in range(12)]  # numbers of one and of two digits
    for number, each in enumerate(instances):
        write_shard(tmp_path / "in" / f"data_{number}", each)
    return instances


def imported(tmp_path, *flags, shards=True):
    arguments = ["--output-prefix", tmp_path / "out"] + ["--input-prefix", tmp_path / "in/data"] * shards
    return run(import_miniplm.main, [str(argument) for argument in [*arguments, *flags]])


def write_scores(folder, per_shard, numbers=None):
    """``per_shard``: one list of means a file."""
    folder.mkdir(exist_ok=True)
    for number, values in zip(numbers or range(len(per_shard)), per_shard):
        torch.save(torch.tensor(values, dtype=torch.float32), folder / f"scores_{number}.pt")
    return folder


def test_shards_become_a_dataset(tmp_path, shards, capsys):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    with pytest.raises(AssertionError):
        megatron.IndexedDataset(str(tmp_path / "in/data_0"))  # what it is all about
    for _ in range(2):  # the second run replaces the first one's output
        assert imported(tmp_path, *NULL) == ExitStatus.COMPLETE
    expected = [ids for shard in shards for ids in shard]
    assert "12 shards, 480 instances" in capsys.readouterr().out
    dataset = IndexedDataset(tmp_path / "out")
    assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == expected
    assert dataset.dtype == np.uint16 and dataset.manifest.tokenizer["eod"] == EOD
    assert len(dataset.manifest.parents) == 12 and not verify_files(dataset.manifest.path)
    theirs = megatron.IndexedDataset(str(tmp_path / "out"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    assert theirs.document_indices.tolist() == list(range(481))
    samples = open_samples("document", dataset, 12, lambda: None)
    assert [row[:length].tolist() for row, length in zip(samples.read(np.arange(480)), map(len, expected))] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.bin", "out.idx", "out.manifest.json"]


def test_what_their_builder_may_leave(tmp_path, shards):
    (tmp_path / "in/data_12.bin").write_bytes(b"")  # the last shard was just full
    write_shard(tmp_path / "in/data_3", [])
    closed = make_instances(99, 7)
    write_shard(tmp_path / "in/data_4", closed, document_indices=range(8))  # a shard that somebody mended
    write_shard(tmp_path / "in/other_0", [[1]], dtype="<i4")  # another split
    assert imported(tmp_path) == ExitStatus.COMPLETE
    dataset = IndexedDataset(tmp_path / "out")
    expected = [ids for number, shard in enumerate(shards) for ids in ({3: [], 4: closed}.get(number, shard))]
    assert [ids.tolist() for ids in dataset] == expected and dataset.manifest.tokenizer is None


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".*"])
@pytest.mark.parametrize("number", [0, 5])
def test_a_missing_shard_is_an_error(tmp_path, shards, capsys, number, suffix):
    for path in list((tmp_path / "in").glob(f"data_{number}{suffix}")):
        path.unlink()
    assert imported(tmp_path) == ExitStatus.CORRUPT
    error = capsys.readouterr().err
    assert f"data_{number}." in error and "missing" in error and "up to number 11" in error
    assert not list(tmp_path.glob("out*"))


def test_the_last_shard_without_its_index_is_an_error(tmp_path, shards, capsys):
    (tmp_path / "in/data_11.idx").unlink()
    assert imported(tmp_path) == ExitStatus.CORRUPT and "data_11.idx: missing" in capsys.readouterr().err


def damage(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


DAMAGED = {
    "magic": (lambda f: damage(f / "data_3.idx", 0, b"X"), ExitStatus.CORRUPT, "starts with"),
    "version": (lambda f: damage(f / "data_3.idx", 9, b"\2"), ExitStatus.CORRUPT, "version 2"),
    "code": (lambda f: damage(f / "data_3.idx", 17, b"\x09"), ExitStatus.CORRUPT, "dtype code 9"),
    "float32": (lambda f: write_shard(f / "data_3", [[1.0]], "<f4"), ExitStatus.USAGE, "6 is MiniPLM's float32"),
    "float64": (lambda f: write_shard(f / "data_3", [[1.0]], "<f8"), ExitStatus.USAGE, "7 is MiniPLM's float64"),
    "dtypes": (lambda f: write_shard(f / "data_3", [[1]], "<i4"), ExitStatus.MISMATCH, "data_3: int32"),
    "negative": (
        lambda f: [write_shard(f / f"data_{i}", [[1, -1 if i == 3 else 1]], "<i4") for i in range(12)],
        ExitStatus.USAGE,
        "token id -1",
    ),
    "count": (lambda f: damage(f / "data_3.idx", 18, b"\x29"), ExitStatus.CORRUPT, "41 sequences"),
    "length": (lambda f: damage(f / "data_3.idx", 34, b"\x00"), ExitStatus.CORRUPT, "data_3.idx"),
    "short index": (lambda f: (f / "data_3.idx").write_bytes(b"MMID"), ExitStatus.CORRUPT, "4 bytes"),
    "cut tokens": (
        lambda f: (f / "data_3.bin").write_bytes((f / "data_3.bin").read_bytes()[:-2]),
        ExitStatus.CORRUPT,
        "last sequence ends",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], ExitStatus.USAGE, "no data_0.bin"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shards(tmp_path, shards, capsys, name):
    change, status, message = DAMAGED[name]
    change(tmp_path / "in")
    assert imported(tmp_path) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_ids_beyond_the_tokenizer(tmp_path, shards, capsys):
    wrong = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "40")
    assert imported(tmp_path, *wrong) == ExitStatus.MISMATCH
    assert "token id 50, the tokenizer has 41" in capsys.readouterr().err and not list(tmp_path.glob("out*"))
    assert imported(tmp_path, *NULL) == ExitStatus.COMPLETE
    before = IndexedDataset(tmp_path / "out").fingerprint
    assert imported(tmp_path, *wrong) == ExitStatus.MISMATCH  # what was there before stays
    assert IndexedDataset(tmp_path / "out").fingerprint == before and not verify_files(tmp_path / "out.manifest.json")


def test_a_full_disk(tmp_path, shards, capsys):
    write_shard(tmp_path / "in/data_5", make_instances(5, 1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit_bytes in (2000, 10_000):  # in the lengths of that shard, in the tokens of all
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
        try:
            assert imported(tmp_path, *NULL) == ExitStatus.NO_SPACE
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "bytes are free" in capsys.readouterr().err and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("policy", ["skip_after_eod", "all"])
@pytest.mark.parametrize("numbers", [range(3), range(2500, 7501, 2500)])
def test_scores_equal_the_slow_twin(tmp_path, shards, policy, numbers):
    instances = [ids for shard in shards for ids in shard]
    means = np.random.default_rng(0).exponential(3.0, len(instances)).astype(np.float32)
    write_scores(tmp_path / "pt", np.split(means, [200, 333]), numbers)
    flags = ("--scores", tmp_path / "pt", "--scores-output", tmp_path / "scores", "--seq-length", "12")
    assert imported(tmp_path, *NULL, *flags, "--scores-mask-policy", policy) == ExitStatus.COMPLETE
    dataset = IndexedDataset(tmp_path / "out")
    scores = Scores(tmp_path / "scores", expect_dataset=dataset.fingerprint)
    counts = [sum(policy == "all" or token != EOD for token in ids[:-1]) for ids in instances]
    assert scores.counts.tolist() == counts
    expected = np.array([-float(mean) * count for mean, count in zip(means, counts)], dtype=np.float32)
    assert np.array_equal(scores.log_probs, expected)
    told = scores.manifest.parameters
    assert (told["packing"], told["seq_length"], told["mask_policy"]) == ("document", 12, policy)
    assert scores.manifest.parents["model"].startswith("miniplm-scores:")
    assert scores.manifest.tokenizer == dataset.manifest.tokenizer and not verify_files(scores.manifest.path)


def test_scores_of_a_dataset_imported_before(tmp_path, shards):
    assert imported(tmp_path) == ExitStatus.COMPLETE
    for name in ("teacher", "reference"):
        means = np.random.default_rng(len(name)).exponential(3.0, 480).tolist()
        torch.save(torch.tensor(means), tmp_path / f"{name}.pt")
        flags = ("--scores", tmp_path / f"{name}.pt", "--scores-output", tmp_path / name, "--eod", EOD)
        assert imported(tmp_path, *flags, shards=False) == ExitStatus.COMPLETE
    teacher, reference = Scores(tmp_path / "teacher"), Scores(tmp_path / "reference")
    assert teacher.counts.tolist() == reference.counts.tolist()
    assert teacher.manifest.parents["dataset"] == reference.manifest.parents["dataset"]
    assert teacher.manifest.parents["model"] != reference.manifest.parents["model"]


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_scores_that_are_none(tmp_path, shards, capsys):
    assert imported(tmp_path, *NULL) == ExitStatus.COMPLETE
    folder = tmp_path / "pt"

    def refused(status, message, *flags):
        flags = ("--scores", folder, "--scores-output", tmp_path / "scores", *flags)
        assert imported(tmp_path, *flags, shards=False) == status
        captured = capsys.readouterr()
        assert message in captured.err and "executed" not in captured.out
        assert "weights_only" not in captured.err  # torch advises to run what the file holds
        assert not (tmp_path / "scores/scores.json").exists()

    refused(ExitStatus.USAGE, "no such file or folder")
    folder.mkdir()
    refused(ExitStatus.USAGE, "no scores_0.pt")
    good = [[1.0] * 160] * 3
    write_scores(folder, [[1.0] * 160, [1.0] * 159, [1.0] * 160])
    refused(ExitStatus.MISMATCH, "479 scores in 3 files")
    write_scores(folder, [*good, [1.0]])
    (folder / "scores_1.pt").unlink()
    refused(ExitStatus.CORRUPT, "scores_1.pt: missing")
    write_scores(folder, [*good, []])
    refused(ExitStatus.USAGE, "document 0 has", "--seq-length", "1")
    write_scores(folder, [good[0], [*[1.0] * 7, np.nan, *[1.0] * 152], good[0]])
    refused(ExitStatus.CORRUPT, "scores_1.pt: 1 values are not finite, the first is nan at 7")
    write_scores(folder, [good[0], [*[1.0] * 9, -0.5, *[1.0] * 150], good[0]])
    refused(ExitStatus.CORRUPT, "is not negative")
    torch.save(torch.ones(16, 10), folder / "scores_1.pt")
    refused(ExitStatus.CORRUPT, "torch.float32 [16, 10]")
    torch.save({"a": torch.ones(160)}, folder / "scores_1.pt")
    refused(ExitStatus.CORRUPT, "holds dict")
    torch.save(Hostile(), folder / "scores_1.pt")
    refused(ExitStatus.CORRUPT, "scores_1.pt: not a file with a tensor")
    torch.save(torch.sparse_coo_tensor([[0]], [1.0], (160,), check_invariants=True), folder / "scores_1.pt")
    refused(ExitStatus.CORRUPT, "expected a tensor of one axis")
    (folder / "scores_1.pt").write_bytes(b"")
    refused(ExitStatus.CORRUPT, "scores_1.pt: not a file with a tensor")
    write_scores(folder, good)
    (folder / "scores_1.pt").write_bytes((folder / "scores_1.pt").read_bytes()[:-99])
    refused(ExitStatus.CORRUPT, "scores_1.pt: not a file with a tensor")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to import"),
        (["--input-prefix", "{}/in/data", "--scores", "x"], "--scores-output go together"),
        (["--scores", "x", "--scores-output", "y", "--tokenizer-type", "ByteTokenizer"], "there is no --input-prefix"),
        (["--input-prefix", "{}/in/data", "--seq-length", "0"], "--seq-length 0"),
        (["--scores", "x", "--scores-output", "y", "--eod", "-1"], "--eod -1"),
        (["--input-prefix", "{}/none/data"], "no folder"),
        (["--input-prefix", "{}/in/data", "--output-prefix", "{}/in/data_0.bin/o"], "a file is in its place"),
        (["--input-prefix", "{}/in/data", "--output-prefix", "{}/in/data_3"], "the output is one of the shards"),
    ],
)
def test_wrong_flags(tmp_path, shards, capsys, flags, message):
    assert imported(tmp_path, *(flag.format(tmp_path) for flag in flags), shards=False) == ExitStatus.USAGE
    assert message in capsys.readouterr().err


def test_without_an_end_of_document_id_the_policy_must_be_told(tmp_path, shards, capsys):
    write_scores(tmp_path / "pt", [[1.0] * 480])
    flags = ("--scores", tmp_path / "pt", "--scores-output", tmp_path / "scores")
    assert imported(tmp_path, *flags) == ExitStatus.USAGE and "--eod" in capsys.readouterr().err
    assert imported(tmp_path, *flags, "--scores-mask-policy", "all") == ExitStatus.COMPLETE
