"""Bytes of labels: those of the original text, whatever a tokenizer does to it, for whole corpora and for windows."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizer_models import text_lines, train_byte_bpe

from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.samples.boundaries import begins_document
from megakd.data.samples.concat import ConcatSamples
from megakd.data.samples.label_bytes import label_bytes, why_no_bytes
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.samples.split import PartSamples
from megakd.data.tokenizer import ByteTokenizer
from megakd.data.tokenizers.sentencepiece_model import _fields as protocol_buffer_fields
from megakd.errors import CorruptError
from megakd.pipeline.preprocess.main import main

SEQ = 16
KINDS = ["nmt_nfkc", "identity", "metaspace", "wordpiece", "byte_level", "no_decoder"]
"""Tokenizers: four that lose or change text, or have no ids for some letters, and two that do not."""


def corpus() -> list[str]:
    """Indented code, prose with double spaces, and letters that no vocabulary here was trained on."""
    lines, texts = text_lines(), []
    for i in range(70):
        code = "\n".join("    " * (j % 5) + line.strip() for j, line in enumerate(lines[7 * i : 7 * i + 9]))
        strange = ["", "Größe naïve façade \u2460\ufb01", "данные и модель", "東京の学生", "\u200b\u00bd\u00a0x\t\t"][
            i % 5
        ]
        texts.append(f"document {i}\n{code}  {strange}\n\n\n" + " ".join(lines[9 * i : 9 * i + 3]) + "\n" * (i % 3))
    return texts


def sentencepiece_model(path: Path, rule: str) -> Path:
    """A model of spm_train's default flags, or one that normalises nothing; neither falls back to bytes."""
    import sentencepiece

    model, kept = io.BytesIO(), {} if rule == "nmt_nfkc" else {"remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text_lines() if line.strip()][:3000]),
        model_writer=model, vocab_size=500, normalization_rule_name=rule, num_threads=1, minloglevel=2, **kept,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def tokenizers_model(folder: Path, kind: str) -> Path:
    """A Metaspace BPE, or a WordPiece, with an id for what it does not know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir()
    special: dict[str, Any] = {"special_tokens": ["[UNK]", "<|endoftext|>"], "vocab_size": 500, "show_progress": False}
    if kind == "metaspace":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer(**special)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(**special)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.train_from_iterator(text_lines()[:3000], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def model_of(kind: str, folder: Path) -> tuple[str, Path]:
    if kind in ("nmt_nfkc", "identity"):
        return "SentencePieceTokenizer", sentencepiece_model(folder / "m.model", kind)
    if kind in ("metaspace", "wordpiece"):
        return "HuggingFaceTokenizer", tokenizers_model(folder / "m", kind)
    model = train_byte_bpe(folder / "m", vocab_size=500)
    if kind == "no_decoder":
        content = json.loads((model / "tokenizer.json").read_text())
        (model / "tokenizer.json").write_text(json.dumps(content | {"decoder": None}))
    return "HuggingFaceTokenizer", model


def token_ends(kind: str, model: Path) -> Callable[[str], list[int]]:
    """Function that finds the byte of a text at which each token ends, as the engine itself tells."""
    if kind in ("nmt_nfkc", "identity"):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

        def find_in_protocol_buffer(text: str) -> list[int]:
            """Field 2 of the message is a piece, field 5 of a piece its end; a field that is 0 is left out."""
            fields = protocol_buffer_fields(processor.encode(text, out_type="serialized_proto"))
            pieces = [value for field, value in fields if field == 2 and isinstance(value, bytes)]
            return [int(dict(protocol_buffer_fields(piece)).get(5, 0)) for piece in pieces]

        return find_in_protocol_buffer
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(model / "tokenizer.json"))

    def find_by_offsets(text: str) -> list[int]:
        places = np.cumsum([0, *(len(character.encode()) for character in text)])
        return [int(places[end]) for _, end in engine.encode(text, add_special_tokens=False).offsets]

    return find_by_offsets


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[IndexedDataset, Any]:
    """A dataset of `preprocess`, and the loss of each token under a model by which all bytes are equally likely."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, model = model_of(request.param, folder)
    texts = corpus()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--tokenizer-type", kind, "--tokenizer-model", str(model), "--append-eod", "--workers", "1"]
    assert main(["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / "o"), *flags]) == 0
    dataset = IndexedDataset(folder / "o_text_document")
    find_ends, losses = token_ends(request.param, model), []
    for number, text in enumerate(texts):
        ends = np.maximum.accumulate([0, *find_ends(text)])[1:]
        assert len(ends) + 1 == len(dataset.document(number))
        ends[-1] = len(text.encode())  # what no token stands for belongs to the next one; at the end, to the last
        losses.append(np.append(np.diff([0, *ends]) * math.log(256), 0.0))  # the end of document is free
    return dataset, np.concatenate(losses)


def total_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def labels_of(samples: Samples, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Token positions of all labels of the samples."""
    lengths = samples.lengths(ids)
    return np.concatenate([start + np.arange(1, n) for start, n in zip(samples.starts(ids), lengths)])


def mask_of(samples: Samples, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = np.arange(1, samples.seq_length + 1) < samples.lengths(ids)[:, None]
    return mask


def bits_per_byte(samples: Samples, ids: NDArray[np.int64], losses: NDArray[np.float64], mask: Any = None) -> float:
    mask = mask_of(samples, ids) if mask is None else mask
    labels = samples.starts(ids)[:, None] + 1 + np.arange(samples.seq_length)
    loss = losses[labels[mask]].sum()
    return float(loss / math.log(2) / label_bytes(samples, ids, mask))


@pytest.mark.slow
def test_a_corpus_read_as_a_whole_has_the_bytes_of_its_text(made: tuple[IndexedDataset, Any]) -> None:
    dataset, losses = made
    total = total_bytes(corpus())
    samples = ConcatSamples(dataset, SEQ)
    ids = np.arange(samples.num_samples)
    assert label_bytes(samples, ids, mask_of(samples, ids)) == pytest.approx(total, rel=1e-3)
    # a uniform byte model needs 8 bits a byte, under every tokenizer
    assert bits_per_byte(samples, ids, losses) == pytest.approx(8, rel=1e-3)
    one = ConcatSamples(dataset, dataset.num_tokens - 1)  # all of it but the first token, which is no label
    first = dataset.text_bytes[0] // len(dataset.document(0))  # type: ignore[index]
    assert label_bytes(one, np.arange(1), mask_of(one, np.arange(1))) == total - first


@pytest.mark.slow
def test_parts_of_documents_are_near_the_truth(made: tuple[IndexedDataset, Any]) -> None:
    """Windows that cut documents, half of them drawn; and without the labels with which documents begin."""
    dataset, losses = made
    samples = ConcatSamples(dataset, SEQ)
    ids = np.random.default_rng(0).permutation(samples.num_samples)
    half = ids[: len(ids) // 2]
    assert bits_per_byte(samples, half, losses) == pytest.approx(8, rel=0.03)
    parts = [label_bytes(samples, part, mask_of(samples, part)) for part in np.array_split(ids, 7)]
    assert sum(parts) == label_bytes(samples, np.sort(ids), mask_of(samples, ids))
    rows = samples.read(ids)
    mask = ~begins_document(samples, ids, rows, eod_token=None)[:, 1:]
    assert bits_per_byte(samples, ids, losses, mask) == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("cut", ["whole", "part"])
@pytest.mark.parametrize("packing", ["document", "concat", "sentence"])
def test_every_label_has_its_share(packing: Any, cut: str, tmp_path: Path) -> None:
    """Against a slow twin, masks and offsets included, also of a part that a split cuts."""
    rng = np.random.default_rng(0)
    lengths, sizes = rng.integers(1, 13, 40), rng.integers(0, 99, 40)
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        text = rng.choice(np.frombuffer(b"ab. \n", np.uint8), lengths.sum())
        writer.add_documents(text, lengths.astype(np.int32), sizes)
        writer.finish()
    shares = [b * (i + 1) // n - b * i // n for n, b in zip(lengths.tolist(), sizes.tolist()) for i in range(n)]
    samples: Samples = open_samples(packing, IndexedDataset(tmp_path / "d"), 12, ByteTokenizer)
    samples = samples if cut == "whole" else PartSamples(samples, 9, 40)
    ids = rng.permutation(samples.num_samples)[:14]
    mask = mask_of(samples, ids) & (rng.random((14, 12)) < 0.7)
    expected = sum(
        shares[int(start) + 1 + j]
        for start, row in zip(samples.starts(ids), mask)
        for j in itertools.compress(range(12), row)
    )
    assert label_bytes(samples, ids, mask) == expected
    shifted = label_bytes(samples, ids, mask[:, 3:], np.full(14, 3))
    assert shifted == label_bytes(samples, ids, mask & (np.arange(12) >= 3))
    assert label_bytes(samples, ids[:0], mask[:0]) == 0 == label_bytes(samples, ids, np.zeros_like(mask))


def test_why_there_are_none(tmp_path: Path) -> None:
    opened = []
    for name, sizes in (("a", np.array([30])), ("b", None)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.arange(20), np.array([20], np.int32), sizes)
            writer.finish()
        opened.append(ConcatSamples(IndexedDataset(tmp_path / name), 4))
    assert why_no_bytes(opened[:1]) is None
    assert str(why_no_bytes(opened)).startswith(f"{tmp_path}/b: the dataset does not record the bytes of its text")
    (tmp_path / "a.bytes").write_bytes(np.array([31], "<i8").tobytes())
    with pytest.raises(CorruptError, match=r"a\.bytes"):
        why_no_bytes([ConcatSamples(IndexedDataset(tmp_path / "a"), 4)])
