"""Samples of concat packing are slices of the token stream."""

import numpy as np
import pytest

from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import UsageError


def dataset_of(tmp_path, num_tokens, dtype=np.uint16):
    with IndexedWriter(tmp_path / "d", dtype) as writer:
        writer.add_documents(np.random.default_rng(num_tokens).integers(0, 99, num_tokens), np.array([num_tokens]))
        writer.finish()
    return IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<i8"])
@pytest.mark.parametrize(("num_tokens", "seq_length"), [(2, 1), (8, 7), (15, 7), (14, 7), (100, 13), (253, 252)])
def test_samples_are_slices(tmp_path, num_tokens, seq_length, dtype):
    dataset = dataset_of(tmp_path, num_tokens, dtype)
    samples = ConcatSamples(dataset, seq_length)
    stream = dataset.tokens.tolist()
    twin = [stream[i : i + seq_length + 1] for i in range(0, num_tokens - seq_length, seq_length)]
    assert samples.num_samples == len(twin)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(twin)), 2))
    rows = samples.read(ids)
    assert rows.dtype == np.int64 and rows.shape == (len(ids), seq_length + 1)
    assert rows.tolist() == [twin[i] for i in ids]
    assert [stream[start] for start in samples.starts(ids)] == rows[:, 0].tolist()
    samples.prefetch(ids)


def test_every_token_but_the_first_is_a_label_once(tmp_path):
    samples = ConcatSamples(dataset_of(tmp_path, 64), 7)
    labels = samples.read(np.arange(samples.num_samples))[:, 1:]
    assert np.array_equal(labels.reshape(-1), samples.dataset.tokens[1:])


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_too_few_tokens(tmp_path, num_tokens):
    with pytest.raises(UsageError, match=f"{num_tokens} tokens .* takes 8"):
        ConcatSamples(dataset_of(tmp_path, num_tokens), 7)


def test_ids_outside(tmp_path):
    samples = ConcatSamples(dataset_of(tmp_path, 64), 7)
    for bad in (-1, 9):
        with pytest.raises(IndexError):
            samples.read(np.array([0, bad]))
