"""The indexed dataset against megakd's own slow twin, against megatron-core, and against damage."""

import gc
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.artefacts.manifest import hash_file, verify_files
from megakd.data.indexed import dataset as indexed
from megakd.data.indexed import idx_format
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter, best_dtype, concatenate, write_idx
from megakd.errors import CorruptError, MismatchError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*no manifest")


def documents_of(seed, num_documents=23, vocab_size=300):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, 40)) for _ in range(num_documents)]


def slow_bytes(documents, code, typecode):
    """The format written down value by value: the bytes of the .bin and of the .idx."""
    tokens = b"".join(struct.pack(f"<{len(d)}{typecode}", *d.tolist()) for d in documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(documents), len(documents) + 1)
    for document in documents:
        index += struct.pack("<i", len(document))
    position = 0
    for document in documents:
        index += struct.pack("<q", position)
        position += len(document) * struct.calcsize(f"<{typecode}")
    for number in range(len(documents) + 1):
        index += struct.pack("<q", number)
    return tokens, index


def write(prefix, documents, dtype=np.uint16, **arguments):
    with IndexedWriter(prefix, dtype) as writer:
        for first in range(0, len(documents), 5):
            few = documents[first : first + 5]
            writer.add_documents(np.concatenate(few), np.array([len(d) for d in few], dtype=np.int32))
        return writer.finish(**arguments)


@pytest.mark.parametrize(
    ("dtype", "code", "typecode"),
    [("u1", 1, "B"), ("i1", 2, "b"), ("i2", 3, "h"), ("i4", 4, "i"), ("i8", 5, "q"), ("u2", 8, "H")],
)
def test_bytes_equal_the_slow_twin(tmp_path, dtype, code, typecode):
    documents = documents_of(1, vocab_size=120)
    write(tmp_path / "d", documents, np.dtype(dtype))
    tokens, index = slow_bytes(documents, code, typecode)
    assert (tmp_path / "d.bin").read_bytes() == tokens
    assert (tmp_path / "d.idx").read_bytes() == index


def test_megatron_reads_ours_and_we_read_megatrons(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = documents_of(2)
    write(tmp_path / "ours", documents)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(documents)
    assert all(np.array_equal(theirs[i], document) for i, document in enumerate(documents))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.data_file.close()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    ours = IndexedDataset(tmp_path / "theirs")
    assert all(np.array_equal(ours[i], document) for i, document in enumerate(documents))


def test_documents_of_several_sequences(tmp_path):
    tokens = np.arange(20, dtype="<u2")
    tokens.tofile(tmp_path / "d.bin")
    write_idx(tmp_path / "d.idx", np.uint16, np.array([3, 0, 7, 10], np.int32), np.array([0, 1, 1, 3, 4], np.int64))
    dataset = IndexedDataset(tmp_path / "d")
    assert (dataset.num_documents, dataset.num_sequences, len(dataset)) == (4, 4, 4)
    assert [dataset.document(i).tolist() for i in range(4)] == [[0, 1, 2], [], list(range(3, 10)), list(range(10, 20))]
    assert dataset[2].tolist() == list(range(3, 10)) and dataset[-1].tolist() == list(range(10, 20))
    concatenate([tmp_path / "d", tmp_path / "d"], tmp_path / "dd")
    double = IndexedDataset(tmp_path / "dd")
    assert double.document_indices.tolist() == [0, 1, 1, 3, 4, 5, 5, 7, 8]
    assert np.array_equal(double.tokens, np.tile(tokens, 2))


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_outside_is_an_index_error(tmp_path, index):
    write(tmp_path / "d", documents_of(1, 4))
    with pytest.raises(IndexError):
        IndexedDataset(tmp_path / "d")[index]
    with pytest.raises(IndexError):
        IndexedDataset(tmp_path / "d").document(index)


def test_manifest_of_a_dataset(tmp_path):
    documents = documents_of(3)
    tokenizer = {"type": "bpe", "hash": "ab", "vocab_size": 300, "eod": 0, "path": "/t"}
    manifest = write(tmp_path / "d", documents, parameters={"keys": ["text"]}, parents={"x": "y"}, tokenizer=tokenizer)
    dataset = IndexedDataset(tmp_path / "d", expect_fingerprint=manifest.fingerprint)
    assert dataset.manifest == manifest and dataset.fingerprint == manifest.fingerprint
    assert dataset.max_token_id == max(int(d.max()) for d in documents if len(d))
    assert manifest.parameters["keys"] == ["text"] and manifest.parameters["dataset"]["num_documents"] == 23
    with pytest.raises(MismatchError, match=f"{manifest.fingerprint}, expected 00"):
        IndexedDataset(tmp_path / "d", expect_fingerprint="00")


def test_without_a_manifest(tmp_path):
    write(tmp_path / "d", documents_of(3))
    (tmp_path / "d.manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"verify --adopt .*/d"):
        dataset = IndexedDataset(tmp_path / "d")
    assert dataset.max_token_id is None and dataset.manifest is None
    assert dataset.fingerprint.startswith("unverified:")


def test_no_documents_and_no_tokens(tmp_path):
    for name, documents in (("none", []), ("empty", [np.zeros(0, int)] * 3)):
        write(tmp_path / name, documents)
        dataset = IndexedDataset(tmp_path / name)
        assert (dataset.num_documents, dataset.num_tokens, dataset.max_token_id) == (len(documents), 0, -1)
        assert [d.tolist() for d in dataset] == [[]] * len(documents)
        assert verify_files(tmp_path / f"{name}.manifest.json") == []


def test_arrays_outlive_the_dataset_and_cannot_be_written(tmp_path):
    documents = documents_of(4)
    write(tmp_path / "d", documents)
    dataset = IndexedDataset(tmp_path / "d")
    kept = [dataset.tokens, dataset.lengths, dataset.pointers, dataset.document_indices, dataset[1]]
    sums = [array.sum() for array in kept]
    del dataset
    gc.collect()
    assert [array.sum() for array in kept] == sums
    for array in kept:
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_a_dataset_rewritten_while_it_is_mapped(tmp_path):
    first, second = documents_of(5, 50), documents_of(6, 3)
    write(tmp_path / "d", first)
    dataset = IndexedDataset(tmp_path / "d")
    write(tmp_path / "d", second)
    assert np.array_equal(dataset.tokens, np.concatenate(first))
    assert np.array_equal(IndexedDataset(tmp_path / "d").tokens, np.concatenate(second))


def test_a_run_killed_between_the_renames_leaves_no_dataset(tmp_path, monkeypatch):
    """New tokens under an old index and manifest would be the one state that lies."""
    write(tmp_path / "d", documents_of(5))
    monkeypatch.setattr("megakd.data.indexed.writer.write_dataset_manifest", None)
    writer = IndexedWriter(tmp_path / "d", np.uint16)
    writer.add_documents(np.arange(5), np.array([5]))
    real = indexed.IndexedWriter.finish.__globals__["HashingWriter"].commit
    names = []

    def commit(self):
        names.append(self.final.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr("megakd.data.indexed.writer.HashingWriter.commit", commit)
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    assert names == ["d.bin", "d.idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin"]
    with pytest.raises(UsageError, match=r"d\.idx"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("dtype", "bad"), [(np.uint16, 65536), (np.uint16, 70000), (np.uint16, -1), (np.int32, -1), (np.int32, 2**31)]
)
def test_ids_that_do_not_fit_are_refused(tmp_path, dtype, bad):
    with IndexedWriter(tmp_path / "d", dtype) as writer, pytest.raises(UsageError, match=str(bad)):
        writer.add_documents(np.array([1, bad, 2]), np.array([3]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [([1, 2, 3], [1, 1], "sum to 2"), ([1], [2, -1], "length -1"), ([1.5], [1], "float64"), ([[1]], [1], "shape")],
)
def test_bad_documents_are_refused(tmp_path, tokens, lengths, message):
    with IndexedWriter(tmp_path / "d", np.int32) as writer, pytest.raises(UsageError, match=message):
        writer.add_documents(np.array(tokens), np.array(lengths))


def test_best_dtype():
    assert best_dtype(65499) == np.uint16 and best_dtype(65500) == np.int32
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (1, 65499, 65500, 65501, 200000):
        assert best_dtype(size) == megatron.DType.optimal_dtype(size)


def change(position, layout, value):
    def apply(raw):
        struct.pack_into(layout, raw, position, value)
        return raw

    return apply


LENGTHS, POINTERS = 34, 34 + 4 * 23
INDICES = POINTERS + 8 * 23
DAMAGE = {
    "magic": (change(0, "<B", 0), "starts with"),
    "version": (change(9, "<Q", 2), "version 2"),
    "dtype code unknown": (change(17, "<B", 9), "code 9"),
    "dtype code 0": (change(17, "<B", 0), "code 0"),
    "dtype of another size": (change(17, "<B", 4), "ends at byte|dtype"),
    "dtype of the same size": (change(17, "<B", 3), "dtype|ends"),
    "huge count": (change(18, "<Q", 2**62), "sequences"),
    "one sequence more": (change(18, "<Q", 24), "sequences"),
    "no document index": (change(26, "<Q", 0), "document indices"),
    "negative length": (change(LENGTHS + 8, "<i", -5), "length -5"),
    "longer length": (change(LENGTHS + 8, "<i", 1000), "starts at byte"),
    "last length": (change(LENGTHS + 4 * 22, "<i", 1000), "ends at byte"),
    "first pointer": (change(POINTERS, "<q", 2), "starts at byte 2"),
    "negative pointer": (change(POINTERS + 40, "<q", -2), "starts at byte -2"),
    "first document": (change(INDICES, "<q", 1), "run from 1"),
    "last document": (change(INDICES + 8 * 23, "<q", 22), "to 22"),
    "document order": (change(INDICES + 8 * 5, "<q", 9), "ends before it starts"),
    "cut by a byte": (lambda raw: raw[:-1], "bytes"),
    "cut in the header": (lambda raw: raw[:20], "header"),
    "empty": (lambda raw: raw[:0], "0 bytes"),
    "longer by a byte": (lambda raw: raw + b"\0", "bytes"),
}


# int16 for uint16 can only be told by the manifest
DAMAGED = [(damage, adopted) for damage in DAMAGE for adopted in (True, False) if adopted or "same size" not in damage]


@pytest.mark.parametrize(("damage", "adopted"), DAMAGED)
def test_a_damaged_index_is_refused(tmp_path, damage, adopted):
    write(tmp_path / "d", documents_of(7))
    apply, message = DAMAGE[damage]
    if not adopted:
        (tmp_path / "d.manifest.json").unlink()
    path = tmp_path / "d.idx"
    path.write_bytes(apply(bytearray(path.read_bytes())))
    with pytest.raises(CorruptError, match=message):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("adopted", [True, False])
def test_every_truncation_of_the_tokens_is_refused(tmp_path, adopted):
    write(tmp_path / "d", documents_of(8, 4))
    if not adopted:
        (tmp_path / "d.manifest.json").unlink()
    good = (tmp_path / "d.bin").read_bytes()
    for size in [*range(len(good)), len(good) + 1, len(good) + 2]:
        (tmp_path / "d.bin").write_bytes((good + b"\0\0")[:size])
        with pytest.raises(CorruptError):
            IndexedDataset(tmp_path / "d")


def test_a_long_index_with_a_manifest_is_checked_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_CHECK_AT_OPEN", 10)
    write(tmp_path / "d", documents_of(7))
    path = tmp_path / "d.idx"
    path.write_bytes(change(LENGTHS + 8, "<i", -5)(bytearray(path.read_bytes())))
    dataset = IndexedDataset(tmp_path / "d")
    for use in (lambda: dataset.lengths, lambda: dataset[0], lambda: dataset.document(0), lambda: dataset.pointers):
        with pytest.raises(CorruptError, match="length -5"):
            use()


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path / "d", documents_of(7))
    (tmp_path / f"d.{missing}").unlink()
    with pytest.raises(UsageError, match=rf"d\.{missing}"):
        IndexedDataset(tmp_path / "d")


def test_float_and_multimodal_indices_are_refused_as_such(tmp_path):
    write(tmp_path / "d", documents_of(7))
    path = tmp_path / "d.idx"
    good = path.read_bytes()
    path.write_bytes(change(17, "<B", 7)(bytearray(good)))
    with pytest.raises(UsageError, match="floating"):
        IndexedDataset(tmp_path / "d")
    path.write_bytes(good + bytes(23))
    with pytest.raises(UsageError, match="multimodal"):
        IndexedDataset(tmp_path / "d")


def test_swapped_files_are_refused_and_renamed_ones_are_the_same_dataset(tmp_path):
    write(tmp_path / "a", documents_of(1))
    write(tmp_path / "b", documents_of(2))
    (tmp_path / "a.bin").rename(tmp_path / "t")
    (tmp_path / "b.bin").rename(tmp_path / "a.bin")
    with pytest.raises(CorruptError):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    before = IndexedDataset(tmp_path / "b")
    for suffix in ("bin", "idx", "manifest.json"):
        (tmp_path / f"b.{suffix}").rename(tmp_path / f"c.{suffix}")
    after = IndexedDataset(tmp_path / "c", expect_fingerprint=before.fingerprint)
    assert np.array_equal(after.tokens, before.tokens) and verify_files(tmp_path / "c.manifest.json") == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 9), max_size=40), chunk=st.integers(1, 9), several=st.booleans())
def test_index_round_trip_over_chunk_edges(tmp_path, monkeypatch, lengths, chunk, several):
    monkeypatch.setattr(idx_format, "_CHUNK", chunk)
    monkeypatch.setattr("megakd.data.indexed.concatenate._INDEX_CHUNK", chunk)
    lengths = np.array(lengths, dtype=np.int32)
    np.arange(lengths.sum(), dtype=np.int32).tofile(tmp_path / "d.bin")
    indices = np.arange(0, len(lengths) + 1, 2 if several else 1)
    indices = np.unique(np.append(indices, len(lengths)))
    write_idx(tmp_path / "d.idx", np.int32, lengths, indices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = IndexedDataset(tmp_path / "d")
        concatenate([tmp_path / "d"] * 2, tmp_path / "dd")
    assert np.array_equal(dataset.lengths, lengths) and np.array_equal(dataset.document_indices, indices)
    starts = np.cumsum(lengths) - lengths
    assert np.array_equal(dataset.pointers, 4 * starts)
    assert [s.tolist() for s in dataset] == [list(range(a, a + n)) for a, n in zip(starts, lengths)]
    assert np.array_equal(IndexedDataset(tmp_path / "dd").lengths, np.tile(lengths, 2))


def test_concatenated_parts_equal_one_writer(tmp_path):
    documents = documents_of(9, 31)
    whole = write(tmp_path / "whole", documents)
    parts, first = [], 0
    for number, count in enumerate([0, 7, 1, 23]):
        few = documents[first : first + count]
        first += count
        np.concatenate([np.zeros(0, int), *few]).astype("<u2").tofile(tmp_path / f"{number}.tokens")
        np.save(tmp_path / f"{number}.npy", np.array([len(d) for d in few], dtype=np.int32))
        parts.append((tmp_path / f"{number}.tokens", tmp_path / f"{number}.npy"))
    seen = []
    joined = concatenate(parts, tmp_path / "joined", dtype=np.uint16, progress=seen.append)
    assert joined.fingerprint == whole.fingerprint and joined.parameters == whole.parameters
    assert sum(seen) == whole.files[0].size_bytes
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_concatenate_refuses_what_does_not_fit(tmp_path):
    write(tmp_path / "a", documents_of(1))
    write(tmp_path / "b", documents_of(1), np.int32)
    with pytest.raises(MismatchError, match=r"uint16.*int32"):
        concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    np.save(tmp_path / "short.npy", np.array([1], np.int32))
    with pytest.raises(CorruptError, match="counts 1 tokens"):
        concatenate([(tmp_path / "a.bin", tmp_path / "short.npy")], tmp_path / "c", dtype=np.uint16)
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptError, match="dtype"):
        concatenate([(tmp_path / "a.bin", tmp_path / "evil.npy")], tmp_path / "c", dtype=np.uint16)
    with pytest.raises(UsageError, match="dtype"):
        concatenate([(tmp_path / "a.bin", tmp_path / "short.npy")], tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_records_of_a_written_dataset_are_the_files(tmp_path):
    manifest = write(tmp_path / "d", documents_of(2))
    assert list(manifest.files) == [hash_file(tmp_path / "d.bin"), hash_file(tmp_path / "d.idx")]
