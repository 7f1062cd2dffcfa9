"""The logits store: what was written comes back to those it is meant for, and to nobody else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from logits.rows import as_dicts, random_counts, random_rows
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.codec import Rows, identity_ranks, invert, rank_by_frequency
from megakd.logits.read_ahead import ReadAhead
from megakd.logits.spec import MANIFEST, StoreSpec, read_ids_of_ranks, shard_path
from megakd.logits.store import LogitsStore, verify_store
from megakd.logits.store_writer import finish_store, read_shard, write_shard

VOCAB, SEQ = 500, 16
SPEC = StoreSpec(
    kind="top_p_k",
    value_bits=32,
    top_k=20,
    top_p=0.95,
    vocab_size=VOCAB,
    packing="concat",
    seq_length=SEQ,
    num_samples=22,
    shard_samples=5,
    parents={"dataset": "d" * 32, "model": "m" * 32},
    tokenizer={"type": "NullTokenizer", "hash": "t" * 32, "vocab_size": VOCAB, "eod": None, "path": "/x"},
    details={"precision": "fp32"},
)
RANKS = rank_by_frequency(np.random.default_rng(0).integers(0, 9, VOCAB))
WITHOUT = {3, 10, 11, 12, 13, 14}  # samples without targets; those from 10 on are a whole shard


def input_ids(sample: int) -> NDArray[np.int64]:
    """Samples are of different lengths; the loader gives zeros behind a shorter one."""
    length = SEQ - (sample % 3)
    return np.random.default_rng(sample).integers(1, VOCAB, length)


def padded(sample: int) -> NDArray[np.int64]:
    return np.pad(input_ids(sample), (0, SEQ))[:SEQ]


def rows_of(sample: int) -> Rows:
    return random_rows(sample, len(input_ids(sample)), VOCAB, 20 + sample % 4)


def write_part(folder: Path, shard: int, spec: StoreSpec = SPEC) -> None:
    writer = write_shard(folder, spec, RANKS, shard)
    for sample in range(*spec.samples_of(shard)):
        if sample not in WITHOUT:
            writer.add(sample, input_ids(sample), rows_of(sample))
    writer.commit()


def write_store(folder: Path, spec: StoreSpec = SPEC) -> Path:
    shards = [0, 1, 3, 4]
    for shard in reversed(shards):  # in any order
        write_part(folder, shard, spec)
    finish_store(folder, spec, RANKS, present=shards)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_what_was_written_comes_back(written: Path) -> None:
    store = LogitsStore(written, dataset="d" * 32, tokenizer="t" * 32, packing="concat", seq_length=SEQ, max_open=2)
    assert store.spec == SPEC
    for sample in np.random.default_rng(1).permutation(SPEC.num_samples).tolist():
        found = store.read(sample, padded(sample))
        assert store.has_targets(sample) == (sample not in WITHOUT)
        if sample in WITHOUT:
            assert found is None
        else:
            assert found is not None and as_dicts(found) == as_dicts(rows_of(sample))
            assert found.num_rows == len(input_ids(sample))
    with pytest.raises(IndexError, match="sample 22 of 22"):
        store.read(22, padded(0))
    assert store.manifest.parameters["samples_with_targets"] == SPEC.num_samples - len(WITHOUT)
    assert verify_store(written) == []


@pytest.mark.parametrize("width", [None, 30])
def test_a_batch_is_its_samples(written: Path, width: int | None) -> None:
    store = LogitsStore(written)
    ids = np.array([7, 3, 12, 21, 7])
    batch = store.read_batch(ids, np.stack([padded(sample) for sample in ids.tolist()]), width=width)
    assert batch.ids_BSK.shape == batch.log_probs_BSK.shape == (5, SEQ, width or 22)
    for at, sample in enumerate(ids.tolist()):
        own = Rows(batch.ids_BSK[at], batch.log_probs_BSK[at], batch.entropy_BS[at])
        expected = [] if sample in WITHOUT else as_dicts(rows_of(sample))
        assert as_dicts(own) == expected + [{}] * (SEQ - len(expected))
        assert batch.has_targets_BS[at].tolist() == [True] * len(expected) + [False] * (SEQ - len(expected))
        assert (own.ids_TK[len(expected) :] == 0).all() and (own.entropy_T[len(expected) :] == 0).all()
    with pytest.raises(UsageError, match="rows of up to 22 ids, asked for 21"):
        store.read_batch(ids, np.stack([padded(sample) for sample in ids.tolist()]), width=21)
    nothing = store.read_batch(np.array([3, 12]), np.stack([padded(3), padded(12)]))
    assert nothing.ids_BSK.shape == (2, SEQ, 0) and not nothing.has_targets_BS.any()


@pytest.mark.parametrize("threads, ahead", [(1, 1), (3, 4)])
def test_batches_come_ahead_in_order_and_bounded(written: Path, threads: int, ahead: int) -> None:
    store = LogitsStore(written, max_open=1)
    taken = []

    def requests():
        for sample in range(SPEC.num_samples):
            taken.append(sample)
            yield np.array([sample]), padded(sample)[None]

    read_ahead = ReadAhead(threads=threads, ahead=ahead)
    for sample, batch in enumerate(read_ahead(lambda request: store.read_batch(*request), requests())):
        assert len(taken) <= sample + ahead
        expected = store.read_batch(np.array([sample]), padded(sample)[None])
        np.testing.assert_array_equal(batch.ids_BSK, expected.ids_BSK)
        np.testing.assert_array_equal(batch.log_probs_BSK, expected.log_probs_BSK)
    assert sample == SPEC.num_samples - 1


def test_a_fault_shows_when_its_turn_comes(written: Path) -> None:
    requests = [(np.array([sample]), padded(7)[None]) for sample in (7, 8)]
    store = LogitsStore(written)
    batches = ReadAhead(ahead=5)(lambda request: store.read_batch(*request), requests)
    assert next(batches).has_targets_BS.any()
    with pytest.raises(MismatchError, match="sample 8 was captured with other input ids"):
        next(batches)


def test_the_same_rows_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "again")
    for path in sorted(written.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes(), path


def test_counts_are_exact(tmp_path: Path) -> None:
    spec = replace(SPEC, kind="samples", draws=50, num_samples=5, seed=7)
    writer = write_shard(tmp_path, spec, identity_ranks(VOCAB), 0)
    drawn = [random_counts(sample, len(input_ids(sample)), VOCAB, 50) for sample in range(5)]
    for sample, (ids, counts) in enumerate(drawn):
        entropy = np.full(len(ids), sample, np.float32)
        writer.add(sample, input_ids(sample), Rows.from_counts(ids, counts, entropy, draws=50))
    writer.commit()
    finish_store(tmp_path, spec, identity_ranks(VOCAB))
    store = LogitsStore(tmp_path)
    for sample, (ids, counts) in enumerate(drawn):
        found = store.read(sample, input_ids(sample))
        assert found is not None and (found.entropy_T == sample).all()
        for row in range(len(ids)):
            before = dict(zip(ids[row].tolist(), counts[row].tolist()))
            after = dict(zip(found.ids_TK[row].tolist(), found.counts(50)[row].tolist()))
            assert {i: c for i, c in before.items() if c} == {i: c for i, c in after.items() if c}


def test_samples_are_added_in_order(tmp_path: Path) -> None:
    writer = write_shard(tmp_path, SPEC, RANKS, 1)
    for wrong in (4, 10):
        with pytest.raises(UsageError, match=f"sample {wrong}: shard 00000001 has samples 5 to 9"):
            writer.add(wrong, input_ids(wrong), rows_of(wrong))
    writer.add(6, input_ids(6), rows_of(6))
    with pytest.raises(UsageError, match="sample 6: .* stands at 7"):
        writer.add(6, input_ids(6), rows_of(6))
    with pytest.raises(UsageError, match="15 rows for 14 input ids"):
        writer.add(7, input_ids(8), rows_of(7))
    bad = rows_of(7)
    bad.ids_TK[:, 0] = VOCAB
    with pytest.raises(UsageError, match=f"sample 7: .*id {VOCAB} of {VOCAB}"):
        writer.add(7, input_ids(7), replace(bad, log_probs_TK=np.full_like(bad.log_probs_TK, -9)))
    with pytest.raises(UsageError, match="3 ranks for a vocabulary of 500"):
        write_shard(tmp_path, SPEC, identity_ranks(3), 1)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"dataset": "e" * 32}, "a store of dataset dddd.*, expected eeee"),
        ({"tokenizer": "u" * 32}, "a store of tokenizer tttt.*, expected uuuu"),
        ({"packing": "sentence"}, "a store of packing concat, expected sentence"),
        ({"seq_length": 32}, "a store of seq_length 16, expected 32"),
    ],
)
def test_a_store_of_something_else_is_refused(written: Path, asked: dict, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        LogitsStore(written, **asked)


def test_rows_meet_no_other_context(written: Path) -> None:
    store = LogitsStore(written)
    for sample in (0, 7, 21):
        for change in range(len(input_ids(sample))):
            other = padded(sample)
            other[change] += 1
            with pytest.raises(MismatchError, match=f"sample {sample} was captured with other input ids"):
                store.read(sample, other)
            with pytest.raises(MismatchError):
                store.read_batch(np.array([sample]), other[None])
    with pytest.raises(MismatchError, match="other input ids"):
        store.read(9, padded(9)[: SEQ - 1])


def test_a_shard_of_another_store_is_refused(folder: Path, tmp_path: Path) -> None:
    assert read_shard(folder, SPEC, RANKS, 0) is not None
    assert read_shard(folder, SPEC, RANKS, 2) is None
    for change, message in (
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"parents": {**SPEC.parents, "model": "n" * 32}}, "model: mmm.* there, nnn"),
        ({"details": {"precision": "bf16"}}, "precision"),
    ):
        with pytest.raises(MismatchError, match=message):
            read_shard(folder, replace(SPEC, **change), RANKS, 0)
    with pytest.raises(MismatchError, match="ranks: "):
        finish_store(folder, SPEC, identity_ranks(VOCAB), present=[0])
    write_part(tmp_path / "other", 0, replace(SPEC, details={"precision": "bf16"}))
    for path in (tmp_path / "other" / "shards").iterdir():
        shutil.copy(path, folder / "shards")
    with pytest.raises(CorruptError, match="it was replaced"):
        LogitsStore(folder).read(0, padded(0))
    assert any("00000000.json" in fault and "names" in fault for fault in verify_store(folder))


@pytest.mark.parametrize("suffix", [".rows", ".index", ".json"])
def test_a_shard_that_is_missing_or_cut(folder: Path, suffix: str) -> None:
    path = shard_path(folder, 3).with_suffix(suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    if suffix == ".json":
        with pytest.raises(CorruptError):
            LogitsStore(folder).read(15, padded(15))
    else:
        with pytest.raises(CorruptError, match=f"{path.name}: {len(whole) - 1} bytes on disk, {len(whole)} in"):
            LogitsStore(folder)
        assert read_shard(folder, SPEC, RANKS, 3) is None
        with pytest.raises(UsageError, match="missing or not whole"):
            finish_store(folder, SPEC, RANKS, present=[3])
    assert verify_store(folder)
    path.unlink()
    with pytest.raises(CorruptError, match=f"{path.name}: missing"):
        LogitsStore(folder)
    assert verify_store(folder)


@pytest.mark.slow
def test_every_flipped_byte_of_a_shard_is_found(folder: Path) -> None:
    """By verify, and by whoever reads a sample that it concerns: no other rows come back."""
    rng = np.random.default_rng(2)
    for suffix in (".rows", ".index"):
        path = shard_path(folder, 1).with_suffix(suffix)
        whole = path.read_bytes()
        for place in rng.choice(len(whole), 25, replace=False).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert any(path.name in fault for fault in verify_store(folder))
            store, refused = LogitsStore(folder), 0
            for sample in range(5, 10):
                try:
                    found = store.read(sample, padded(sample))
                except CorruptError as error:
                    assert path.name in str(error)
                    refused += 1
                else:
                    assert found is not None and as_dicts(found) == as_dicts(rows_of(sample))
            assert refused == 5 if suffix == ".index" else refused <= 1
            assert refused or place >= len(whole) - 16  # nothing is in the bytes to read ahead
        path.write_bytes(whole)


def test_ranks_and_manifest_that_were_changed(folder: Path) -> None:
    ranks = (folder / "order.i32").read_bytes()
    (folder / "order.i32").write_bytes(ranks[4:] + ranks[:4])
    with pytest.raises(CorruptError, match="order.i32: it is not what was written"):
        LogitsStore(folder)
    (folder / "order.i32").write_bytes(ranks)
    LogitsStore(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["version"] = 3
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="the manifest was changed"):
        LogitsStore(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match="no manifest here"):
        LogitsStore(folder)


def test_specs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected dataset and model"):
        replace(SPEC, parents={"dataset": "d"})
    with pytest.raises(UsageError, match="at least 1"):
        replace(SPEC, shard_samples=0)
    with pytest.raises(UsageError, match="draws 0"):
        replace(SPEC, kind="samples")


def test_stores_that_are_older_than_a_parameter(written: Path) -> None:
    manifest = LogitsStore(written).manifest
    older = {name: value for name, value in manifest.parameters.items() if name != "proposal_exponent"}
    assert StoreSpec.of(replace(manifest, parameters=older)) == StoreSpec.of(manifest)
    with pytest.raises(CorruptError, match="parameters without kind"):
        StoreSpec.of(replace(manifest, parameters={name: value for name, value in older.items() if name != "kind"}))


def test_a_store_of_version_1_reads_as_before(tmp_path: Path) -> None:
    """Its ranks lie whole in ranks.i32, and its manifests say 1."""
    new, old = tmp_path / "new", tmp_path / "old"
    write_store(new)
    shutil.copytree(new, old)
    store = LogitsStore(new)
    listed = []
    for number, entry in enumerate(store.manifest.parameters["shards"]):
        shard = None if entry is None else read_manifest(shard_path(old, number))
        if shard is not None:
            entry = [_as_version_1(shard).fingerprint, *entry[1:]]
        listed.append(entry)
    (old / "order.i32").unlink()
    with HashingWriter(old / "ranks.i32") as writer:
        writer.write(RANKS.astype("<i4").data)
        files = [writer.commit()]
    whole = replace(store.manifest, path=old / "store.json", files=tuple(files))
    _as_version_1(replace(whole, parameters={**whole.parameters, "shards": listed}))
    found = LogitsStore(old)
    assert found.manifest.version == 1 and verify_store(old) == []
    for sample in set(range(SPEC.num_samples)) - WITHOUT:
        before, after = store.read(sample, input_ids(sample)), found.read(sample, input_ids(sample))
        assert before is not None and after is not None
        for one, other in zip(vars(before).values(), vars(after).values()):
            np.testing.assert_array_equal(one, other)


def _as_version_1(manifest: Manifest) -> Manifest:
    return write_manifest(
        manifest.path,
        format=manifest.format,
        version=1,
        parameters=manifest.parameters,
        parents=manifest.parents,
        tokenizer=manifest.tokenizer,
        files=manifest.files,
    )


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [5, 0, 0, 0], [0, 0, 0, 9], [3, 4, 5, 0], [0, 0, 7, 7], [9, 8, 7, 6]])
def test_ids_that_never_occur_take_no_bytes(counts: list[int], tmp_path: Path) -> None:
    ranks = rank_by_frequency(np.array(counts))
    spec = replace(SPEC, vocab_size=4)
    manifest = finish_store(tmp_path, spec, ranks, present=[])
    np.testing.assert_array_equal(invert(read_ids_of_ranks(manifest)), ranks)
    assert (tmp_path / "order.i32").stat().st_size <= 4 * len([count for count in counts if count])
