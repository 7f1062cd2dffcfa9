"""Where documents begin in samples: by the index and by end-of-document ids, equal to a walk over the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.indexed.idx_format import write_idx
from megakd.data.loader import Loader
from megakd.data.samples.boundaries import (
    INDEX,
    INDEX_AND_IDS,
    begins_document,
    boundaries_of,
    check_boundaries,
    starts_between,
)
from megakd.data.samples.concat import ConcatSamples
from megakd.data.samples.documents import DocumentSamples
from megakd.data.samples.protocol import Samples
from megakd.data.samples.selected import SelectedSamples
from megakd.data.selection import Selection, SelectionWriter
from megakd.errors import UsageError

EOD, SEQ = 0, 13  # 0 is what stands behind a short sample too
TEXT: dict[str, Any] = {"append_eod": False}


def documents_of(kind: str, seed: int = 0) -> list[list[int]]:
    """Random documents, some empty: with an id at the end, without, or some of either, with literals in the middle."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 50, length).tolist() for length in rng.integers(0, 12, 300)]
    if kind == "with":
        return [[*text, EOD] for text in texts]
    if kind == "mixed":
        texts = [[*text[:3], EOD, *text[3:]] if rng.random() < 0.2 else text for text in texts]
        return [[*text, EOD] if rng.random() < 0.5 else text for text in texts]
    return texts


def write(prefix: Path, documents: list[list[int]], parameters: dict[str, Any]) -> IndexedDataset:
    with IndexedWriter(prefix, np.uint16) as writer:
        lengths = np.array([len(document) for document in documents], np.int32)
        writer.add_documents(np.array([token for document in documents for token in document], np.int64), lengths)
        writer.finish(parameters=parameters)
    return IndexedDataset(prefix)


def starts_of(documents: list[list[int]]) -> list[int]:
    """The twin: token positions of the documents' first tokens; an empty document has none of its own."""
    found, position = [], 0
    for document in documents:
        if document:
            found.append(position)
        position += len(document)
    return found


def masked_positions(samples: Samples, eod: int | None) -> set[int]:
    """Token positions of the labels that a loader with eod_mask_loss leaves out."""
    loader = Loader(
        Blend([samples], None, 0),
        seq_length=samples.seq_length,
        micro_batch_size=1,
        global_batch_size=1,
        eod_token=eod,
        eod_mask_loss=True,
    )
    ids = np.arange(samples.num_samples)
    left_out = ~loader.read(np.zeros_like(ids), ids).loss_mask_BS
    left_out &= np.arange(1, samples.seq_length + 1) < samples.lengths(ids)[:, None]
    return set((samples.starts(ids)[:, None] + 1 + np.arange(samples.seq_length))[left_out].tolist())


@pytest.mark.parametrize("kind", ["with", "without", "mixed"])
@pytest.mark.parametrize("packing", ["concat", "document", "selection"])
def test_masked_labels_are_first_tokens_and_what_follows_an_id(kind: str, packing: str, tmp_path: Path) -> None:
    documents = documents_of(kind)
    dataset = write(tmp_path / "d", documents, TEXT)
    samples: Samples = DocumentSamples(dataset, SEQ) if packing == "document" else ConcatSamples(dataset, SEQ)
    if packing == "selection":
        with SelectionWriter(tmp_path / "s") as writer:
            writer.append(np.arange(1, samples.num_samples, 3))
            writer.finish(
                packing="concat",
                seq_length=SEQ,
                num_samples=samples.num_samples,
                dataset=dataset.fingerprint,
                rule={},
            )
        samples = SelectedSamples(samples, Selection(tmp_path / "s"))
    tokens, starts, ids = dataset.tokens.tolist(), set(starts_of(documents)), np.arange(samples.num_samples)
    labels = {
        position
        for start, length in zip(samples.starts(ids).tolist(), samples.lengths(ids).tolist())
        for position in range(start + 1, start + length)
    }
    expected = {p for p in labels if p in starts or tokens[p - 1] == EOD}
    assert masked_positions(samples, EOD) == expected
    assert masked_positions(samples, None) == {p for p in labels if p in starts}
    if packing == "concat":
        assert expected, "nothing is masked: the test cannot fail"


def test_the_same_labels_with_and_without_an_id_at_the_end(tmp_path: Path) -> None:
    """In the order of the documents, the same first tokens are left out; with the ids there are these labels more."""
    texts = [text for text in documents_of("without") if text]
    bare = ConcatSamples(write(tmp_path / "bare", texts, TEXT), 1)
    ended = ConcatSamples(write(tmp_path / "ended", [[*text, EOD] for text in texts], TEXT), 1)
    first = [sorted(masked_positions(samples, EOD)) for samples in (bare, ended)]
    assert len(first[0]) == len(first[1]) == len(texts) - 1
    assert [bare.dataset.tokens[p] for p in first[0]] == [ended.dataset.tokens[p] for p in first[1]]


@pytest.mark.filterwarnings("ignore:.*no manifest")
def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """An index of Megatron's in which documents have none, one or several sequences, some of them empty."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, 200).astype(np.int32)
    first = np.unique(rng.integers(0, 201, 90))
    indices = np.concatenate([[0, 0], first[(first > 0) & (first < 200)], [200, 200]])
    rng.integers(0, 9, lengths.sum()).astype(np.uint16).tofile(tmp_path / "d.bin")
    write_idx(tmp_path / "d.idx", np.uint16, lengths, indices)
    dataset = IndexedDataset(tmp_path / "d")
    starts = np.concatenate([[0], np.cumsum(lengths)])[indices]
    starts = starts[starts < dataset.num_tokens]
    for start, stop in ((0, dataset.num_tokens), (0, 0), (7, 60), (int(starts[5]), int(starts[9])), (3, 4)):
        expected = starts[(starts >= start) & (starts < stop)]
        assert set(starts_between(dataset, start, stop).tolist()) == set(expected.tolist())


def test_a_literal_inside_a_text_is_no_boundary_of_documents(tmp_path: Path) -> None:
    """Where the manifest tells that documents are texts; in others, which may hold several, it is, as in Megatron."""
    documents = [[4, EOD, 5, 6], [7, 8, EOD], [9, 9, 9]]
    for parameters, told, first in (
        (TEXT, INDEX, [0, 4, 7]),
        ({"refined": {}}, INDEX_AND_IDS, [0, 2, 4, 7]),
        ({"append_eod": True, "source_tokenizer": {}}, INDEX_AND_IDS, [0, 2, 4, 7]),  # retokenized, of anything
    ):
        dataset = write(tmp_path / "d", documents, parameters)
        assert boundaries_of(dataset) == told
        samples, ids = ConcatSamples(dataset, 9), np.array([0])
        eod = EOD if told == INDEX_AND_IDS else None
        found = begins_document(samples, ids, samples.read(ids), eod_token=eod)
        assert np.flatnonzero(found[0]).tolist() == first
        assert masked_positions(samples, EOD) == {2, 4, 7}  # of the loss, behind any id: Megatron's flag


def test_no_known_id_is_refused_only_where_documents_may_hold_several_texts(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts", [[1, 2]], TEXT)
    with pytest.warns(UserWarning, match="--x: no end-of-document id is known"):
        assert check_boundaries(texts, None, "--x", instead="") is None
    assert check_boundaries(texts, {"eod": None}, "--x", instead="") is None
    assert check_boundaries(texts, {"eod": 7}, "--x", instead="") == 7
    refined = write(tmp_path / "refined", [[1, 2]], {"refined": {}})
    assert check_boundaries(refined, {"eod": None}, "--x", instead="") is None
    with pytest.raises(UsageError, match=r"--x needs the end-of-document id: .*; drop it"):
        check_boundaries(refined, None, "--x", instead="drop it")
