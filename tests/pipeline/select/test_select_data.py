"""What selecting does with the datasets themselves: bytes, domains of documents, refined copies."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.select.select_twin import ordered, scores_of, write

from megakd.artefacts.manifest import verify_files
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.samples.concat import ConcatSamples
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.scores import sample_bytes as select_bytes
from megakd.data.selection import Selection
from megakd.data.tokenizer import ByteTokenizer, NullTokenizer
from megakd.errors import MismatchError, UsageError
from megakd.pipeline.select import materialize as select_materialize
from megakd.pipeline.select.main import main

SEQ = 7
VOCAB = 40


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """Documents of many lengths, each ended by the id 39; ids of one and of two digits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 60).astype(np.int32)
    tokens = rng.integers(0, VOCAB - 1, lengths.sum())
    tokens[np.cumsum(lengths) - 1] = VOCAB - 1
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(tokens, lengths)
        writer.finish(tokenizer=NullTokenizer(VOCAB - 1).describe())
    return IndexedDataset(tmp_path / "data")


def write_pair(folder: Path, samples: Samples, **other: Any) -> tuple[list[str], Any, Any, Any]:
    """Scores of both models; the flags that name them, and the arrays."""
    rng = np.random.default_rng(1)
    counts = samples.lengths(np.arange(samples.num_samples)) - 1
    teacher, reference = (rng.normal(-3, 1, len(counts)).astype(np.float32) * counts for _ in range(2))
    told = {"dataset": samples.dataset.fingerprint, "seq_length": samples.seq_length, "packing": samples.packing}
    for kind, values in (("t", teacher), ("r", reference)):
        write(folder / kind, values, counts, model=kind, tokenizer=samples.dataset.manifest.tokenizer, **told, **other)
    flags = ["--teacher-scores", folder / "t", "--reference-scores", folder / "r", "--output", folder / "out"]
    flags += ["--data-path", samples.dataset.prefix]
    return [str(word) for word in flags], teacher, reference, counts


@pytest.mark.parametrize("mask_policy", ["all", "skip_after_eod"])
def test_per_byte(
    tmp_path: Path,
    dataset: IndexedDataset,
    mask_policy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(select_bytes, "_SAMPLES_AT_ONCE", 13)
    samples = ConcatSamples(dataset, SEQ)
    flags, teacher, reference, _ = write_pair(tmp_path, samples, mask_policy=mask_policy)
    sizes = [len(str(i)) + 1 for i in range(VOCAB - 1)] + [0]
    num_bytes = []
    for row in samples.read(np.arange(samples.num_samples)).tolist():
        scored = [
            label for inside, label in itertools.pairwise(row) if not (mask_policy != "all" and inside == VOCAB - 1)
        ]
        num_bytes.append(sum(sizes[label] for label in scored))
    assert main([*flags, "--normalise", "byte"]) == 0
    scores = scores_of([(1.0, reference), (-1.0, teacher)], num_bytes)
    order = ordered(scores, range(len(scores)), [dataset.fingerprint] * len(scores), 1234)
    assert Selection(tmp_path / "out").ids.tolist() == sorted(order[: len(scores) // 2])
    printed = capsys.readouterr().err
    assert f"warning: {dataset.prefix}: the dataset does not record the bytes of its text" in printed


def test_domains_are_ranges_of_documents(tmp_path: Path, dataset: IndexedDataset, capsys: Any) -> None:
    samples = ConcatSamples(dataset, SEQ)
    flags, teacher, reference, counts = write_pair(tmp_path, samples)
    (tmp_path / "domains").write_text("# name first stop\nweb 30 44\nbooks 0 10\n\nweb 10 21\n")
    assert main([*flags, "--domains", str(tmp_path / "domains"), "--allocation", "equal", "--ratio", "0.25"]) == 0
    starts = [int(p) // 2 for p in dataset.pointers]
    names = ["books"] * 10 + ["web"] * 11 + ["other"] * 9 + ["web"] * 14 + ["other"] * 16
    domains = [
        names[max(d for d in range(len(starts)) if starts[d] <= s)] for s in samples.starts(np.arange(len(counts)))
    ]
    scores, expected = scores_of([(1.0, reference), (-1.0, teacher)], counts), []
    for name in ("books", "web", "other"):
        own = [i for i, domain in enumerate(domains) if domain == name]
        order = ordered(scores[own], own, [dataset.fingerprint] * len(own), 1234)
        expected += [own[at] for at in order[: len(own) // 4]]
    assert Selection(tmp_path / "out").ids.tolist() == sorted(expected)
    assert all(name in capsys.readouterr().out for name in ("books",))
    (tmp_path / "out" / "selection.json").unlink()
    (tmp_path / "domains").write_text("web 0 11\nbooks 10 20\n")
    with pytest.raises(UsageError, match="domain books, documents 10 to 20: .* overlaps"):
        main([*flags, "--domains", str(tmp_path / "domains")])

    (tmp_path / "domains").write_bytes(b"\xff 0 11\n")
    with pytest.raises(UsageError, match="expected lines of UTF-8"):
        main([*flags, "--domains", str(tmp_path / "domains")])


def test_bytes_where_the_last_document_is_empty(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.array([97, 98, 99, 97, 256]), np.array([3, 0, 2, 0], np.int32))
        writer.finish(tokenizer=ByteTokenizer().describe())
    samples = open_samples("document", IndexedDataset(tmp_path / "data"), SEQ, ByteTokenizer)
    sizes = select_bytes.sample_bytes(samples, ByteTokenizer().token_bytes(), skip_after=None)
    assert sizes.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("packing", ["concat", "document"])
@pytest.mark.parametrize("policy", [{"skip_after": None}, {"skip_after": 9, "skip_starts": True}])
def test_bytes_of_a_tokenizer_that_loses_some(
    tmp_path: Path, packing: Any, policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled in each document to those of its text; id 5 is unknown, and has none of its own."""
    monkeypatch.setattr(select_bytes, "_SAMPLES_AT_ONCE", 5)
    monkeypatch.setattr(select_bytes, "_TOKENS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    lengths, of_ids = rng.integers(0, 60, 40).astype(np.int32), np.array([1, 2, 3, 1, 7, 0, 4, 1, 1, 0], np.int32)
    lengths[-1], tokens = 0, rng.integers(0, 10, lengths[:-1].sum())
    sizes, starts = rng.integers(0, 400, 40), np.cumsum([0, *lengths])
    tokens[starts[7] : starts[8]] = 5
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(tokens, lengths, sizes)
        writer.finish()
    each: list[float] = []
    for first, last, size in zip(starts.tolist(), starts[1:].tolist(), sizes.tolist()):
        own = [int(of_ids[token]) for token in tokens[first:last]]
        own = own if sum(own) else [1] * len(own)
        each += [size * weight / sum(own) for weight in own]
    for i in range(1, len(each)):
        if tokens[i - 1] == policy["skip_after"] or ("skip_starts" in policy and i in starts):
            each[i] = 0
    samples = open_samples(packing, IndexedDataset(tmp_path / "data"), 64, ByteTokenizer)
    ids = np.arange(samples.num_samples)
    ends = samples.starts(ids) + samples.lengths(ids)
    expected = [sum(each[start + 1 : end]) for start, end in zip(samples.starts(ids).tolist(), ends.tolist())]
    found = select_bytes.sample_bytes(samples, of_ids, **policy)
    assert np.abs(found - np.array(expected)).max() <= 0.5 + 1e-6 and found.sum() > 1000


def test_a_dataset_is_not_replaced_by_its_refined_one(tmp_path: Path, dataset: IndexedDataset) -> None:
    flags, *_ = write_pair(tmp_path, ConcatSamples(dataset, SEQ))
    (tmp_path / "link").symlink_to(tmp_path)
    for prefix in (dataset.prefix, tmp_path / "link" / "data"):
        with pytest.raises(UsageError, match="one of the datasets that are read"):
            main([*flags, "--materialize", str(prefix)])
    for prefix in (tmp_path / "none" / "x", f"{tmp_path}/"):
        with pytest.raises(UsageError, match="expected FOLDER/NAME"):
            main([*flags, "--materialize", str(prefix)])
    assert not (tmp_path / "out").exists()


def slow_documents(samples: Samples, ids: list[int]) -> list[list[int]]:
    """A document a kept sample, without its last token where that is the next kept one's first."""
    documents = []
    for i in ids:
        (start,), (length,) = samples.starts(np.array([i])), samples.lengths(np.array([i]))
        end = start + length
        if i + 1 in ids:
            end = min(end, int(samples.starts(np.array([i + 1]))[0]))
        documents.append(samples.dataset.tokens[start:end].tolist())
    return documents


@pytest.mark.parametrize("packing", ["concat", "document", "sentence"])
@pytest.mark.parametrize("ratio", ["0.05", "0.6", "1"])
def test_a_refined_dataset(
    tmp_path: Path, dataset: IndexedDataset, packing: Any, ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_materialize, "_COPY_BYTES", 200)
    if packing == "sentence":
        with IndexedWriter(tmp_path / "text", np.uint16) as writer:
            text = b"One sentence. Two? And a much, much longer one; it goes on.\nSo it does. " * 9
            writer.add_documents(np.frombuffer(text, np.uint8), np.array([len(text)]))
            writer.finish(tokenizer=ByteTokenizer().describe())
        dataset = IndexedDataset(tmp_path / "text")
    samples = open_samples(packing, dataset, 30, ByteTokenizer)
    flags, *_ = write_pair(tmp_path, samples)
    assert main([*flags, "--ratio", ratio, "--materialize", str(tmp_path / "refined")]) == 0
    selection = Selection(tmp_path / "out")
    refined = IndexedDataset(tmp_path / "refined")
    expected = slow_documents(samples, selection.ids.tolist())
    assert [refined.document(d).tolist() for d in range(refined.num_documents)] == expected
    if ratio == "1" and packing != "document":
        assert np.array_equal(refined.tokens, dataset.tokens[: refined.num_tokens])
    manifest = refined.manifest
    assert manifest is not None and manifest.tokenizer == dataset.manifest.tokenizer
    assert manifest.parents == {"dataset": dataset.fingerprint, "selection": selection.fingerprint}
    assert verify_files(tmp_path / "refined.manifest.json") == []


@pytest.mark.parametrize("packing", ["concat", "document"])
@pytest.mark.parametrize("ratio", ["0.1", "0.6", "1"])
def test_a_refined_dataset_has_its_part_of_the_bytes(
    tmp_path: Path, dataset: IndexedDataset, packing: Any, ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_materialize, "_COPY_BYTES", 200)
    sizes = np.random.default_rng(3).integers(0, 300, dataset.num_documents)
    with IndexedWriter(tmp_path / "known", np.uint16) as writer:
        writer.add_documents(dataset.tokens, dataset.lengths, sizes)
        writer.finish(tokenizer=NullTokenizer(VOCAB - 1).describe())
    known = IndexedDataset(tmp_path / "known")
    samples = open_samples(packing, known, 30, ByteTokenizer)
    flags, *_ = write_pair(tmp_path, samples)
    assert main([*flags, "--ratio", ratio, "--materialize", str(tmp_path / "refined")]) == 0
    refined = IndexedDataset(tmp_path / "refined")
    shares: list[int] = []
    for length, size in zip(known.lengths.tolist(), sizes.tolist()):
        shares += [size * (i + 1) // length - size * i // length for i in range(length)]
    expected = []
    ids = Selection(tmp_path / "out").ids.tolist()
    for i in ids:
        (start,), (length,) = samples.starts(np.array([i])), samples.lengths(np.array([i]))
        stop = start + length
        if i + 1 in ids:
            stop = min(stop, int(samples.starts(np.array([i + 1]))[0]))
        expected.append(sum(shares[start:stop]))
    assert refined.text_bytes is not None and refined.text_bytes.tolist() == expected
    if packing == "document":
        assert refined.text_bytes.tolist() == sizes[ids].tolist()


def test_megatron_trains_on_a_refined_dataset(tmp_path: Path, dataset: IndexedDataset) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    samples = ConcatSamples(dataset, SEQ)
    flags, *_ = write_pair(tmp_path, samples)
    assert main([*flags, "--materialize", str(tmp_path / "refined")]) == 0

    class Tokenizer:
        vocab_size, eod, pad, eos = VOCAB + 1, VOCAB - 1, VOCAB, VOCAB - 1
        unique_identifiers = {"class": "test"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ, split="1,0,0", reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, tokenizer=Tokenizer(), blend=None, mmap_bin_files=True,
        path_to_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    low_level = megatron.IndexedDataset(str(tmp_path / "refined"))
    kept = Selection(tmp_path / "out").ids.tolist()
    documents = np.arange(len(low_level), dtype=np.int32)
    gpt = GPTDataset(low_level, str(tmp_path / "refined"), documents, None, Split.train, config)
    refined = IndexedDataset(tmp_path / "refined")
    assert len(low_level) == len(kept) and len(gpt) == (refined.num_tokens - 1) // SEQ
    whole = set(map(tuple, slow_documents(samples, kept)))
    assert whole == {tuple(low_level[i].tolist()) for i in range(len(low_level))}
    items = [gpt[i] for i in range(len(gpt))]
    assert all(item["tokens"].shape == (SEQ,) and item["tokens"].max() < VOCAB for item in items)
    counts = np.bincount(np.concatenate([item["tokens"].numpy() for item in items]), minlength=VOCAB)
    assert (counts <= np.bincount(refined.tokens, minlength=VOCAB)).all()  # an epoch, each token at most once

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(VOCAB + 1, 32), torch.nn.Linear(32, VOCAB + 1))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.03), []
    tokens, labels, mask = (torch.stack([item[key] for item in items]) for key in ("tokens", "labels", "loss_mask"))
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none")
        loss = (loss * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_another_dataset_is_refused(tmp_path: Path, dataset: IndexedDataset) -> None:
    samples = ConcatSamples(dataset, SEQ)
    flags, *_ = write_pair(tmp_path, samples)
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.arange(1000) % VOCAB, np.array([1000]))
        fingerprint = writer.finish().fingerprint
    with pytest.raises(MismatchError, match=f"{fingerprint}, expected {dataset.fingerprint}"):
        main([*flags, "--materialize", str(tmp_path / "refined")])
    assert not (tmp_path / "out").exists()
